// What exit_stats does with the products of a tile, whichever pipeline brought them (product.cuh, product_sm90.cuh):
// each thread's four logits of a hidden row -> one ExitStats -> merged over the eight lanes that share the row, then
// over the four warps in order -> a partial per row and vocabulary chunk, with candidates for top-k and draws beside
// it.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/candidates.h"
#include "core/exit_stats.h"
#include "cuda/gumbel.cuh"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"

namespace exeunt::cuda {

// Where things lie in the workspace.
struct ExitStatsWorkspace {
  char* x;          // [rows rounded up to blocks, x_width] of x_dtype
  int64_t x_width;  // D rounded up to whole steps
  DType x_dtype;    // the head's; of hidden where the head is float8_e4m3
  int64_t tiles, tiles_per_chunk, chunks;
  ExitStats* partials;    // [M, chunks]
  Candidate* candidates;  // [M, chunks, slots]: topk lists, then the winner of a draw
  int32_t slots;
};

__device__ __forceinline__ ExitStats shuffle_xor(const ExitStats& s, int lanes) {
  return {__shfl_xor_sync(~0u, s.argmax, lanes), __shfl_xor_sync(~0u, s.top1, lanes),
          __shfl_xor_sync(~0u, s.top2, lanes), __shfl_xor_sync(~0u, s.sumexp, lanes),
          __shfl_xor_sync(~0u, s.weighted, lanes)};
}

__device__ __forceinline__ ExitStats shuffle_down(const ExitStats& s, int lanes) {
  return {__shfl_down_sync(~0u, s.argmax, lanes), __shfl_down_sync(~0u, s.top1, lanes),
          __shfl_down_sync(~0u, s.top2, lanes), __shfl_down_sync(~0u, s.sumexp, lanes),
          __shfl_down_sync(~0u, s.weighted, lanes)};
}

// The k <= 8 largest so far, largest first, always as eight registers; among equals the one that came first.
struct TopK {
  Candidate list[8];
  __device__ TopK() {
#pragma unroll
    for (Candidate& c : list) c = candidate_none();
  }
  __device__ void offer(Candidate c) {
    bool found = false;  // the place of c: from there on, everything moves down by one
#pragma unroll
    for (Candidate& held : list) {
      found = found || c.value > held.value;
      if (!found) continue;
      const Candidate out = held;
      held = c;
      c = out;
    }
  }
};

// The largest of the 32 logits of a row that the lanes of one t hold, at positions first + 8 q; ties to the lowest.
__device__ __forceinline__ Candidate warp_best(const float (&z)[4], int32_t first) {
  Candidate best = candidate_none();
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (z[q] > best.value) best = {z[q], first + 8 * q};
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    const Candidate other = {__shfl_xor_sync(~0u, best.value, lanes), __shfl_xor_sync(~0u, best.id, lanes)};
    if (other.value > best.value || (other.value == best.value && other.id < best.id)) best = other;
  }
  return best;
}

// What four warps do with the products of a tile and a block of hidden rows. A thread's four logits of a row are 8 q +
// g + 32 warp rows into the tile, q = 2 a + b; the accumulators hold them as [a][..][2 b + e] (mma.sync) or, with
// kExchanged, as [b][..][2 a + e] (wgmma). With kScaled each row of the weight has a scale, which `factor` multiplies.
template <int kRows, bool kExchanged = false, bool kScaled = false>
class ExitStatsEpilogue {
 public:
  // Of shared memory, for the constructor's `scratch`.
  static constexpr int scratch_bytes(int slots) {
    return kWarps * kRows * (static_cast<int>(sizeof(ExitStats)) + slots * static_cast<int>(sizeof(Candidate)));
  }

  // The `group`-th four warps of the thread block.
  __device__ ExitStatsEpilogue(const ExitStatsParams& p, const ExitStatsWorkspace& w, int64_t live, int group,
                               char* scratch, float factor = 1.0f)
      : p_(p),
        w_(w),
        live_(live),
        factor_(factor),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) - group * kThreads),
        partials_(reinterpret_cast<ExitStats*>(scratch)),
        candidates_(reinterpret_cast<Candidate*>(partials_ + kWarps * kRows)) {}

  __device__ void operator()(int64_t tile, int64_t block, Accumulator<kRows>& acc) const {
    const int lane = thread_ % 32, warp = thread_ / 32, g = lane / 4, t = lane % 4;
    const int32_t first = static_cast<int32_t>(tile * kTile) + 32 * warp + g;  // position of the first of four
    int64_t id[4];                                                             // rows of the head
    float bias[4], scale[kScaled ? 4 : 1];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int32_t position = first + 8 * q;
      id[q] = position >= p_.vocab ? -1 : p_.columns ? p_.columns[position] : position;
      const bool there = id[q] >= 0 && id[q] < p_.head_rows;
      // A column out of range makes every row NaN: the list cannot be checked without waiting for the device.
      bias[q] = !there              ? std::numeric_limits<float>::quiet_NaN()
                : p_.head_bias.data ? value_at(p_.head_bias.data, p_.head_bias.dtype, id[q] * p_.head_bias.stride)
                                    : 0.0f;
      if constexpr (kScaled) scale[q] = there ? p_.head.scale[id[q]] * factor_ : 1.0f;
    }
    // Registers cannot be indexed, and the body is too long to unroll: the next eight rows' move to j = 0 instead.
#pragma unroll 1
    for (int r = 2 * t; r < kRows && block * kRows + r - 2 * t < live_; r += 8) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t m = block * kRows + r + e;
        float z[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          z[q] = kExchanged ? acc[q & 1][0][2 * (q >> 1) + e] : acc[q >> 1][0][2 * (q & 1) + e];
          if constexpr (kScaled) z[q] *= scale[q];
          z[q] += bias[q];
        }
        row(m, m < live_, z, id, first, warp * kRows + r + e, g == 0);
      }
#pragma unroll
      for (int j = 0; j + 1 < kRows / 8; ++j)
#pragma unroll
        for (int q = 0; q < 8; ++q) acc[q / 4][j][q % 4] = acc[q / 4][j + 1][q % 4];
    }
    ptx::barrier_sync(1 + group_, kThreads);
    const int64_t m = block * kRows + thread_;
    if (thread_ < kRows && m < live_) merge_warps(m * w_.chunks + tile / w_.tiles_per_chunk, tile);
  }

 private:
  // One row's four raw logits of this lane; `at` is its place in the scratch, which the lane that leads writes.
  __device__ void row(int64_t m, bool live, float (&z)[4], const int64_t (&id)[4], int32_t first, int at,
                      bool leads) const {
    if (p_.logits_out && live) {
      const int64_t out = hidden_row(p_, m);
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (out >= 0 && first + 8 * q < p_.vocab)
          store_at(p_.logits_out, p_.logits_dtype, out * p_.logits_stride + first + 8 * q, z[q]);
    }
    const int64_t target = p_.target && live ? p_.target[m] : -1;
    ExitStats s = exit_stats_empty();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int32_t position = first + 8 * q;
      z[q] = position < p_.vocab ? tail(z[q]) : -std::numeric_limits<float>::infinity();
      if (position < p_.vocab && position == target) p_.target_out[m] = z[q];
      s = exit_stats_merge(s, exit_stats_of(z[q], position));
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) s = exit_stats_merge(s, shuffle_xor(s, lanes));
    if (leads) partials_[at] = s;
    Candidate* candidates = candidates_ + at * w_.slots;
    if (p_.seeds) {
      const uint64_t seed = live ? static_cast<uint64_t>(p_.seeds[m]) : 0;
      float noisy[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) noisy[q] = z[q] + gumbel(philox(static_cast<uint32_t>(id[q]), seed));
      const Candidate drawn = warp_best(noisy, first);
      if (leads) candidates[p_.topk] = drawn;
    }
    for (int k = 0; k < p_.topk; ++k) {
      const Candidate best = warp_best(z, first);
      if (leads) candidates[k] = best;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (best.id == first + 8 * q) z[q] = -std::numeric_limits<float>::infinity();
    }
  }

  __device__ float tail(float raw) const {
    const bool finite = raw - raw == 0.0f;  // else it is to flag its row
    if (p_.softcap <= 0.0f || !finite) return raw * (p_.scale / p_.temperature);
    return tanhf(raw * (p_.scale / p_.softcap)) * (p_.softcap / p_.temperature);
  }

  // Row thread_ of the block: what its warps found, joined in order, after what its chunk's earlier tiles gave.
  __device__ void merge_warps(int64_t at, int64_t tile) const {
    const bool begins = tile % w_.tiles_per_chunk == 0;
    ExitStats s = begins ? exit_stats_empty() : w_.partials[at];
    for (int warp = 0; warp < kWarps; ++warp) s = exit_stats_merge(s, partials_[warp * kRows + thread_]);
    w_.partials[at] = s;
    if (!w_.slots) return;
    Candidate* kept = w_.candidates + at * w_.slots;
    TopK top;
    Candidate drawn = begins || !p_.seeds ? candidate_none() : kept[p_.topk];
    for (int k = 0; !begins && k < p_.topk; ++k) top.offer(kept[k]);
    for (int warp = 0; warp < kWarps; ++warp) {
      const Candidate* found = candidates_ + (warp * kRows + thread_) * w_.slots;
      for (int k = 0; k < p_.topk; ++k) top.offer(found[k]);
      if (p_.seeds && found[p_.topk].value > drawn.value) drawn = found[p_.topk];
    }
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k < p_.topk) kept[k] = top.list[k];
    if (p_.seeds) kept[p_.topk] = drawn;
  }

  const ExitStatsParams& p_;
  const ExitStatsWorkspace& w_;
  int64_t live_;
  float factor_;
  int group_, thread_;     // thread_ within its group
  ExitStats* partials_;    // [kWarps, kRows]
  Candidate* candidates_;  // [kWarps, kRows, slots]
};

}  // namespace exeunt::cuda
