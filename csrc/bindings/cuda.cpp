// _cuda: integers and device pointers in, nothing decided. The Python layer has checked every shape, dtype and device.
// Built against tests/cuda_on_cpu the same file is _cuda_emu, whose "device" memory is the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/exit_stats.h"
#include "cuda/device.h"
#include "cuda/exit_stats.h"

#ifdef EXEUNT_CUDA_EMULATED
#include "bindings.h"
#define EXEUNT_MODULE _cuda_emu
#else
#define EXEUNT_MODULE _cuda
#endif

using namespace exeunt;

namespace {

void exit_stats(const ExitStatsParams& p, int device, uintptr_t stream) {
  try {
    cuda::exit_stats(p, device, reinterpret_cast<void*>(stream));
  } catch (const std::runtime_error& e) {
    const auto shape = [](int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; };
    throw std::runtime_error("exit_stats: hidden " + shape(p.hidden_rows, p.width) + ", " + std::to_string(p.rows) +
                             " rows checked, head " + shape(p.head_rows, p.width) +
                             ", on cuda:" + std::to_string(device) + ": " + e.what());
  }
}

}  // namespace

PYBIND11_MODULE(EXEUNT_MODULE, m) {
  m.doc() = "CUDA kernels of exeunt: plain pointers and integers, validated by exeunt.ops.";
  m.attr("version") = EXEUNT_VERSION;
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
#ifdef EXEUNT_CUDA_EMULATED
  bind_emulation(m);
#endif
}
