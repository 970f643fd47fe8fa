#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cuda {

// Bytes of workspace for N rows that are filled in at up to `layers` layers.
int64_t kv_fill_workspace(DType dtype, int64_t rows, int64_t width, int64_t layers);

// Enqueues the kernels on `stream` (a cudaStream_t) of `device`. Neither waits nor allocates. Rows whose layer or place
// lies outside are left out: nobody can refuse them without waiting. Throws std::runtime_error with what CUDA said.
void kv_fill(const KvFillParams& p, int device, void* stream);

}  // namespace exeunt::cuda
