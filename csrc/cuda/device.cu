#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace exeunt::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int compute_capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int runtime_version() { return CUDART_VERSION; }

std::string built_archs() { return EXEUNT_CUDA_ARCHS; }

}  // namespace exeunt::cuda
