// _cuda: so far it only says what it was built with and what it finds; kernels follow with the CUDA backend.
#include <pybind11/pybind11.h>

#include "cuda/device.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of exeunt.";
  m.def("device_count", &exeunt::cuda::device_count, "CUDA devices that can be used now.");
  m.def("runtime_version", &exeunt::cuda::runtime_version, "CUDA runtime this module was built with.");
}
