// ragged_attention on CUDA, in three launches whose sizes depend on shapes alone.
//
//   schedule    what there is to do, from the lists (ragged_schedule.cuh)
//   attention   job = a tile of up to 64 query vectors, a chunk of keys, a key head; persistent thread blocks take
//               every gridDim-th of them, the longest first
//   finish      chunks merged in their order; zeros and NaN where there was nothing to compute
//
// One job:
//
//   vectors  [16 to a fragment][Dh] = M side of the tensor cores       keys, values  [block][Dh] in a slot
//   block    64 keys (32 where heads are wider than 128) = one step of the online softmax, for each warp by itself
//   warps    fragments x shares of a block's keys: 1 x 4 up to 16 vectors, 2 x 2 up to 32, 4 x 1 beyond
//
//     slot      0      1      2      3             3 or 4 slots, keys and values by turns, chunks of 16 bytes exchanged
//     holds     K 0    V 0    K 1    .             so that no matrix load meets a bank twice
//     threads   wait(own copies of slot 0) ; barrier ; copy V 1 into slot 3 ; multiply slot 0 ; wait ; barrier ; ...
//
//   scores   vectors . keys -> scale, softcap, alibi, bias, visible range -> weights, rounded to the cache's dtype
//            (ragged_products.cuh)
//   result  += weights . values; what there was before shrinks where the maximum rose
//   end      the shares' results through the slots, merged in order -> out where the chunk is the tile's only
//            one, or the workspace
//
// Hazards: a slot is filled again only after the barrier that follows its use; a thread's own wait comes before that
// barrier, so behind it everybody's copies are complete. The slots take results only after the last barrier of the
// walk, and the next job's keys only after everybody has read those. Keys outside of the entry's range are zeros, never
// read; keys on a page that is not there are NaN, so whoever sees them is flagged.
#pragma once
#include <cstdint>
#include <limits>

#include "cuda/ragged_products.cuh"

namespace exeunt::cuda {

// Fills slots with the keys and values of a range by turns, running ahead of the products.
template <class T, int kSize>
class KeyLoader {
 public:
  using S = RaggedShape<T, kSize>;

  __device__ KeyLoader(const RaggedAttentionParams& params, const RaggedTile& tile, int head, KeyRange keys)
      : p_(params), row_(tile.row), head_(head), block_(keys.begin), end_(keys.end) {
    const int first = keys.begin + static_cast<int>(threadIdx.x) / kChunks;
    page_keys_ = p_.page_columns >= 0 ? static_cast<int>(p_.slots) : kMostKeys;
    place_ = {first / page_keys_, first % page_keys_};
    keys_aligned_ = aligned(p_.keys);
    values_aligned_ = aligned(p_.values);
  }

  // Starts the copies of the next keys or values into `slot`, and closes a group over them; an empty one at the end.
  __device__ void issue(char* slot) {
    if (block_ < end_) {
      const CacheArg& cache = values_ ? p_.values : p_.keys;
      const T* from = static_cast<const T*>(cache.data) + head_ * cache.head;
      const int chunk = static_cast<int>(threadIdx.x) % kChunks, row = static_cast<int>(threadIdx.x) / kChunks;
      const int64_t left = (values_ ? p_.value_size : p_.size) * static_cast<int64_t>(sizeof(T)) - chunk * 16;
      const int bytes = left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
      Place at = place_;
#pragma unroll
      for (int r = row; r < S::kBlockKeys; r += kRowsAtOnce) {
        char* to = slot + S::at(r, chunk / 8, chunk % 8);
        const int64_t held = block_ + r < end_ ? page(at.column) : kPadding;
        if (held < 0) {
          const unsigned word = held == kMissing && !values_ ? 0x7fc07fc0u : 0u;  // NaN in any dtype
          *reinterpret_cast<uint4*>(to) = {word, word, word, word};
        } else {
          const T* of_key = from + held * cache.row + at.slot * cache.slot;
          copy_16<T>(to,
                     bytes ? reinterpret_cast<const char*>(of_key) + chunk * 16 : static_cast<const char*>(cache.data),
                     bytes, values_ ? values_aligned_ : keys_aligned_);
        }
        at.slot += kRowsAtOnce;
        while (at.slot >= page_keys_) at.slot -= page_keys_, ++at.column;
      }
      if (values_) {
        place_ = at;
        block_ += S::kBlockKeys;
      }
      values_ = !values_;
    }
    ptx::cp_async_commit();
  }

 private:
  static constexpr int kChunks = S::kChunks, kRowsAtOnce = kThreads / kChunks;
  static constexpr int64_t kPadding = -1, kMissing = -2;
  struct Place {
    int column, slot;  // of the row's pages, and within it
  };

  // Row of the cache that holds that page.
  __device__ int64_t page(int column) const {
    if (p_.page_columns < 0) return row_;
    const int32_t page = p_.pages[row_ * p_.page_row + column * p_.page_column];
    return page >= 0 && page < p_.rows_held ? page : kMissing;
  }

  __device__ static bool aligned(const CacheArg& c) {
    return (reinterpret_cast<uintptr_t>(c.data) | static_cast<uintptr_t>((c.row | c.head | c.slot) * sizeof(T))) % 16 ==
           0;
  }

  const RaggedAttentionParams& p_;
  int64_t row_;
  int head_, block_, end_, page_keys_;
  Place place_;  // of this thread's first key of the block
  bool values_ = false, keys_aligned_, values_aligned_;
};

// Vector i of a tile; past its end one that sees nothing.
__device__ __forceinline__ RaggedVector describe(const RaggedAttentionParams& p, const RaggedTile& tile, int head,
                                                 int i) {
  if (i >= tile.count) return {};
  const int64_t group = p.heads / p.kv_heads, query = (tile.first + i) / group, token = tile.token + query;
  const int64_t of_head = head * group + (tile.first + i) % group;
  const int64_t position = p.positions ? p.positions[token] : tile.last + query;
  constexpr int64_t most = kMostKeys - 1;  // so that distances are integers
  const auto keys = [&](int64_t at) {      // within the entry's range
    return static_cast<int>(at < tile.start ? tile.start : at < tile.length ? at : tile.length);
  };
  return {token * p.bias_token + of_head * p.bias_head, p.window ? keys(position - p.window + 1) : tile.start,
          p.causal ? keys(position + 1) : tile.length,
          static_cast<int>(position < -most  ? -most
                           : position < most ? position
                                             : most),
          p.alibi ? p.alibi[of_head] : 0.0f};
}

// Element of q of vector i of a tile, or of its first one past the end; likewise of out.
struct VectorAt {
  int64_t token, head;
  __device__ VectorAt(const RaggedAttentionParams& p, const RaggedTile& tile, int kv_head, int i) {
    const int64_t group = p.heads / p.kv_heads, vector = tile.first + (i < tile.count ? i : 0);
    token = tile.token + vector / group;
    head = kv_head * group + vector % group;
  }
};

template <class T>
__device__ __forceinline__ const T* query(const RaggedAttentionParams& p, const RaggedTile& tile, int head, int i) {
  const VectorAt at(p, tile, head, i);
  return static_cast<const T*>(p.q) + at.token * p.q_token + at.head * p.q_head;
}

// Starts the copies of a tile's query vectors to where matrix loads find them, laid out as keys are; then zeros.
template <class T, int kSize>
__device__ __forceinline__ void load_queries(const RaggedAttentionParams& p, const RaggedTile& tile, int head,
                                             char* shared) {
  using S = RaggedShape<T, kSize>;
  const int row_bytes = static_cast<int>(p.size * static_cast<int64_t>(sizeof(T)));
  const bool aligned =
      (reinterpret_cast<uintptr_t>(p.q) | static_cast<uintptr_t>((p.q_token | p.q_head) * sizeof(T))) % 16 == 0;
  const int vectors = (tile.count + 15) / 16 * 16;
  for (int at = static_cast<int>(threadIdx.x); at < vectors * S::kChunks; at += kThreads) {
    const int i = at / S::kChunks, chunk = at % S::kChunks, left = i < tile.count ? row_bytes - chunk * 16 : 0;
    const int bytes = left <= 0 ? 0 : left < 16 ? left : 16;
    copy_16<T>(
        shared + S::at(i, chunk / 8, chunk % 8),
        bytes ? reinterpret_cast<const char*>(query<T>(p, tile, head, i)) + chunk * 16 : static_cast<const char*>(p.q),
        bytes, aligned);
  }
}

template <class T, int kSize>
__device__ __forceinline__ void ragged_job(const RaggedAttentionParams& p, const RaggedWork& w, const RaggedTile& tile,
                                           int chunk, int head, char* shared) {
  using S = RaggedShape<T, kSize>;
  constexpr int kLast = S::kSlots - 1;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4;
  const KeyRange keys = keys_of(tile, chunk);
  if constexpr (sizeof(T) == 2) load_queries<T, kSize>(p, tile, head, shared + S::kQueriesAt);
  KeyLoader<T, kSize> loader(p, tile, head, keys);
  for (int s = 0; s < kLast; ++s) loader.issue(shared + s * S::kSlotBytes);

  auto* vectors = reinterpret_cast<RaggedVector*>(shared + S::kVectorsAt);
  if (thread < kTileVectors) vectors[thread] = describe(p, tile, head, thread);
  const int fragments = tile.count <= 16 ? 1 : tile.count <= 32 ? 2 : 4, shares = kWarps / fragments;
  const int fragment = warp % fragments, groups = S::kGroups / shares > 1 ? S::kGroups / shares : 1;
  const int first = warp / fragments * groups * 16;  // key of the block that this warp begins with
  const bool active = first < S::kBlockKeys && fragment * 16 < tile.count;

  Queries<T> queries;
  if constexpr (sizeof(T) == 4) {
    for (int r = 0; r < 2; ++r) queries[r] = query<T>(p, tile, head, fragment * 16 + g + 8 * r);
  } else {
    queries = shared + S::kQueriesAt + fragment * 16 * S::kRowBytes;
  }

  int current = 0;
  const auto step = [&]() -> const char* {  // the next slot, once it is complete
    ptx::cp_async_wait<kLast - 1>();
    __syncthreads();
    loader.issue(shared + (current == 0 ? kLast : current - 1) * S::kSlotBytes);
    const char* slot = shared + current * S::kSlotBytes;
    current = current == kLast ? 0 : current + 1;
    return slot;
  };
  Softmax softmax;
  float result[kSize / 8][4] = {};
  for (int at = keys.begin; at < keys.end; at += S::kBlockKeys) {
    Weights<T, S::kGroups> weights;
    const char* slot = step();
    if (active) {
      Scores<S::kGroups> scores = {};
      float shrink[2];
      multiply_keys<T, kSize, S::kGroups>(scores, queries, slot, first, groups, p.size);
      softmax.template weigh<T, S::kGroups>(p, vectors + fragment * 16 + g, at + first, groups, scores, weights,
                                            shrink);
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
        for (int q = 0; q < 4; ++q) result[n][q] *= shrink[q >> 1];
    }
    slot = step();
    if (active) multiply_values<T, kSize, S::kGroups>(result, weights, slot, first, groups);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // The shares of each vector, merged in order: [warp][16][kSize], columns exchanged against bank conflicts.
  auto* results = reinterpret_cast<float*>(shared);
  auto* extremes = reinterpret_cast<RaggedExtreme*>(shared + S::kExtremesAt);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const int row = warp * 16 + g + 8 * r;
    if (lane % 4 == 0) extremes[row] = {softmax.maximum[r], sum};
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) results[row * kSize + ((8 * n) ^ (g << 3)) + lane % 4 * 2 + e] = result[n][2 * r + e];
  }
  __syncthreads();
  for (int i = warp; i < tile.count; i += kWarps) {
    // Row i is that of the first share; others lie `fragments` warps further.
    float maximum = kNothing, sum = 0.0f, weight[kWarps];
    for (int s = 0; s < shares; ++s) maximum = fmaxf(maximum, extremes[i + s * fragments * 16].maximum);
#pragma unroll
    for (int s = 0; s < kWarps; ++s) {
      if (s >= shares) break;
      const RaggedExtreme of_share = extremes[i + s * fragments * 16];
      weight[s] = weight_of(of_share.maximum, base_of(maximum));
      sum += weight[s] * of_share.sum;
    }
    const VectorAt at(p, tile, head, i);
    const int64_t slot = head * w.most_slots + tile.slot + int64_t{chunk} * tile.count + i;
    if (tile.chunks > 1 && lane == 0) w.extremes[slot] = {maximum, sum};
    for (int column = lane; column < p.value_size; column += 32) {
      float value = 0.0f;
#pragma unroll
      for (int s = 0; s < kWarps; ++s) {
        if (s >= shares) break;
        value += weight[s] * results[(i + s * fragments * 16) * kSize + (column ^ ((i & 7) << 3))];
      }
      if (tile.chunks > 1)
        w.values[slot * p.value_size + column] = value;
      else
        store_at(p.out, p.dtype, (at.token * p.heads + at.head) * p.value_size + column,
                 sum == 0.0f ? 0.0f : value / sum);
    }
  }
  __syncthreads();
}

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads, kRaggedBlocks<T, kSize>)
    ragged_attention_kernel(const __grid_constant__ RaggedAttentionParams p, const __grid_constant__ RaggedWork w) {
  char* shared = ptx::dynamic_shared();
  const int64_t jobs = w.counts->items * p.kv_heads;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const RaggedItem item = w.items[job / p.kv_heads];
    ragged_job<T, kSize>(p, w, w.tiles[item.tile], item.chunk, static_cast<int>(job % p.kv_heads), shared);
  }
}

// Warps take vectors of a tile and key head; the blocks beyond those fill in what no entry computes.
static __global__ void __launch_bounds__(kThreads)
    ragged_finish_kernel(const __grid_constant__ RaggedAttentionParams p, const __grid_constant__ RaggedWork w) {
  constexpr int kColumns = 8;  // of a lane, 256 in all
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t jobs = w.most_tiles * p.kv_heads;
  if (blockIdx.x >= jobs) {  // inactive entries become zeros; NaN if nobody can say whose a query is
    const bool sound = rises(p);
    const int64_t row = p.heads * p.value_size, first = sound ? p.q_indptr[live_entries(p)] * row : 0;
    for (int64_t i = first + (blockIdx.x - jobs) * kThreads + threadIdx.x; i < p.tokens * row;
         i += (gridDim.x - jobs) * kThreads)
      store_at(p.out, p.dtype, i, sound ? 0.0f : nan);
    return;
  }
  if (blockIdx.x / p.kv_heads >= w.counts->tiles) return;
  const RaggedTile tile = w.tiles[blockIdx.x / p.kv_heads];
  if (tile.chunks == 1) return;
  const int head = static_cast<int>(blockIdx.x % p.kv_heads);
  for (int i = warp; i < tile.count; i += kWarps) {
    const int64_t slot = head * w.most_slots + tile.slot + i;
    float maximum = kNothing, sum = 0.0f, values[kColumns] = {};
    for (int chunk = lane; chunk < tile.chunks; chunk += 32)
      maximum = fmaxf(maximum, w.extremes[slot + int64_t{chunk} * tile.count].maximum);
    for (int lanes = 16; lanes > 0; lanes /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
    for (int chunk = 0; chunk < tile.chunks; ++chunk) {
      const int64_t at = slot + int64_t{chunk} * tile.count;
      const RaggedExtreme of_chunk = w.extremes[at];
      const float weight = weight_of(of_chunk.maximum, base_of(maximum));
      sum += weight * of_chunk.sum;
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        if (lane + 32 * k < p.value_size) values[k] += weight * w.values[at * p.value_size + lane + 32 * k];
    }
    const VectorAt at(p, tile, head, i);
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      if (lane + 32 * k < p.value_size)
        store_at(p.out, p.dtype, (at.token * p.heads + at.head) * p.value_size + lane + 32 * k,
                 tile.flagged  ? nan
                 : sum == 0.0f ? 0.0f
                               : values[k] / sum);
  }
}

}  // namespace exeunt::cuda
