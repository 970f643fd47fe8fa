// What the launchers of exit_stats share.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "cuda/exit_stats_epilogue.cuh"
#include "cuda/launch.h"

namespace exeunt::cuda {

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

inline int block_rows(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Whether the kernels for Hopper are there for that device and take this head.
bool sm90_takes(const ExitStatsParams& p, int device);

// The product of rows that were normalised to the workspace, on Hopper.
void exit_stats_sm90(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target);

}  // namespace exeunt::cuda
