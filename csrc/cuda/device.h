#pragma once
#include <string>

namespace exeunt::cuda {

// CUDA devices that can be used now; 0 where there is no driver or no device.
int device_count();

// Compute capability of a device, for example 90.
int compute_capability(int device);

// Version of the CUDA runtime this module was built with, for example 13000.
int runtime_version();

// The architectures that this module holds kernels for, as CMake names them: "80-real 90a-real 80-virtual".
std::string built_archs();

}  // namespace exeunt::cuda
