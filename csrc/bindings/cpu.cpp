// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/exit_stats.h"
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

// States [rows, tokens, width]: strides in elements, unit stride along the width; and which tokens count.
void set_states(SmallHeadParams& p, int64_t tokens, int64_t token_stride, uintptr_t mask, int64_t mask_stride) {
  p.tokens = tokens;
  p.token_stride = token_stride;
  p.mask = reinterpret_cast<const uint8_t*>(mask);
  p.mask_stride = mask_stride;
}

void classify(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows, int64_t width, int64_t tokens,
              int64_t token_stride, uintptr_t mask, int64_t mask_stride, const Layer& pooler, const Layer& head,
              uintptr_t logits, uintptr_t argmax, uintptr_t statistics, uintptr_t workspace, int threads) {
  SmallHeadParams p = small_head_params(hidden, hidden_dtype, hidden_stride, rows, width, pooler, head, logits);
  p.workspace = reinterpret_cast<void*>(workspace);
  p.threads = threads;
  set_states(p, tokens, token_stride, mask, mask_stride);
  p.argmax = reinterpret_cast<int64_t*>(argmax);
  p.top1 = reinterpret_cast<float*>(statistics);
  p.top2 = p.top1 + rows;
  p.sumexp = p.top2 + rows;
  p.weighted = p.sumexp + rows;
  py::gil_scoped_release release;
  cpu::small_head(p);
}

// What a check is told once, so that a call brings only the states. Its memory, 64-byte aligned:
//
//   | logits [rows, classes] | who leaves [rows], a byte each | workspace |
class Check {
 public:
  Check(const Layer& pooler, const Layer& head, int64_t width, bool mean, int measure, float threshold)
      : p_(small_head_params(0, 0, 0, 0, width, pooler, head, 0)), mean_(mean) {
    p_.measure = static_cast<Measure>(measure);
    p_.threshold = threshold;
  }

  int64_t room(int64_t rows, int threads) const {
    return workspace_at(rows) +
           cpu::small_head_workspace(p_.head.weight.dtype, p_.width, p_.pooled ? p_.pooler.outputs : 0, rows, threads);
  }

  int64_t judge(uintptr_t hidden, int hidden_dtype, const std::array<int64_t, 3>& shape,
                const std::array<int64_t, 3>& strides, uintptr_t mask, int64_t mask_stride, uintptr_t memory,
                int threads) const {
    if (shape[2] != p_.width || strides[2] != 1) return -1;
    SmallHeadParams p = p_;
    p.hidden = reinterpret_cast<const void*>(hidden);
    p.hidden_dtype = static_cast<DType>(hidden_dtype);
    p.hidden_stride = strides[0];
    p.rows = shape[0];
    if (mean_) set_states(p, shape[1], strides[1], mask, mask_stride);
    p.out = reinterpret_cast<float*>(memory);
    p.leave = reinterpret_cast<uint8_t*>(memory + logits_bytes(p.rows));
    p.workspace = reinterpret_cast<void*>(memory + workspace_at(p.rows));
    p.threads = threads;
    py::gil_scoped_release release;
    return cpu::small_head(p);
  }

 private:
  uintptr_t logits_bytes(int64_t rows) const { return static_cast<uintptr_t>(rows * p_.head.outputs) * sizeof(float); }
  uintptr_t workspace_at(int64_t rows) const {
    return (logits_bytes(rows) + static_cast<uintptr_t>(rows) + 63) / 64 * 64;
  }

  SmallHeadParams p_;
  bool mean_;
};

const int64_t* integers(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

// The rows of a call and the cache they go to, as ops/kv_fill.py sends them.
using KvRowsOf = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t>;

cpu::KvRowsArg kv_rows_arg(const KvRowsOf& rows, int64_t layers) {
  const auto [from_layer, batch_rows, slots, count, until, batch, capacities] = rows;
  return {integers(from_layer), integers(batch_rows), integers(slots), count, layers, until, batch,
          integers(capacities)};
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
        py::arg("workspace"), py::arg("threads"),
        "Mean over tokens, pooler, head and statistics; see exeunt.ops.classify.");
  py::class_<Check>(m, "Check", "classify and a threshold, for one exit; see exeunt.ops.Check.")
      .def(py::init<const Layer&, const Layer&, int64_t, bool, int, float>(), py::arg("pooler"), py::arg("head"),
           py::arg("width"), py::arg("mean"), py::arg("measure"), py::arg("threshold"))
      .def("room", &Check::room, py::arg("rows"), py::arg("threads"), "Bytes of memory for up to that many rows.")
      .def("judge", &Check::judge, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("shape"), py::arg("strides"),
           py::arg("mask"), py::arg("mask_stride"), py::arg("memory"), py::arg("threads"),
           "How many rows leave; -1 where a score lies too near to the threshold, or states are not to be read so.");
  m.def(
      "small_head_workspace",
      [](int weight, int64_t width, int64_t pooler, int64_t rows, int threads) {
        return cpu::small_head_workspace(static_cast<DType>(weight), width, pooler, rows, threads);
      },
      py::arg("weight_dtype"), py::arg("width"), py::arg("pooler"), py::arg("rows"), py::arg("threads"),
      "Bytes of workspace that small_head and classify need; pooler is 0 without one.");
  m.def("ragged_attention_workspace", &cpu::ragged_attention_workspace, py::arg("tokens"), py::arg("heads"),
        py::arg("room"), py::arg("size"), py::arg("value_size"), py::arg("threads"),
        "Bytes of workspace that ragged_attention needs.");
  m.def("ragged_attention", &ragged_attention, py::arg("q"), py::arg("keys"), py::arg("values"), py::arg("dtype"),
        py::arg("shape"), py::arg("q_indptr"), py::arg("rows"), py::arg("kv_len"), py::arg("kv_start"),
        py::arg("positions"), py::arg("entries"), py::arg("live"), py::arg("causal"), py::arg("window"),
        py::arg("softcap"), py::arg("scale"), py::arg("alibi"), py::arg("bias"), py::arg("bias_dtype"),
        py::arg("bias_keys"), py::arg("pages"), py::arg("page_rows"), py::arg("page_columns"), py::arg("out"),
        py::arg("workspace"), py::arg("threads"), "Attention over ragged rows; see exeunt.ops.ragged_attention.");
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
