// _cpu: integers and pointers in, nothing decided. The Python layer has checked every shape, dtype and index.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "bindings/exit_stats.h"
#include "bindings/small_head.h"
#include "cpu/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/kv_fill.h"
#include "cpu/small_head.h"

using namespace exeunt;

namespace {

void exit_stats(const ExitStatsParams& params, int threads) {
  ExitStatsParams p = params;
  p.threads = threads;
  cpu::exit_stats(p);
}

void small_head(SmallHeadParams& p, int threads) {
  p.threads = threads;
  std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, cpu::small_head_workspace(p)),
                                                        std::free);
  p.workspace = workspace.get();
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

void saturation(const SaturationParams& p) { cpu::saturation(p); }

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
  def_small_head(m, &small_head, py::arg("threads"));
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
  def_saturation(m, &saturation);
}
