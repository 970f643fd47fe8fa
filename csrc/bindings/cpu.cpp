// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings/exit_stats.h"
#include "cpu/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/kv_fill.h"
#include "cpu/ragged_attention.h"
#include "cpu/small_head.h"

using namespace exeunt;

namespace {

void exit_stats(const ExitStatsParams& params, int threads) {
  ExitStatsParams p = params;
  p.threads = threads;
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

// `table` holds a KvLayer a layer, `places` a KvPlace, `tables` a KvRotary, or nothing.
void kv_fill(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t width, int64_t heads, int64_t head_size,
             int64_t rotary, const Integers& source, const Integers& from_layer, const Integers& batch_rows,
             const Integers& slots, int dtype, int norm, float eps, int key_norm, float key_eps, float shift,
             bool interleaved, uintptr_t table, uintptr_t places, const Integers& tables, int64_t until,
             uintptr_t workspace, int threads) {
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
  p.places = reinterpret_cast<const KvPlace*>(places);
  p.tables = tables.empty() ? nullptr : reinterpret_cast<const KvRotary*>(tables.data());
  p.until = until;
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::kv_fill(p);
}

// (address, strides...) of a tensor, in elements; address 0 means "not given".
using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

CacheArg cache_arg(const Strided& c) {
  const auto [data, row, head, slot] = c;
  return {reinterpret_cast<const void*>(data), row, head, slot};
}

// `q` and `pages` have two strides; lists are addresses of int64.
void ragged_attention(const Strided& q, const Strided& keys, const Strided& values, int dtype,
                      const std::array<int64_t, 7>& shape, uintptr_t q_indptr, uintptr_t rows, uintptr_t kv_len,
                      uintptr_t kv_start, uintptr_t positions, int64_t entries, int64_t live, bool causal,
                      int64_t window, float softcap, float scale, uintptr_t alibi, const Strided& bias, int bias_dtype,
                      int64_t bias_keys, const Strided& pages, int64_t page_rows, int64_t page_columns, uintptr_t out,
                      uintptr_t workspace, int threads) {
  const auto list = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
  RaggedAttentionParams p{};
  p.q = reinterpret_cast<const void*>(std::get<0>(q));
  p.q_token = std::get<1>(q);
  p.q_head = std::get<2>(q);
  p.keys = cache_arg(keys);
  p.values = cache_arg(values);
  p.dtype = static_cast<DType>(dtype);
  std::tie(p.tokens, p.heads, p.kv_heads, p.size, p.value_size, p.rows_held, p.slots) = std::tuple_cat(shape);
  p.entries = entries;
  p.live = live;
  p.q_indptr = list(q_indptr);
  p.rows = list(rows);
  p.kv_len = list(kv_len);
  p.kv_start = list(kv_start);
  p.positions = list(positions);
  p.causal = causal;
  p.window = window;
  p.softcap = softcap;
  p.scale = scale;
  p.alibi = reinterpret_cast<const float*>(alibi);
  p.bias = reinterpret_cast<const void*>(std::get<0>(bias));
  p.bias_token = std::get<1>(bias);
  p.bias_head = std::get<2>(bias);
  p.bias_key = std::get<3>(bias);
  p.bias_dtype = static_cast<DType>(bias_dtype);
  p.bias_keys = bias_keys;
  p.pages = reinterpret_cast<const int32_t*>(std::get<0>(pages));
  p.page_row = std::get<1>(pages);
  p.page_column = std::get<2>(pages);
  p.page_rows = page_rows;
  p.page_columns = page_columns;
  p.out = reinterpret_cast<void*>(out);
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  py::gil_scoped_release release;
  cpu::ragged_attention(p, cpu::ragged_attention_plan(p));
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
  def_exit_stats(m, &exit_stats, py::arg("threads"));
  m.def("small_head", &small_head, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"),
        py::arg("rows"), py::arg("width"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"),
        py::arg("eps"), py::arg("pooler"), py::arg("head"), py::arg("out"), py::arg("threads"),
        "Fused norm, pooler and head of few classes; see exeunt.ops.small_head.");
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
        py::arg("tables"), py::arg("until"), py::arg("workspace"), py::arg("threads"),
        "Keys and values of skipped layers; see exeunt.ops.kv_fill.");
  m.def("ragged_attention_workspace", &cpu::ragged_attention_workspace, py::arg("tokens"), py::arg("heads"),
        py::arg("room"), py::arg("size"), py::arg("value_size"), py::arg("threads"),
        "Bytes of workspace that ragged_attention needs.");
  m.def("ragged_attention", &ragged_attention, py::arg("q"), py::arg("keys"), py::arg("values"), py::arg("dtype"),
        py::arg("shape"), py::arg("q_indptr"), py::arg("rows"), py::arg("kv_len"), py::arg("kv_start"),
        py::arg("positions"), py::arg("entries"), py::arg("live"), py::arg("causal"), py::arg("window"),
        py::arg("softcap"), py::arg("scale"), py::arg("alibi"), py::arg("bias"), py::arg("bias_dtype"),
        py::arg("bias_keys"), py::arg("pages"), py::arg("page_rows"), py::arg("page_columns"), py::arg("out"),
        py::arg("workspace"), py::arg("threads"), "Attention over ragged rows; see exeunt.ops.ragged_attention.");
  m.def("saturation", &saturation, py::arg("a"), py::arg("a_dtype"), py::arg("a_stride"), py::arg("b"),
        py::arg("b_dtype"), py::arg("b_stride"), py::arg("rows"), py::arg("width"), py::arg("out"),
        "Cosine of pairs of rows; see exeunt.ops.saturation.");
}
