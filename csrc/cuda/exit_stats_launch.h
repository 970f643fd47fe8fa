// What the launchers of exit_stats share.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "cuda/exit_stats_epilogue.cuh"
#include "cuda/launch.h"

namespace exeunt::cuda {

inline int block_rows(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Whether the kernels for Hopper are there for that device and take this head.
bool sm90_takes(const ExitStatsParams& p, int device);

// The product of rows that were normalised to the workspace, on Hopper.
void exit_stats_sm90(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target);

}  // namespace exeunt::cuda
