// exit_stats on CUDA: the streaming product (product.cuh) with statistics as its epilogue, in three launches.
//
//   normalise   rows -> x in the workspace, rounded once to the head's dtype
//   exit_stats  tile of 128 vocabulary rows -> bias, logits_out, scale, softcap, temperature on the products in their
//               registers -> one partial per row and vocabulary chunk           (exit_stats_epilogue.cuh; on Hopper
//               exit_stats_sm90.cuh)
//   finish      one warp per row merges its partials in order and writes the result
//
// Which logits meet in which order depends on V alone, so a row has the same bits in any batch. No launch depends on
// data: counts, row lists and columns are read from device memory, so all of it may be captured in a graph.
#pragma once
#include "cuda/exit_stats_epilogue.cuh"

namespace exeunt::cuda {

// Row blockIdx.x of x [.., x_width], x_width being D padded with zeros. Rows that are not live are zeros, a row whose
// index is out of range is NaN.
static __global__ void __launch_bounds__(kThreads)
    normalise_kernel(const __grid_constant__ ExitStatsParams p, const __grid_constant__ ExitStatsWorkspace w) {
  const int64_t m = blockIdx.x, x_width = w.x_width;
  const bool fp8 = p.head.dtype == DType::float8_e4m3;
  const bool live = m < live_rows(p);
  const int64_t row = live ? hidden_row(p, m) : -1;
  const auto write = [&](int64_t d, float value) {
    store_at(w.x, w.x_dtype, m * x_width + (fp8 ? fp8_place(d) : d), value);
  };
  for (int64_t d = (row < 0 ? 0 : p.width) + threadIdx.x; d < x_width; d += kThreads)
    write(d, live && d < p.width ? std::numeric_limits<float>::quiet_NaN() : 0.0f);
  if (row >= 0)
    normalise(p.hidden, p.hidden_dtype, row * p.hidden_stride, p.width, p.norm,
              reinterpret_cast<double*>(ptx::dynamic_shared()), write);
}

// The rows that a tile of the vocabulary stands for: those of the head, or of them the ones that `columns` lists.
struct HeadSource {
  using Jobs = cuda::Jobs;

  const char* data;
  int64_t stride;
  const int64_t* columns;
  int64_t rows, bound;  // of the vocabulary, of the head
  const char* x;
  int64_t block_bytes;  // of a block of hidden rows

  __device__ const char* weight_row(const Jobs& jobs, int r) const {
    const int64_t position = jobs.tile * kTile + r;
    const int64_t row = position >= rows ? -1 : columns ? columns[position] : position;
    return row >= 0 && row < bound ? data + row * stride : nullptr;
  }
  __device__ const char* hidden_rows(const Jobs& jobs) const { return x + jobs.block * block_bytes; }
  __device__ bool aligned(const Jobs&) const {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride)) % 16 == 0;
  }
};

template <class W, class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    exit_stats_kernel(const __grid_constant__ ExitStatsParams p, const __grid_constant__ ExitStatsWorkspace w) {
  char* shared = ptx::dynamic_shared();
  const int64_t live = live_rows(p);
  const Jobs jobs(w.tiles, w.tiles_per_chunk, (live + kRows - 1) / kRows);
  const int64_t x_stride = w.x_width * static_cast<int64_t>(sizeof(T));
  const HeadSource source{
      static_cast<const char*>(p.head.data), p.head.row_stride, p.columns, p.vocab, p.head_rows, w.x, kRows * x_stride};
  Loader<W, T, kRows, HeadSource> loader(source, jobs, p.width * static_cast<int64_t>(sizeof(W)), x_stride);
  constexpr bool kScaled = sizeof(W) == 1;
  const ExitStatsEpilogue<kRows, false, kScaled> epilogue(
      p, w, live, 0, shared + kStages<kRows> * kStageBytes<kRows, kRowLines<W, T>>, kScaled ? fp8_factor<T>() : 1.0f);
  product(loader, jobs, shared, [&](const Jobs& job, Accumulator<kRows>& acc) { epilogue(job.tile, job.block, acc); });
}

// One warp per row: each lane merges its run of chunks, then neighbours join, always the earlier with the later.
static __global__ void __launch_bounds__(32)
    finish_kernel(const __grid_constant__ ExitStatsParams p, const __grid_constant__ ExitStatsWorkspace w) {
  const int64_t m = blockIdx.x, run = (w.chunks + 31) / 32;
  const int64_t begin = threadIdx.x * run, chunks = m < live_rows(p) ? w.chunks : 0;
  ExitStats s = exit_stats_empty();
  TopK top;
  Candidate drawn = candidate_none();
  for (int64_t c = begin; c < begin + run && c < chunks; ++c) {
    s = exit_stats_merge(s, w.partials[m * w.chunks + c]);
    const Candidate* found = w.candidates + (m * w.chunks + c) * w.slots;
    for (int k = 0; k < p.topk; ++k) top.offer(found[k]);
    if (p.seeds && found[p.topk].value > drawn.value) drawn = found[p.topk];
  }
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    s = exit_stats_merge(s, shuffle_down(s, lanes));
    const Candidate later = {__shfl_down_sync(~0u, drawn.value, lanes), __shfl_down_sync(~0u, drawn.id, lanes)};
    if (later.value > drawn.value) drawn = later;
    if (!p.topk) continue;
    Candidate theirs[8];
#pragma unroll
    for (int k = 0; k < 8; ++k)
      theirs[k] = {__shfl_down_sync(~0u, top.list[k].value, lanes), __shfl_down_sync(~0u, top.list[k].id, lanes)};
#pragma unroll
    for (int k = 0; k < 8; ++k) top.offer(theirs[k]);
  }
  if (threadIdx.x != 0) return;
  s = exit_stats_finish(s);
  const bool flagged = s.argmax < 0;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto id = [&](int32_t at) { return at < 0 ? int64_t{-1} : p.columns ? p.columns[at] : int64_t{at}; };
  p.argmax[m] = id(s.argmax);
  p.top1[m] = s.top1;
  p.top2[m] = s.top2;
  p.sumexp[m] = s.sumexp;
  p.weighted[m] = p.entropy ? s.weighted : nan;
  if (p.target && (flagged || p.target[m] < 0 || p.target[m] >= p.vocab)) p.target_out[m] = nan;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k >= p.topk) break;
    p.topk_logits[m * p.topk + k] = flagged ? nan : top.list[k].value;
    p.topk_ids[m * p.topk + k] = flagged ? -1 : id(top.list[k].id);
  }
  if (p.seeds) p.sample[m] = flagged ? -1 : id(drawn.id);
}

}  // namespace exeunt::cuda
