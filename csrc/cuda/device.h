#pragma once

namespace exeunt::cuda {

// CUDA devices that can be used now; 0 where there is no driver or no device.
int device_count();

// Version of the CUDA runtime this module was built with, for example 13000.
int runtime_version();

}  // namespace exeunt::cuda
