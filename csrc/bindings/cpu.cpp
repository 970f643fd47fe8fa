// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings/exit_stats.h"
#include "bindings/ragged_attention.h"
#include "bindings/small_head.h"
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

void small_head(SmallHeadParams& p, uintptr_t workspace, int threads) {
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  cpu::small_head(p);
}

int64_t classify(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows, int64_t width, int64_t tokens,
                 int64_t token_stride, uintptr_t mask, int64_t mask_stride, const Layer& pooler, const Layer& head,
                 uintptr_t logits, uintptr_t argmax, uintptr_t statistics, int measure, float threshold,
                 uintptr_t leave, uintptr_t workspace, int threads) {
  SmallHeadParams p = small_head_params(hidden, hidden_dtype, hidden_stride, rows, width, pooler, head, logits);
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  p.tokens = tokens;
  p.token_stride = token_stride;
  p.mask = reinterpret_cast<const uint8_t*>(mask);
  p.mask_stride = mask_stride;
  if (argmax) {
    p.argmax = reinterpret_cast<int64_t*>(argmax);
    p.top1 = reinterpret_cast<float*>(statistics);
    p.top2 = p.top1 + rows;
    p.sumexp = p.top2 + rows;
    p.weighted = p.sumexp + rows;
  }
  p.measure = static_cast<Measure>(measure);
  p.threshold = threshold;
  p.leave = reinterpret_cast<uint8_t*>(leave);
  py::gil_scoped_release release;
  return cpu::small_head(p);
}

const int64_t* integers(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

// The rows of a call and the cache they go to, as ops/kv_fill.py sends them.
using KvRowsOf = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t>;

cpu::KvRowsArg kv_rows_arg(const KvRowsOf& rows, int64_t layers) {
  const auto [from_layer, batch_rows, slots, count, until, batch, capacities] = rows;
  return {integers(from_layer), integers(batch_rows), integers(slots), count, layers, until, batch,
          integers(capacities)};
}

void ragged_attention(RaggedAttentionParams& p, int threads) {
  p.threads = threads;
  if (p.count) p.live = p.count_64 ? *static_cast<const int64_t*>(p.count) : *static_cast<const int32_t*>(p.count);
  cpu::ragged_attention(p, cpu::ragged_attention_plan(p));
}

// What kv_fill is told about a stack once, so that a call brings only what changes.
class KvFill {
 public:
  KvFill(int64_t width, int64_t heads, int64_t head_size, int dtype, int norm, float eps, int key_norm, float key_eps,
         float shift, bool interleaved, int64_t layers, uintptr_t table)
      : layers_(layers) {
    p_.width = width;
    p_.heads = heads;
    p_.head_size = head_size;
    p_.dtype = static_cast<DType>(dtype);
    p_.norm = static_cast<Norm>(norm);
    p_.eps = eps;
    p_.key_norm = static_cast<Norm>(key_norm);
    p_.key_eps = key_eps;
    p_.shift = shift;
    p_.interleaved = interleaved;
    p_.layers = reinterpret_cast<const KvLayer*>(table);
  }

  int64_t workspace(int64_t rows, int threads) const {
    return cpu::kv_fill_workspace(p_.dtype, rows, p_.width, layers_, p_.head_size, threads);
  }

  // `tables` are pairs of addresses: none, one for all layers, or one a layer.
  void fill(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, const KvRowsOf& rows, uintptr_t places,
            const std::vector<uintptr_t>& tables, int tables_dtype, int64_t rotary, uintptr_t workspace,
            int threads) const {
    const cpu::KvRowsArg arg = kv_rows_arg(rows, layers_);
    const cpu::KvRows sorted = cpu::kv_rows(arg);
    KvFillParams p = p_;
    p.hidden = reinterpret_cast<const void*>(hidden);
    p.hidden_dtype = static_cast<DType>(hidden_dtype);
    p.hidden_stride = hidden_stride;
    p.rows = static_cast<int64_t>(sorted.source.size());
    p.rotary = rotary;
    p.source = sorted.source.data();
    p.from_layer = sorted.from_layer.data();
    p.batch_rows = sorted.batch_rows.data();
    p.slots = sorted.slots.data();
    p.places = reinterpret_cast<const KvPlace*>(places);
    p.tables = tables.empty() ? nullptr : reinterpret_cast<const KvRotary*>(tables.data());
    p.one_table = tables.size() == 2;
    p.tables_dtype = static_cast<DType>(tables_dtype);
    p.until = arg.until;
    p.workspace = reinterpret_cast<void*>(workspace);
    p.threads = threads;
    py::gil_scoped_release release;
    cpu::kv_fill(p);
  }

 private:
  KvFillParams p_{};
  int64_t layers_;
};

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
  def_small_head(m, &small_head, py::arg("workspace"), py::arg("threads"));
  m.def("classify", &classify, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("rows"),
        py::arg("width"), py::arg("tokens"), py::arg("token_stride"), py::arg("mask"), py::arg("mask_stride"),
        py::arg("pooler"), py::arg("head"), py::arg("logits"), py::arg("argmax"), py::arg("statistics"),
        py::arg("measure"), py::arg("threshold"), py::arg("leave"), py::arg("workspace"), py::arg("threads"),
        "Mean over tokens, pooler, head, statistics and, with a measure, who leaves: how many rows, or -1 where a "
        "score lies too near to the threshold; see exeunt.ops.classify.");
  m.def(
      "small_head_workspace",
      [](int weight, int64_t width, int64_t pooler, int threads) {
        return cpu::small_head_workspace(static_cast<DType>(weight), width, pooler, threads);
      },
      py::arg("weight_dtype"), py::arg("width"), py::arg("pooler"), py::arg("threads"),
      "Bytes of workspace that small_head and classify need; pooler is 0 without one.");
  m.def("ragged_attention_workspace", &cpu::ragged_attention_workspace, py::arg("tokens"), py::arg("heads"),
        py::arg("room"), py::arg("size"), py::arg("value_size"), py::arg("threads"),
        "Bytes of workspace that ragged_attention needs.");
  def_ragged_attention(m, &ragged_attention, py::arg("threads"));
  py::class_<KvFill>(m, "KvFill", "kv_fill for one stack; see exeunt.ops.kv_fill.")
      .def(py::init<int64_t, int64_t, int64_t, int, int, float, int, float, float, bool, int64_t, uintptr_t>(),
           py::arg("width"), py::arg("heads"), py::arg("head_size"), py::arg("dtype"), py::arg("norm"), py::arg("eps"),
           py::arg("key_norm"), py::arg("key_eps"), py::arg("shift"), py::arg("interleaved"), py::arg("layers"),
           py::arg("table"))
      .def("workspace", &KvFill::workspace, py::arg("rows"), py::arg("threads"),
           "Bytes of workspace for up to that many rows.")
      .def("fill", &KvFill::fill, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("rows"),
           py::arg("places"), py::arg("tables"), py::arg("tables_dtype"), py::arg("rotary"), py::arg("workspace"),
           py::arg("threads"), "Check the rows, then write their keys and values.");
  m.def(
      "kv_fill_check", [](const KvRowsOf& rows, int64_t layers) { cpu::kv_rows(kv_rows_arg(rows, layers)); },
      py::arg("rows"), py::arg("layers"), "Raise ValueError unless the rows have places of their own in the cache.");
  def_saturation(m, &cpu::saturation);
}
