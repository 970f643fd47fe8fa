// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/kv_fill.h"
#include "cpu/small_head.h"

namespace py = pybind11;
using namespace exeunt;

namespace {

// (address, dtype, stride) of an optional vector; address 0 means "not given".
using Vector = std::tuple<uintptr_t, int, int64_t>;

VectorArg vector_arg(const Vector& v) {
  const auto [address, dtype, stride] = v;
  return {reinterpret_cast<const void*>(address), static_cast<DType>(dtype), stride};
}

// (address, dtype, packed, tile stride, row stride, line stride, address of scales) of a weight; strides in bytes.
using Weight = std::tuple<uintptr_t, int, bool, int64_t, int64_t, int64_t, uintptr_t>;

WeightArg weight_arg(const Weight& w) {
  const auto [data, dtype, packed, tile_stride, row_stride, line_stride, scale] = w;
  return {reinterpret_cast<const void*>(data),  static_cast<DType>(dtype), packed, tile_stride, row_stride, line_stride,
          reinterpret_cast<const float*>(scale)};
}

void exit_stats(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, const Weight& head, int64_t rows,
                int64_t vocab, int64_t width, uintptr_t row_list, bool row_list_64, uintptr_t count, bool count_64,
                const Vector& head_bias, int norm, const Vector& norm_weight, const Vector& norm_bias, float eps,
                float scale, float softcap, float temperature, uintptr_t logits_out, int logits_dtype,
                int64_t logits_stride, bool entropy, uintptr_t columns, uintptr_t target, uintptr_t target_out,
                int topk, uintptr_t topk_logits, uintptr_t topk_ids, uintptr_t seeds, uintptr_t sample,
                uintptr_t argmax, uintptr_t top1, uintptr_t top2, uintptr_t sumexp, uintptr_t weighted,
                uintptr_t workspace, int threads) {
  ExitStatsParams p{};
  p.hidden = reinterpret_cast<const void*>(hidden);
  p.hidden_dtype = static_cast<DType>(hidden_dtype);
  p.hidden_stride = hidden_stride;
  p.head = weight_arg(head);
  p.rows = rows;
  p.vocab = vocab;
  p.width = width;
  p.row_list = reinterpret_cast<const void*>(row_list);
  p.row_list_64 = row_list_64;
  p.count = reinterpret_cast<const void*>(count);
  p.count_64 = count_64;
  p.head_bias = vector_arg(head_bias);
  p.norm = {static_cast<Norm>(norm), vector_arg(norm_weight), vector_arg(norm_bias), eps};
  p.scale = scale;
  p.softcap = softcap;
  p.temperature = temperature;
  p.logits_out = reinterpret_cast<void*>(logits_out);
  p.logits_dtype = static_cast<DType>(logits_dtype);
  p.logits_stride = logits_stride;
  p.entropy = entropy;
  p.columns = reinterpret_cast<const int64_t*>(columns);
  p.target = reinterpret_cast<const int64_t*>(target);
  p.target_out = reinterpret_cast<float*>(target_out);
  p.topk = topk;
  p.topk_logits = reinterpret_cast<float*>(topk_logits);
  p.topk_ids = reinterpret_cast<int64_t*>(topk_ids);
  p.seeds = reinterpret_cast<const int64_t*>(seeds);
  p.sample = reinterpret_cast<int64_t*>(sample);
  p.argmax = reinterpret_cast<int64_t*>(argmax);
  p.top1 = reinterpret_cast<float*>(top1);
  p.top2 = reinterpret_cast<float*>(top2);
  p.sumexp = reinterpret_cast<float*>(sumexp);
  p.weighted = reinterpret_cast<float*>(weighted);
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::exit_stats(p);
}

// (weight, bias, outputs, inputs, activation) of a layer; outputs 0 means "not given".
using Layer = std::tuple<Weight, Vector, int64_t, int64_t, int>;

LayerArg layer_arg(const Layer& l) {
  const auto& [weight, bias, outputs, inputs, activation] = l;
  return {weight_arg(weight), vector_arg(bias), outputs, inputs, static_cast<Activation>(activation)};
}

void small_head(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows, int64_t width, int norm,
                const Vector& norm_weight, const Vector& norm_bias, float eps, const Layer& pooler, const Layer& head,
                uintptr_t out, int threads) {
  SmallHeadParams p{};
  p.hidden = reinterpret_cast<const void*>(hidden);
  p.hidden_dtype = static_cast<DType>(hidden_dtype);
  p.hidden_stride = hidden_stride;
  p.rows = rows;
  p.width = width;
  p.norm = {static_cast<Norm>(norm), vector_arg(norm_weight), vector_arg(norm_bias), eps};
  p.pooler = layer_arg(pooler);
  p.pooled = p.pooler.outputs > 0;
  p.head = layer_arg(head);
  p.out = reinterpret_cast<float*>(out);
  p.threads = threads;
  std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, cpu::small_head_workspace(p)),
                                                        std::free);
  p.workspace = workspace.get();
  py::gil_scoped_release release;
  cpu::small_head(p);
}

using Integers = std::vector<int64_t>;

// `table` holds a KvLayer a layer, `places` a KvPlace a layer.
void kv_fill(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t width, int64_t heads, int64_t head_size,
             int64_t rotary, const Integers& source, const Integers& from_layer, const Integers& batch_rows,
             const Integers& slots, int dtype, int norm, float eps, int key_norm, float key_eps, float shift,
             bool interleaved, uintptr_t table, const Integers& places, int64_t until, uintptr_t workspace,
             int threads) {
  KvFillParams p{};
  p.hidden = reinterpret_cast<const void*>(hidden);
  p.hidden_dtype = static_cast<DType>(hidden_dtype);
  p.hidden_stride = hidden_stride;
  p.rows = static_cast<int64_t>(source.size());
  p.width = width;
  p.heads = heads;
  p.head_size = head_size;
  p.rotary = rotary;
  p.source = source.data();
  p.from_layer = from_layer.data();
  p.batch_rows = batch_rows.data();
  p.slots = slots.data();
  p.dtype = static_cast<DType>(dtype);
  p.norm = static_cast<Norm>(norm);
  p.eps = eps;
  p.key_norm = static_cast<Norm>(key_norm);
  p.key_eps = key_eps;
  p.shift = shift;
  p.interleaved = interleaved;
  p.layers = reinterpret_cast<const KvLayer*>(table);
  p.places = reinterpret_cast<const KvPlace*>(places.data());
  p.until = until;
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::kv_fill(p);
}

void saturation(uintptr_t a, int a_dtype, int64_t a_stride, uintptr_t b, int b_dtype, int64_t b_stride, int64_t rows,
                int64_t width, uintptr_t out) {
  py::gil_scoped_release release;
  cpu::saturation({reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), static_cast<DType>(a_dtype),
                   static_cast<DType>(b_dtype), a_stride, b_stride, rows, width, reinterpret_cast<float*>(out)});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of exeunt: plain pointers and integers, validated by exeunt.ops.";
  m.attr("version") = EXEUNT_VERSION;
  m.def("select_isa", &cpu::select_isa, py::arg("limit") = "",
        "Choose the best instruction set of this machine that is not above `limit`; returns its name.");
  m.def("isa", [] { return std::string(cpu::selected_isa().name); }, "The instruction set in use.");
  m.def("amx_refused", &cpu::amx_refused, "Whether the CPU has AMX and the operating system refused it.");
  m.def(
      "exit_stats_workspace",
      [](int head, int64_t rows, int64_t vocab, int64_t width, int topk, bool draws, int threads) {
        return cpu::exit_stats_workspace(static_cast<DType>(head), rows, vocab, width, topk, draws, threads);
      },
      py::arg("head_dtype"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("topk"), py::arg("draws"),
      py::arg("threads"), "Bytes of workspace that exit_stats needs.");
  m.def("exit_stats", &exit_stats, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"),
        py::arg("head"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("row_list"),
        py::arg("row_list_64"), py::arg("count"), py::arg("count_64"), py::arg("head_bias"), py::arg("norm"),
        py::arg("norm_weight"), py::arg("norm_bias"), py::arg("eps"), py::arg("scale"), py::arg("softcap"),
        py::arg("temperature"), py::arg("logits_out"), py::arg("logits_dtype"), py::arg("logits_stride"),
        py::arg("entropy"), py::arg("columns"), py::arg("target"), py::arg("target_out"), py::arg("topk"),
        py::arg("topk_logits"), py::arg("topk_ids"), py::arg("seeds"), py::arg("sample"), py::arg("argmax"),
        py::arg("top1"), py::arg("top2"), py::arg("sumexp"), py::arg("weighted"), py::arg("workspace"),
        py::arg("threads"), "Fused norm, head and online softmax; see exeunt.ops.exit_stats.");
  m.def("small_head", &small_head, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"),
        py::arg("rows"), py::arg("width"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"),
        py::arg("eps"), py::arg("pooler"), py::arg("head"), py::arg("out"), py::arg("threads"),
        "Fused norm, pooler and head of few classes; see exeunt.ops.small_head.");
  m.attr("kv_layer_fields") = sizeof(KvLayer) / sizeof(int64_t);
  m.attr("kv_place_fields") = sizeof(KvPlace) / sizeof(int64_t);
  m.def(
      "kv_fill_workspace",
      [](int dtype, int64_t rows, int64_t width, int64_t layers, int64_t head_size, int threads) {
        return cpu::kv_fill_workspace(static_cast<DType>(dtype), rows, width, layers, head_size, threads);
      },
      py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("layers"), py::arg("head_size"), py::arg("threads"),
      "Bytes of workspace that kv_fill needs.");
  m.def("kv_fill", &kv_fill, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("width"),
        py::arg("heads"), py::arg("head_size"), py::arg("rotary"), py::arg("source"), py::arg("from_layer"),
        py::arg("batch_rows"), py::arg("slots"), py::arg("dtype"), py::arg("norm"), py::arg("eps"), py::arg("key_norm"),
        py::arg("key_eps"), py::arg("shift"), py::arg("interleaved"), py::arg("table"), py::arg("places"),
        py::arg("until"), py::arg("workspace"), py::arg("threads"),
        "Keys and values of skipped layers; see exeunt.ops.kv_fill.");
  m.def("saturation", &saturation, py::arg("a"), py::arg("a_dtype"), py::arg("a_stride"), py::arg("b"),
        py::arg("b_dtype"), py::arg("b_stride"), py::arg("rows"), py::arg("width"), py::arg("out"),
        "Cosine of pairs of rows; see exeunt.ops.saturation.");
}
