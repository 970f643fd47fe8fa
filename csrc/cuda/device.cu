#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace exeunt::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace exeunt::cuda
