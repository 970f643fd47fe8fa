// Which rows of a batch go on, and back to their places, without the host knowing how many they are.
//
//   compact   one thread block walks over the mask, 128 rows at a time: a ballot a warp, the four warps' sums in shared
//             memory; chosen rows come first, the others behind them, both in their order
//   expand    a thread block per row copies it from the compacted rows or, where it was not chosen, from the old ones
#pragma once
#include <cstdint>

#include "cuda/product.cuh"

namespace exeunt::cuda {

static __global__ void __launch_bounds__(kThreads)
    compact_kernel(const uint8_t* mask, int64_t stride, int64_t n, int64_t* rows, int64_t* count) {
  int* found = reinterpret_cast<int*>(ptx::dynamic_shared());  // [2][kWarps], in turn
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t chosen = 0;
  for (int pass = 0; pass < 2; ++pass) {  // the first one counts
    int64_t before = 0;
    for (int64_t base = 0, turn = 0; base < n; base += kThreads, ++turn) {
      const int64_t i = base + threadIdx.x;
      const bool mine = i < n && mask[i * stride] != 0;
      const uint32_t ballot = __ballot_sync(~0u, mine);
      int* sums = found + (turn + pass) % 2 * kWarps;
      if (lane == 0) sums[warp] = __popc(ballot);
      __syncthreads();
      int64_t at = before + __popc(ballot & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) at += sums[w];
        before += sums[w];
      }
      if (pass == 1 && i < n) rows[mine ? at : chosen + i - at] = i;
    }
    chosen = before;
    __syncthreads();  // before the sums of the next pass
  }
  if (threadIdx.x == 0) *count = chosen;
}

// Row rows[i] of out = row i of `compacted` for i < count, of `into` otherwise; `rows` is a permutation.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const int64_t* rows, const int64_t* count, const Word* compacted, const Word* into, Word* out,
                  int64_t words) {
  const int64_t i = blockIdx.x, row = rows[i];
  const Word* from = i < *count ? compacted + i * words : into + row * words;
  for (int64_t w = threadIdx.x; w < words; w += kThreads) out[row * words + w] = from[w];
}

}  // namespace exeunt::cuda
