// _cuda: integers and device pointers in, nothing decided. The Python layer has checked every shape, dtype and device.
// Built against tests/cuda_on_cpu the same file is _cuda_emu, whose "device" memory is the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/exit_stats.h"
#include "bindings/kv_fill.h"
#include "bindings/ragged_attention.h"
#include "bindings/small_head.h"
#include "cuda/compact.h"
#include "cuda/device.h"
#include "cuda/exit_stats.h"
#include "cuda/kv_fill.h"
#include "cuda/ragged_attention.h"
#include "cuda/small_head.h"

#ifdef EXEUNT_CUDA_EMULATED
#include "bindings.h"
#define EXEUNT_MODULE _cuda_emu
#else
#define EXEUNT_MODULE _cuda
#endif

using namespace exeunt;

namespace {

std::string shape(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

// run(), and what it throws with the op, its shapes and the device before it.
template <class Run, class Say>
void named(int device, Say say, Run run) {
  try {
    run();
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(say() + ", on cuda:" + std::to_string(device) + ": " + e.what());
  }
}

void exit_stats(const ExitStatsParams& p, int device, uintptr_t stream) {
  const auto say = [&] {
    return "exit_stats: hidden " + shape(p.hidden_rows, p.width) + ", " + std::to_string(p.rows) +
           " rows checked, head " + shape(p.head_rows, p.width);
  };
  named(device, say, [&] { cuda::exit_stats(p, device, reinterpret_cast<void*>(stream)); });
}

void small_head(SmallHeadParams& p, uintptr_t workspace, int device, uintptr_t stream) {
  p.workspace = reinterpret_cast<void*>(workspace);
  const auto say = [&] {
    return "small_head: hidden " + shape(p.rows, p.width) +
           (p.pooled ? ", pooler " + shape(p.pooler.outputs, p.pooler.inputs) : "") + ", weight " +
           shape(p.head.outputs, p.head.inputs);
  };
  named(device, say, [&] { cuda::small_head(p, device, reinterpret_cast<void*>(stream)); });
}

void saturation(const SaturationParams& p, int device, uintptr_t stream) {
  const auto say = [&] { return "saturation: hidden and previous " + shape(p.rows, p.width); };
  named(device, say, [&] { cuda::saturation(p, device, reinterpret_cast<void*>(stream)); });
}

void ragged_attention(RaggedAttentionParams& p, int device, uintptr_t stream) {
  const auto say = [&] {
    return "ragged_attention: " + std::to_string(p.tokens) + " queries of " + std::to_string(p.entries) +
           " entries, heads " + shape(p.heads, p.size) + " over " + shape(p.kv_heads, p.value_size);
  };
  named(device, say, [&] { cuda::ragged_attention(p, device, reinterpret_cast<void*>(stream)); });
}

void compact(uintptr_t mask, int64_t stride, int64_t n, uintptr_t rows, uintptr_t count, int device, uintptr_t stream) {
  const auto say = [&] { return "compact: mask [" + std::to_string(n) + "]"; };
  named(device, say, [&] {
    cuda::compact(reinterpret_cast<const void*>(mask), stride, n, reinterpret_cast<int64_t*>(rows),
                  reinterpret_cast<int64_t*>(count), device, reinterpret_cast<void*>(stream));
  });
}

void expand(uintptr_t rows, uintptr_t count, uintptr_t compacted, uintptr_t into, uintptr_t out, int64_t n,
            int64_t row_bytes, int device, uintptr_t stream) {
  const auto say = [&] { return "expand: " + std::to_string(n) + " rows of " + std::to_string(row_bytes) + " bytes"; };
  named(device, say, [&] {
    cuda::expand(reinterpret_cast<const int64_t*>(rows), reinterpret_cast<const int64_t*>(count),
                 reinterpret_cast<const void*>(compacted), reinterpret_cast<const void*>(into),
                 reinterpret_cast<void*>(out), n, row_bytes, device, reinterpret_cast<void*>(stream));
  });
}

void kv_fill(const KvFill&, KvFillParams& p, int device, uintptr_t stream) {
  py::gil_scoped_release release;
  const auto say = [&] {
    return "kv_fill: hidden " + shape(p.rows, p.width) + ", " + std::to_string(p.until) + " layers of " +
           std::to_string(p.heads) + " heads of " + std::to_string(p.head_size);
  };
  named(device, say, [&] { cuda::kv_fill(p, device, reinterpret_cast<void*>(stream)); });
}

// As much as small_head will need, from the sizes alone.
int64_t small_head_workspace(int dtype, int64_t rows, int64_t width, int64_t pooled) {
  SmallHeadParams p{};
  p.rows = rows;
  p.width = width;
  p.pooled = pooled > 0;
  p.pooler.outputs = pooled;
  p.pooler.weight.dtype = p.head.weight.dtype = static_cast<DType>(dtype);
  return cuda::small_head_workspace(p);
}

}  // namespace

PYBIND11_MODULE(EXEUNT_MODULE, m) {
  m.doc() = "CUDA kernels of exeunt: plain pointers and integers, validated by exeunt.ops.";
  m.attr("version") = EXEUNT_VERSION;
  m.attr("takes_float8") = true;
  m.def("device_count", &cuda::device_count, "CUDA devices that can be used now.");
  m.def("compute_capability", &cuda::compute_capability, py::arg("device"), "Of a device, for example 90.");
  m.def("runtime_version", &cuda::runtime_version, "CUDA runtime this module was built with.");
  m.def("built_archs", &cuda::built_archs, "Architectures that this module holds kernels for, as CMake names them.");
  m.def(
      "exit_stats_workspace",
      [](int head, int64_t rows, int64_t vocab, int64_t width, int topk, bool draws) {
        return cuda::exit_stats_workspace(static_cast<DType>(head), rows, vocab, width, topk, draws);
      },
      py::arg("head_dtype"), py::arg("rows"), py::arg("vocab"), py::arg("width"), py::arg("topk"), py::arg("draws"),
      "Bytes of workspace that exit_stats needs.");
  def_exit_stats(m, &exit_stats, py::arg("device"), py::arg("stream"));
  m.def("small_head_workspace", &small_head_workspace, py::arg("dtype"), py::arg("rows"), py::arg("width"),
        py::arg("pooled"), "Bytes of workspace that small_head needs.");
  def_small_head(m, &small_head, py::arg("workspace"), py::arg("device"), py::arg("stream"));
  def_saturation(m, &saturation, py::arg("device"), py::arg("stream"));
  def_kv_fill(m, &kv_fill, py::arg("device"), py::arg("stream"))
      .def(
          "workspace",
          [](const KvFill& stack, int64_t rows) {
            return cuda::kv_fill_workspace(stack.p.dtype, rows, stack.p.width, stack.layers);
          },
          py::arg("rows"), "Bytes of workspace for that many rows.");
  m.attr("largest_head") = cuda::kLargestHead;
  m.def("ragged_attention_workspace", &cuda::ragged_attention_workspace, py::arg("tokens"), py::arg("heads"),
        py::arg("kv_heads"), py::arg("entries"), py::arg("room"), py::arg("value_size"),
        "Bytes of workspace that ragged_attention needs.");
  def_ragged_attention(m, &ragged_attention, py::arg("device"), py::arg("stream"));
  m.def("compact", &compact, py::arg("mask"), py::arg("stride"), py::arg("n"), py::arg("rows"), py::arg("count"),
        py::arg("device"), py::arg("stream"), "Rows of a mask first; see exeunt.ops.compact.");
  m.def("expand", &expand, py::arg("rows"), py::arg("count"), py::arg("compacted"), py::arg("into"), py::arg("out"),
        py::arg("n"), py::arg("row_bytes"), py::arg("device"), py::arg("stream"),
        "Rows back in their places; see exeunt.ops.expand.");
#ifdef EXEUNT_CUDA_EMULATED
  bind_emulation(m);
#endif
}
