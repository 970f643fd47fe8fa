// The streaming product on CUDA: a few hidden rows times a weight that is read once.
//
//   weight  [V, D]  tile = 128 rows, 32 a warp          hidden rows  [N, D]  block = 8, 16, 32 or 64 of them
//   step    128 bytes of D: [128][128 B] of the weight and [rows][128 B] of the hidden rows, one pipeline stage
//
// The weight is the M side of the tensor cores' product, so that its 16-row fragments are always full and hidden rows
// fill the N side in eights. Thread (g, t) = (lane / 4, lane % 4) of a warp holds, for i < 2 and each j,
//
//   acc[i][j][q] = weight row 32 warp + 16 i + 8 (q >> 1) + g  times  hidden row 8 j + 2 t + (q & 1)
//
// in the layout of mma.m16n8k16; the float32 product (multiply-add, no tf32) keeps the same one. A thread block is
// persistent: its pipeline runs on from tile to tile, so that while one tile's epilogue computes, the next tile is on
// its way. Each product is one chain over D, whatever the number of rows: a row's bits do not depend on its batch.
//
// A weight of float8_e4m3 is widened on its way from shared memory to the tensor cores, exactly. A step is then 128
// elements: 128 bytes of each weight row and two lines of each hidden row, in an order in which four neighbours of a
// weight row, which one matrix load brings a thread, meet what mma.sync multiplies them with (fp8_place).
//
// Hazards: a stage is filled again only after the barrier that follows its use; a thread's own wait comes before that
// barrier, so behind it the stage of everybody is complete. Rows past the end of the weight and bytes past the end of D
// are zeros, which the epilogue must mask.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/params.h"
#include "cuda/ptx.cuh"

namespace exeunt::cuda {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kTile = 128;  // weight rows
constexpr int kLine = 128;  // bytes of each row in a step

// Lines of a hidden row, of elements T, beside one of a weight row, of elements W.
template <class W, class T>
inline constexpr int kRowLines = static_cast<int>(sizeof(T) / sizeof(W));

// Two blocks of 32 rows and more fit a multiprocessor with three stages, fewer rows with four.
template <int kRows>
inline constexpr int kStages = kRows >= 32 ? 3 : 4;
template <int kRows, int kLines = 1>
inline constexpr int kStageBytes = (kTile + kLines * kRows) * kLine;

// Where element d of a hidden row lies that meets a weight of float8_e4m3: within sixteen, elements 4 t .. 4 t + 3 are
// what thread t of mma.m16n8k16 holds, at 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
__device__ __forceinline__ int64_t fp8_place(int64_t d) {
  return (d & ~int64_t{15}) + (d >> 1 & 6) + (d & 1) + (d << 2 & 8);
}

// Four numbers of float8_e4m3 as two pairs of T, divided by fp8_factor<T>(). NaN stays NaN.
template <class T>
__device__ __forceinline__ void widen(uint32_t four, uint32_t& low, uint32_t& high) {
  const auto pair = [](uint32_t v) {  // of numbers in the low bytes of its halves
    const uint32_t magnitude = v & 0x007f007fu, sign = (v & 0x00800080u) << 8;
    const uint32_t nan = (magnitude + 0x00010001u) & 0x00800080u;
    if constexpr (std::is_same_v<T, Float16>)
      return sign | magnitude << 7 | nan << 7;
    else
      return ptx::multiply_bf16x2(sign | magnitude << 4 | (nan << 4) * 15, 0x7b807b80u);  // 2^120
  };
  low = pair((four & 0xffu) | (four & 0xff00u) << 8);
  high = pair((four >> 16 & 0xffu) | (four >> 8 & 0xff0000u));
}
template <class T>
__device__ __forceinline__ constexpr float fp8_factor() {
  return std::is_same_v<T, Float16> ? 256.0f : 1.0f;
}

// Where 16-byte chunk `chunk` of a row lies in a stage: exchanged among the row's eight so that the same chunk of eight
// successive rows, which one matrix load or eight lanes read together, lies in all 32 banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * kLine + ((chunk ^ (row & 7)) << 4); }

// 16 bytes to shared memory, of which the first `bytes` come from `from` and the rest are zeros. What no 16-byte access
// may touch is read element by element, at once.
template <class T>
__device__ __forceinline__ void copy_16(char* to, const char* from, int bytes, bool aligned) {
  if (aligned) {
    ptx::cp_async_16(to, from, bytes);
    return;
  }
  constexpr int kElements = 16 / sizeof(T);
  T element[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    element[e] = e * static_cast<int>(sizeof(T)) < bytes ? reinterpret_cast<const T*>(from)[e] : T{};
  uint4 words;
  memcpy(&words, element, 16);
  *reinterpret_cast<uint4*>(to) = words;
}

// The (tile, row block) pairs that a thread block works through: an item is a chunk of the vocabulary, tile by tile,
// for one block of rows; row blocks of one chunk are neighbours, so that all but the first find the weight in L2.
// With `at_once` 2, an item is two successive chunks, whose tiles go side by side: `tile` is the first one's, the
// second one's lies tiles_per_chunk further, past the end where there is none.
struct Jobs {
  int64_t tiles, tiles_per_chunk, blocks, at_once, items;
  int64_t item = 0, block = 0, tile = 0, end = 0;

  __device__ Jobs(int64_t tiles_, int64_t tiles_per_chunk_, int64_t blocks_, int64_t at_once_ = 1)
      : tiles(tiles_),
        tiles_per_chunk(tiles_per_chunk_),
        blocks(blocks_),
        at_once(at_once_),
        items((tiles + at_once * tiles_per_chunk - 1) / (at_once * tiles_per_chunk) * blocks) {
    start(blockIdx.x);
  }
  __device__ bool done() const { return item >= items; }
  __device__ void start(int64_t i) {
    item = i;
    if (done()) return;
    block = item % blocks;
    tile = item / blocks * at_once * tiles_per_chunk;
    end = tile + tiles_per_chunk < tiles ? tile + tiles_per_chunk : tiles;
  }
  __device__ void next() {
    if (++tile == end) start(item + gridDim.x);
  }
};

// Fills stages, running ahead of the product: a weight of elements W, hidden rows of elements T. `Source` says where
// they lie, for its `Jobs`:
//
//   weight_row(jobs, r)   address of row r of the job's tile, row_bytes long; nullptr: zeros
//   hidden_rows(jobs)     address of the first of the job's kRows hidden rows, x_stride bytes apart, 16-byte aligned
//   and
//                         padded with zeros to whole steps
//   aligned(jobs)         whether all of the tile's rows begin at a multiple of 16 bytes
template <class W, class T, int kRows, class Source>
class Loader {
 public:
  using Jobs = typename Source::Jobs;

  __device__ Loader(const Source& source, const Jobs& jobs, int64_t row_bytes, int64_t x_stride)
      : source_(source), jobs_(jobs), row_bytes_(row_bytes), x_stride_(x_stride) {
    aim();
  }

  __device__ int64_t lines() const { return (row_bytes_ + kLine - 1) / kLine; }

  // Starts the copies of the next step into `stage`, and closes a group over them; an empty one when all is done.
  __device__ void issue(char* stage) {
    if (!jobs_.done()) {
      const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
      const int64_t offset = line_ * kLine + chunk * 16, left = row_bytes_ - offset;
      const int bytes = left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        copy_16<W>(stage + chunk_at(row + i * kRowsAtOnce, chunk), row_[i] && bytes ? row_[i] + offset : x_,
                   row_[i] ? bytes : 0, aligned_);
      const char* x = x_ + line_ * kLines * kLine + chunk * 16;
#pragma unroll
      for (int line = 0; line < kLines; ++line)
#pragma unroll
        for (int r = row; r < kRows; r += kRowsAtOnce)
          ptx::cp_async_16(stage + (kTile + line * kRows) * kLine + chunk_at(r, chunk),
                           x + r * x_stride_ + line * kLine, 16);
      if (++line_ == lines()) {
        line_ = 0;
        jobs_.next();
        aim();
      }
    }
    ptx::cp_async_commit();
  }

 private:
  static constexpr int kRowsAtOnce = kThreads / 8, kPasses = kTile / kRowsAtOnce, kLines = kRowLines<W, T>;

  // Finds the rows of the job's tile that this thread copies from.
  __device__ void aim() {
    if (jobs_.done()) return;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) row_[i] = source_.weight_row(jobs_, threadIdx.x / 8 + i * kRowsAtOnce);
    x_ = source_.hidden_rows(jobs_);
    aligned_ = source_.aligned(jobs_);
  }

  Source source_;
  Jobs jobs_;
  int64_t row_bytes_, x_stride_;
  bool aligned_ = false;
  int64_t line_ = 0;
  const char* x_ = nullptr;
  const char* row_[kPasses];
};

template <int kRows>
using Accumulator = float[2][kRows / 8][4];

// One stage's share of the products.
template <class W, class T, int kRows>
__device__ __forceinline__ void multiply(Accumulator<kRows>& acc, const char* stage) {
  const char* rows = stage + kTile * kLine;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32;
  if constexpr (sizeof(T) == 4) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int chunk = 0; chunk < 8; ++chunk) {
      float4 a[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) a[q] = *reinterpret_cast<const float4*>(stage + chunk_at(first + 8 * q + g, chunk));
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = *reinterpret_cast<const float4*>(rows + chunk_at(8 * j + 2 * t + e, chunk));
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float& z = acc[q >> 1][j][2 * (q & 1) + e];
            z = __fmaf_rn(a[q].x, b.x, z);
            z = __fmaf_rn(a[q].y, b.y, z);
            z = __fmaf_rn(a[q].z, b.z, z);
            z = __fmaf_rn(a[q].w, b.w, z);
          }
        }
    }
  } else {
#pragma unroll
    for (int part = 0; part < 2 * kRowLines<W, T>; ++part) {  // 32 elements of D: two steps of the tensor cores
      const int half = part % 2;
      uint32_t a[2][2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (sizeof(W) == 1) {
          uint32_t fours[4];
          ptx::ldmatrix_x4(fours, stage + chunk_at(first + 16 * i + lane % 16, 2 * part + lane / 16));
#pragma unroll
          for (int q = 0; q < 4; ++q) widen<T>(fours[q], a[q / 2][i][q % 2], a[q / 2][i][q % 2 + 2]);
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k)
            ptx::ldmatrix_x4(a[k][i], stage + chunk_at(first + 16 * i + lane % 16, 4 * half + 2 * k + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, rows + part / 2 * kRows * kLine + chunk_at(8 * j + lane % 8, 4 * half + lane / 8));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t bk[2] = {b[2 * k], b[2 * k + 1]};
#pragma unroll
          for (int i = 0; i < 2; ++i) ptx::mma<T>(acc[i][j], a[k][i], bk);
        }
      }
    }
  }
}

// Runs the thread block's jobs: epilogue(job, acc) after each tile. `shared` holds kStages<kRows> stages. The
// epilogue may use shared memory of its own: between two calls of it lies at least one barrier.
template <class W, class T, int kRows, class Source, class Epilogue>
__device__ __forceinline__ void product(Loader<W, T, kRows, Source>& loader, typename Source::Jobs jobs, char* shared,
                                        Epilogue epilogue) {
  constexpr int kLast = kStages<kRows> - 1, kBytes = kStageBytes<kRows, kRowLines<W, T>>;
  for (int s = 0; s < kLast; ++s) loader.issue(shared + s * kBytes);
  int current = 0;
  for (; !jobs.done(); jobs.next()) {
    Accumulator<kRows> acc = {};
    for (int64_t line = 0; line < loader.lines(); ++line) {
      ptx::cp_async_wait<kLast - 1>();
      __syncthreads();
      loader.issue(shared + (current == 0 ? kLast : current - 1) * kBytes);
      multiply<W, T, kRows>(acc, shared + current * kBytes);
      current = current == kLast ? 0 : current + 1;
    }
    epilogue(jobs, acc);
  }
  ptx::cp_async_wait<0>();
}

}  // namespace exeunt::cuda
