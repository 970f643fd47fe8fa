// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <new>

#include "bindings/exit_stats.h"
#include "bindings/kv_fill.h"
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

// small_head with a workspace that the calling thread keeps, of sixteen rows for each of its threads at most: to ask
// for it in Python takes a tenth as long as a small head does.
int64_t run_small_head(SmallHeadParams& p, int threads) {
  constexpr std::align_val_t kAlign{64};
  const auto free = [](void* memory) { ::operator delete(memory, kAlign); };
  thread_local std::unique_ptr<void, decltype(free)> kept;
  thread_local int64_t size = 0;
  const int64_t bytes = cpu::small_head_workspace(p.width, p.pooled ? p.pooler.outputs : 0, p.rows, threads);
  if (bytes > size) {
    kept.reset(::operator new(static_cast<size_t>(bytes), kAlign));
    size = bytes;
  }
  p.workspace = kept.get();
  p.threads = threads;
  return cpu::small_head(p);
}

void small_head(SmallHeadParams& p, int threads) { run_small_head(p, threads); }

// States [rows, tokens, width]: strides in elements, unit stride along the width; and which tokens count.
void set_states(SmallHeadParams& p, int64_t tokens, int64_t token_stride, uintptr_t mask, int64_t mask_stride) {
  p.tokens = tokens;
  p.token_stride = token_stride;
  p.mask = reinterpret_cast<const uint8_t*>(mask);
  p.mask_stride = mask_stride;
}

void classify(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows, int64_t width, int64_t tokens,
              int64_t token_stride, uintptr_t mask, int64_t mask_stride, const Layer& pooler, const Layer& head,
              uintptr_t logits, uintptr_t argmax, uintptr_t statistics, int threads) {
  SmallHeadParams p = small_head_params(hidden, hidden_dtype, hidden_stride, rows, width, pooler, head, logits);
  set_states(p, tokens, token_stride, mask, mask_stride);
  p.argmax = reinterpret_cast<int64_t*>(argmax);
  p.top1 = reinterpret_cast<float*>(statistics);
  p.top2 = p.top1 + rows;
  p.sumexp = p.top2 + rows;
  p.weighted = p.sumexp + rows;
  py::gil_scoped_release release;
  run_small_head(p, threads);
}

// What a check is told once, so that a call brings only the states, and memory for what it finds:
//
//   | logits [rows, classes] | who leaves [rows], a byte each |
class Check {
 public:
  Check(const Layer& pooler, const Layer& head, int64_t width, bool mean, int measure, float threshold)
      : p_(small_head_params(0, 0, 0, 0, width, pooler, head, 0)), mean_(mean) {
    p_.measure = static_cast<Measure>(measure);
    p_.threshold = threshold;
  }

  int64_t judge(uintptr_t hidden, int hidden_dtype, const Integers<3>& shape_of, const Integers<3>& strides_of,
                uintptr_t mask, int64_t mask_stride, uintptr_t memory, int64_t bytes, int threads) const {
    const auto &shape = shape_of.of, &strides = strides_of.of;
    if (shape[2] != p_.width || strides[2] != 1 || (shape[1] == 0 && !mean_)) return -1;
    const int64_t logits = shape[0] * p_.head.outputs * static_cast<int64_t>(sizeof(float)), needed = logits + shape[0];
    if (bytes < needed)
      throw std::invalid_argument("Check: room must have " + std::to_string(needed) + " bytes for " +
                                  std::to_string(shape[0]) + " rows, got " + std::to_string(bytes));
    SmallHeadParams p = p_;
    p.hidden = reinterpret_cast<const void*>(hidden);
    p.hidden_dtype = static_cast<DType>(hidden_dtype);
    p.hidden_stride = strides[0];
    p.rows = shape[0];
    if (mean_) set_states(p, shape[1], strides[1], mask, mask_stride);
    p.out = reinterpret_cast<float*>(memory);
    p.leave = reinterpret_cast<uint8_t*>(memory + static_cast<uintptr_t>(logits));
    py::gil_scoped_release release;
    return run_small_head(p, threads);
  }

 private:
  SmallHeadParams p_;
  bool mean_;
};

cpu::KvRowsArg kv_rows_arg(const KvRowsOf& rows, int64_t layers) {
  const auto [from_layer, batch_rows, slots, count, until, batch, capacities] = rows.of;
  const auto list = [](int64_t at) { return address<const int64_t>(at); };
  return {list(from_layer), list(batch_rows), list(slots), count, layers, until, batch, list(capacities)};
}

void ragged_attention(RaggedAttentionParams& p, int threads) {
  p.threads = threads;
  if (p.count) p.live = p.count_64 ? *static_cast<const int64_t*>(p.count) : *static_cast<const int32_t*>(p.count);
  cpu::ragged_attention(p, cpu::ragged_attention_plan(p));
}

void kv_fill(const KvFill& stack, KvFillParams& p, int threads) {
  const cpu::KvRows sorted =
      cpu::kv_rows({p.from_layer, p.batch_rows, p.slots, p.rows, stack.layers, p.until, p.batch, p.capacities});
  py::gil_scoped_release release;
  p.rows = static_cast<int64_t>(sorted.source.size());
  p.source = sorted.source.data();
  p.from_layer = sorted.from_layer.data();
  p.batch_rows = sorted.batch_rows.data();
  p.slots = sorted.slots.data();
  p.threads = threads;
  cpu::kv_fill(p);
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
      [](int head, int form, int64_t rows, int64_t vocab, int64_t width, int topk, bool draws, int threads) {
        return cpu::exit_stats_workspace(static_cast<DType>(head), static_cast<WeightForm>(form), rows, vocab, width,
                                         topk, draws, threads);
      },
      py::arg("head_dtype"), py::arg("head_form"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("topk"),
      py::arg("draws"), py::arg("threads"), "Bytes of workspace that exit_stats needs.");
  def_exit_stats(m, &exit_stats, py::arg("threads"));
  def_small_head(m, &small_head, py::arg("threads"));
  m.def("classify", &classify, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("rows"),
        py::arg("width"), py::arg("tokens"), py::arg("token_stride"), py::arg("mask"), py::arg("mask_stride"),
        py::arg("pooler"), py::arg("head"), py::arg("logits"), py::arg("argmax"), py::arg("statistics"),
        py::arg("threads"), "Mean over tokens, pooler, head and statistics; see exeunt.ops.classify.");
  py::class_<Check>(m, "Check", "classify and a threshold, for one exit; see exeunt.ops.Check.")
      .def(py::init<const Layer&, const Layer&, int64_t, bool, int, float>(), py::arg("pooler"), py::arg("head"),
           py::arg("width"), py::arg("mean"), py::arg("measure"), py::arg("threshold"))
      .def("judge", &Check::judge, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("shape"), py::arg("strides"),
           py::arg("mask"), py::arg("mask_stride"), py::arg("memory"), py::arg("bytes"), py::arg("threads"),
           "How many rows leave; -1 where a score lies too near to the threshold, or states are not to be read so.");
  m.def("ragged_attention_workspace", &cpu::ragged_attention_workspace, py::arg("tokens"), py::arg("heads"),
        py::arg("room"), py::arg("size"), py::arg("value_size"), py::arg("threads"),
        "Bytes of workspace that ragged_attention needs.");
  def_ragged_attention(m, &ragged_attention, py::arg("threads"));
  def_kv_fill(m, &kv_fill, py::arg("threads"))
      .def(
          "workspace",
          [](const KvFill& stack, int64_t rows, int threads) {
            return cpu::kv_fill_workspace(stack.p.dtype, stack.p.form, rows, stack.p.width, stack.p.head_size, threads);
          },
          py::arg("rows"), py::arg("threads"), "Bytes of workspace for up to that many rows.");
  m.def(
      "kv_fill_check", [](const KvRowsOf& rows, int64_t layers) { cpu::kv_rows(kv_rows_arg(rows, layers)); },
      py::arg("rows"), py::arg("layers"), "Raise ValueError unless the rows have places of their own in the cache.");
  def_saturation(m, &cpu::saturation);
}
