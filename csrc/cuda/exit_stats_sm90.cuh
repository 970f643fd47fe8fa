// exit_stats on Hopper: the pipeline of product_sm90.cuh with the epilogue of exit_stats.cuh.
#pragma once
#include "cuda/exit_stats_epilogue.cuh"
#include "cuda/product_sm90.cuh"

namespace exeunt::cuda {

// x: [rows rounded up to blocks, D rounded up to whole steps] in the workspace. Grid: persistent.
template <class T, int kRows>
__global__ void __launch_bounds__(Sm90<kRows>::kBlockThreads, Sm90<kRows>::kBlocks)
    exit_stats_sm90_kernel([[maybe_unused]] const __grid_constant__ ExitStatsParams p,
                           [[maybe_unused]] const __grid_constant__ ExitStatsWorkspace w,
                           [[maybe_unused]] const __grid_constant__ CUtensorMap head,
                           [[maybe_unused]] const __grid_constant__ CUtensorMap x) {
#if defined(EXEUNT_CUDA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Sm90<kRows>;
  char* shared = ptx::dynamic_shared();
  uint64_t *full = reinterpret_cast<uint64_t*>(shared + S::kBarriers), *empty = full + S::kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, S::kGroups * kWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const int64_t live = live_rows(p), lines = w.x_width * static_cast<int64_t>(sizeof(T)) / kLine;
  const Jobs jobs(w.tiles, w.tiles_per_chunk, (live + kRows - 1) / kRows, S::kGroups);
  const int group = static_cast<int>(threadIdx.x) / kThreads;
  if (group == S::kGroups) {
    if constexpr (S::kGroups > 1) ptx::registers_down_to<24>();
    if (threadIdx.x % kThreads == 0) produce<T, kRows>(head, x, jobs, lines, shared, full, empty);
    return;
  }
  if constexpr (S::kGroups > 1) ptx::registers_up_to<240>();
  using Epilogue = ExitStatsEpilogue<kRows, true>;
  const Epilogue epilogue(p, w, live, group, shared + S::kScratch + group * Epilogue::scratch_bytes(w.slots));
  consume<T, kRows>(jobs, lines, group, shared, full, empty, epilogue);
#endif
}

}  // namespace exeunt::cuda
