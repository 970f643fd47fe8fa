// ragged_attention's job, what a warp does with a slot: scores, their weights, the weighted values.
//
// Thread (g, t) = (lane / 4, lane % 4) holds, of scores and results alike, vectors g and g + 8 of its fragment and
// columns 8 n + 2 t + {0, 1}: the layout of a product's result is that of the next one's A operand, so weights stay in
// their registers. float32 keeps that layout with multiply-adds; queries then come from L1, weights by shuffles.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/ragged_schedule.cuh"

namespace exeunt::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the maximum of no scores

struct RaggedVector {  // of a tile, as all warps need it
  int64_t bias;        // element of the bias of key 0
  int from, until;     // the keys that it sees
  int position;
  float slope;
};

template <class T, int kSize>
inline constexpr int kRaggedBlocks = kSize * sizeof(T) > 128 ? 2 : 3;  // that share a multiprocessor, with room

template <class T, int kSize>
struct RaggedShape {
  static constexpr int kBlockKeys = kSize > 128 ? 32 : 64, kGroups = kBlockKeys / 16;
  static constexpr int kRowBytes = kSize * static_cast<int>(sizeof(T)), kSlotBytes = kBlockKeys * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kSlots = kSlotBytes > 8 << 10 ? 3 : 4;
  static constexpr int kQueriesAt = kSlots * kSlotBytes;
  static constexpr int kVectorsAt = kQueriesAt + (sizeof(T) == 4 ? 0 : kTileVectors * kRowBytes);
  static constexpr int kExtremesAt = kVectorsAt + kTileVectors * static_cast<int>(sizeof(RaggedVector));
  static constexpr int kShared = kExtremesAt + kTileVectors * static_cast<int>(sizeof(RaggedExtreme));
  static_assert(kWarps * 16 * kSize * 4 <= kVectorsAt, "results of all warps lie in the slots and the queries");
  static_assert(kBlockAlignment % kBlockKeys == 0 && kChunkKeys % kBlockAlignment == 0);

  // Where 16-byte chunk `chunk` (0..7) of a key's 128-byte line `line` lies in a slot.
  static __device__ __forceinline__ int at(int key, int line, int chunk) {
    return key * kRowBytes + line * 128 + ((chunk ^ (key & 7)) << 4);
  }
};

// The maximum as what scores are held against: e^(-inf - it) is 0 even where nothing was seen.
__device__ __forceinline__ float base_of(float maximum) { return maximum == kNothing ? 0.0f : maximum; }
__device__ __forceinline__ float weight_of(float score, float base) { return exp2f((score - base) * kLog2e); }

template <int kGroups>
using Scores = float[kGroups][2][4];  // of 16 keys each, in halves of 8
template <class T, int kGroups>
using Weights = std::conditional_t<sizeof(T) == 4, Scores<kGroups>, uint32_t[kGroups][4]>;
// A fragment's queries: in shared memory; of float32 a thread's two vectors where they lie.
template <class T>
using Queries = std::conditional_t<sizeof(T) == 4, const T* [2], const char*>;

// scores = queries . keys, of `groups` times 16 keys from `first` on.
template <class T, int kSize, int kGroups>
__device__ __forceinline__ void multiply_keys(Scores<kGroups>& scores, const Queries<T>& queries, const char* keys,
                                              int first, int groups, int64_t size) {
  using S = RaggedShape<T, kSize>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 4) {
#pragma unroll 1
    for (int chunk = 0; chunk < kSize / 4; ++chunk) {
      if (chunk * 4 >= size) break;
      float q[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int r = 0; r < 2; ++r) q[r][e] = chunk * 4 + e < size ? queries[r][chunk * 4 + e] : 0.0f;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups) break;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int key = first + 16 * j + 8 * (n >> 1) + 2 * (lane % 4) + (n & 1);
          const float4 k = *reinterpret_cast<const float4*>(keys + S::at(key, chunk / 8, chunk % 8));
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float& z = scores[j][n >> 1][2 * r + (n & 1)];
            z = __fmaf_rn(q[r][0], k.x, z);
            z = __fmaf_rn(q[r][1], k.y, z);
            z = __fmaf_rn(q[r][2], k.z, z);
            z = __fmaf_rn(q[r][3], k.w, z);
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int part = 0; part < kSize / 32; ++part) {  // 32 elements of Dh: two steps of the tensor cores
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        ptx::ldmatrix_x4(a[k], queries + S::at(lane % 16, part / 2, 4 * (part % 2) + 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups) break;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, keys + S::at(first + 16 * j + 8 * n + lane % 8, part / 2, 4 * (part % 2) + lane / 8));
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const uint32_t bk[2] = {b[2 * k], b[2 * k + 1]};
            ptx::mma<T>(scores[j][n], a[k], bk);
          }
        }
      }
    }
  }
}

// result += weights . values
template <class T, int kSize, int kGroups>
__device__ __forceinline__ void multiply_values(float (&result)[kSize / 8][4], const Weights<T, kGroups>& weights,
                                                const char* values, int first, int groups) {
  using S = RaggedShape<T, kSize>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (j >= groups) break;
    if constexpr (sizeof(T) == 4) {
#pragma unroll 1
      for (int k = 0; k < 16; ++k) {  // the quad's lane k % 8 / 2 has the weights of this key
        const int from = (lane & ~3) + k % 8 / 2, key = first + 16 * j + k;
        const auto pick = [&](int q) { return k < 8 ? weights[j][0][q] : weights[j][1][q]; };
        const float a = __shfl_sync(~0u, k % 2 ? pick(1) : pick(0), from);
        const float b = __shfl_sync(~0u, k % 2 ? pick(3) : pick(2), from);
#pragma unroll
        for (int n = 0; n < kSize / 8; ++n) {
          struct alignas(8) {
            float x, y;
          } v;
          memcpy(&v, __builtin_assume_aligned(values + S::at(key, n / 4, 2 * (n % 4) + lane % 4 / 2) + lane % 2 * 8, 8),
                 8);
          result[n][0] = __fmaf_rn(a, v.x, result[n][0]);
          result[n][1] = __fmaf_rn(a, v.y, result[n][1]);
          result[n][2] = __fmaf_rn(b, v.x, result[n][2]);
          result[n][3] = __fmaf_rn(b, v.y, result[n][3]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kSize / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, values + S::at(first + 16 * j + lane % 16, n / 4, 2 * (n % 4) + lane / 16));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t bk[2] = {b[2 * k], b[2 * k + 1]};
          ptx::mma<T>(result[2 * n + k], weights[j], bk);
        }
      }
    }
  }
}

// The online softmax of a thread's two vectors.
struct Softmax {
  float maximum[2] = {kNothing, kNothing}, sum[2] = {};  // the sum is that of this thread's keys alone

  // Scores of `groups` times 16 keys from `first` on become weights. What was summed before is worth `shrink` of it.
  template <class T, int kGroups>
  __device__ __forceinline__ void weigh(const RaggedAttentionParams& p, const RaggedVector* vectors, int first,
                                        int groups, Scores<kGroups>& scores, Weights<T, kGroups>& weights,
                                        float (&shrink)[2]) {
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RaggedVector v = vectors[8 * r];
      float found = maximum[r];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups) break;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int key = first + 16 * j + 8 * (n >> 1) + static_cast<int>(threadIdx.x) % 4 * 2 + (n & 1);
          float& x = scores[j][n >> 1][2 * r + (n & 1)];
          x = key >= v.from && key < v.until ? score(p, v, key, x) : kNothing;
          found = fmaxf(found, x);
        }
      }
      for (int lanes = 1; lanes < 4; lanes *= 2) found = fmaxf(found, __shfl_xor_sync(~0u, found, lanes));
      base[r] = base_of(found);
      shrink[r] = weight_of(maximum[r], base[r]);
      maximum[r] = found;
      sum[r] *= shrink[r];
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (j >= groups) break;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float a = weight_of(scores[j][n][2 * r], base[r]), b = weight_of(scores[j][n][2 * r + 1], base[r]);
          if constexpr (sizeof(T) == 4) {
            weights[j][n][2 * r] = a;
            weights[j][n][2 * r + 1] = b;
            sum[r] += a + b;
          } else {
            const uint32_t pair = ptx::pack<T>(a, b);
            weights[j][2 * n + r] = pair;
            sum[r] += to_float(T{static_cast<uint16_t>(pair)}) + to_float(T{static_cast<uint16_t>(pair >> 16)});
          }
        }
    }
  }

 private:
  static __device__ __forceinline__ float score(const RaggedAttentionParams& p, const RaggedVector& v, int key,
                                                float x) {
    x *= p.scale;
    if (p.softcap != 0.0f) x = p.softcap * tanhf(x / p.softcap);
    if (p.alibi) x += v.slope * static_cast<float>(key - v.position);
    if (p.bias_keys >= 0) x += value_at(p.bias, p.bias_dtype, v.bias + key * p.bias_key);
    return x;
  }
};

}  // namespace exeunt::cuda
