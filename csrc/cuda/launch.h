// Launches whose errors become exceptions, on a device that is current for as long as they take; what launchers share.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.h"

namespace exeunt::cuda {

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
inline int64_t parts(int64_t value, int64_t part) { return (value + part - 1) / part; }

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string what = cudaGetErrorString(error);
  cudaGetLastError();  // so that the next call does not report it again
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
    what += "; this build has kernels for " + built_archs();
  throw std::runtime_error(what);
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device == before_) return;
    check(cudaSetDevice(device));
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Where a launch goes, and what there is to share among its thread blocks.
struct Target {
  cudaStream_t stream;
  int multiprocessors, shared, block_shared;  // bytes of shared memory of a multiprocessor, of a block at most

  Target(int device, cudaStream_t stream_)
      : stream(stream_),
        multiprocessors(attribute(cudaDevAttrMultiProcessorCount, device)),
        shared(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)),
        block_shared(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {}

  // Thread blocks that run at once, at most so many to a multiprocessor. A block leaves a kilobyte to the system.
  int64_t resident(int bytes, int at_most) const {
    return int64_t{std::clamp(shared / (bytes + 1024), 1, at_most)} * multiprocessors;
  }
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
            Args&&... args) {
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

}  // namespace exeunt::cuda
