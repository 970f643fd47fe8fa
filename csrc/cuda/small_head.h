#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cuda {

// Bytes of workspace: normalised rows, and pooled ones.
int64_t small_head_workspace(const SmallHeadParams& p);

// Enqueue on `stream` (a cudaStream_t) of `device`; every pointer is device memory. Neither waits nor allocates. Throw
// std::runtime_error with what CUDA said.
void small_head(const SmallHeadParams& p, int device, void* stream);
void saturation(const SaturationParams& p, int device, void* stream);

}  // namespace exeunt::cuda
