#pragma once
#include <cstdint>

namespace exeunt::cuda {

// rows [n]: those where mask (bytes, `stride` apart) is not 0, then the others; count: how many were. Both of these
// enqueue on `stream` (a cudaStream_t) of `device`, on device memory, and throw std::runtime_error with what CUDA said.
void compact(const void* mask, int64_t stride, int64_t n, int64_t* rows, int64_t* count, int device, void* stream);

// out = into with its rows rows[0..count) replaced by the first of `compacted`; all [n, row_bytes].
void expand(const int64_t* rows, const int64_t* count, const void* compacted, const void* into, void* out, int64_t n,
            int64_t row_bytes, int device, void* stream);

}  // namespace exeunt::cuda
