#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cuda {

// Bytes of workspace for M rows: normalised rows, and a partial per row and vocabulary chunk; bounded in V.
int64_t exit_stats_workspace(DType head, int64_t rows, int64_t vocab, int64_t width, int32_t topk, bool draws);

// Enqueues the kernels on `stream` (a cudaStream_t) of `device`; every pointer of `p` is device memory. Neither waits
// nor allocates. Throws std::runtime_error with what CUDA said.
void exit_stats(const ExitStatsParams& p, int device, void* stream);

}  // namespace exeunt::cuda
