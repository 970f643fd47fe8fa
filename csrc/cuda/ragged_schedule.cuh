// ragged_attention's work, shared out on the device: one thread block reads the lists and writes down what there is to
// do, so that nothing on the host depends on lengths or depths.
//
//   entry     a row of the cache, its range of keys, its queries: vectors = queries x heads of a group
//   tile      up to 64 vectors of an entry; each key is read once for all of them          one thread finds an entry's
//   chunk     256 keys for each tile of the entry, counted from kv_start                   one warp finds a tile's
//   item      a chunk of a tile, the longest first; with a key head it is a job of the attention kernel
//
//   workspace | counts | tiles | items | maximum and sum | values |     the last two of tiles of several chunks
//
// A chunk grows with the number of its entry's tiles, so an entry has about as many items as it has 256 keys, and the
// results that wait for their merge take a fixed share of the keys' bytes. Everything that bits depend on, tiles and
// chunks, comes from an entry alone. Atomic counters only say where a tile's record lies and who computes it when.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "cuda/rows.cuh"

namespace exeunt::cuda {

constexpr int kTileVectors = 64, kChunkKeys = 256;
constexpr int kScheduleThreads = 512, kScheduleWarps = kScheduleThreads / 32;
constexpr int kBins = 64;            // of items by their number of keys
constexpr int kMostKeys = 1 << 30;   // of a row
constexpr int kBlockAlignment = 64;  // a chunk is walked through from here on, counted from kv_start

struct RaggedTile {
  int32_t row, token, last;            // of the cache; the entry's first query; where that one stands by default
  int32_t start, length;               // the entry's keys
  int32_t first, count;                // vectors of the entry: vector i is query i / group, head i % group of the group
  int32_t begin, end;                  // keys that any of them sees
  int32_t chunk, first_chunk, chunks;  // keys of a chunk; which one `begin` lies in; how many to `end`, 0: sees nothing
  int32_t slot;                        // where its results wait: chunk by chunk, vector by vector
  int32_t flagged;                     // the lists name what is not there
};

struct RaggedItem {
  int32_t tile, chunk;
};

struct RaggedCounts {
  int32_t tiles, items;
};

struct RaggedExtreme {  // of a vector over a chunk
  float maximum, sum;
};

struct RaggedWork {
  RaggedCounts* counts;
  RaggedTile* tiles;
  RaggedItem* items;
  RaggedExtreme* extremes;  // [Hkv][most_slots]
  float* values;            // [Hkv][most_slots][Dv]
  int64_t most_tiles, most_items, most_slots;
};

// Whether q_indptr rises from 0 to T, so that each query has an entry; for whole warps.
__device__ __forceinline__ bool rises(const RaggedAttentionParams& p) {
  bool bad = false;
  for (int64_t r = threadIdx.x % 32; r <= p.entries; r += 32) {
    const int64_t at = p.q_indptr[r], before = r ? p.q_indptr[r - 1] : 0;
    bad = bad || at < before || (r == 0 && at != 0) || (r == p.entries && at != p.tokens);
  }
  return __ballot_sync(~0u, bad) == 0;
}

__device__ __forceinline__ int64_t live_entries(const RaggedAttentionParams& p) {
  if (!p.count) return p.entries;
  const int64_t count = index_at(p.count, p.count_64, 0);
  return count < 0 ? 0 : count < p.entries ? count : p.entries;
}

__device__ __forceinline__ int64_t tiles_of(const RaggedAttentionParams& p, int64_t entry) {
  const int64_t vectors = (p.q_indptr[entry + 1] - p.q_indptr[entry]) * (p.heads / p.kv_heads);
  return (vectors + kTileVectors - 1) / kTileVectors;
}

// Smallest (sign 1) or largest (sign -1) position of some queries; for whole warps.
__device__ __forceinline__ int64_t outermost(const int64_t* positions, int64_t count, int64_t sign) {
  int64_t found = sign * positions[0];
  for (int64_t i = threadIdx.x % 32; i < count; i += 32)
    if (sign * positions[i] < found) found = sign * positions[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(~0u, found, lanes);
    if (other < found) found = other;
  }
  return sign * found;
}

// Tile `index` of an entry, but for its slot; for whole warps.
__device__ __forceinline__ RaggedTile find_tile(const RaggedAttentionParams& p, int64_t entry, int64_t index) {
  const int64_t group = p.heads / p.kv_heads, token = p.q_indptr[entry];
  const int64_t queries = p.q_indptr[entry + 1] - token, vectors = queries * group;
  const int64_t row = p.rows[entry], length = p.kv_len[entry], start = p.kv_start ? p.kv_start[entry] : 0;
  const bool paged = p.page_columns >= 0;
  const int64_t rows = paged ? p.page_rows : p.rows_held, room = p.slots * (paged ? p.page_columns : 1);
  RaggedTile tile{};
  tile.flagged = row < 0 || row >= rows || start < 0 || start > length || length > room ||
                 (p.bias_keys >= 0 && length > p.bias_keys);
  tile.token = static_cast<int32_t>(token);
  tile.first = static_cast<int32_t>(index * kTileVectors);
  tile.count = static_cast<int32_t>(vectors - tile.first < kTileVectors ? vectors - tile.first : kTileVectors);
  if (tile.flagged) return tile;
  tile.row = static_cast<int32_t>(row);
  tile.last = static_cast<int32_t>(length - queries);
  tile.start = static_cast<int32_t>(start);
  tile.length = static_cast<int32_t>(length);
  int64_t begin = start, end = length;
  if (p.causal) {
    const int64_t first = tile.first / group, last = (tile.first + tile.count - 1) / group;
    int64_t lowest = length - queries + first, highest = length - queries + last;
    if (p.positions) {
      lowest = outermost(p.positions + token + first, last - first + 1, 1);
      highest = outermost(p.positions + token + first, last - first + 1, -1);
    }
    if (highest + 1 < end) end = highest + 1;
    if (p.window && lowest - p.window + 1 > begin) begin = lowest - p.window + 1;
  }
  if (begin >= end) return tile;
  const int64_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
  const int64_t chunk = tiles < kMostKeys / kChunkKeys ? tiles * kChunkKeys : kMostKeys;
  tile.begin = static_cast<int32_t>(begin);
  tile.end = static_cast<int32_t>(end);
  tile.chunk = static_cast<int32_t>(chunk);
  tile.first_chunk = static_cast<int32_t>((begin - start) / chunk);
  tile.chunks = static_cast<int32_t>((end - 1 - start) / chunk) - tile.first_chunk + 1;
  return tile;
}

struct KeyRange {
  int begin, end;
};

// Keys of a tile's chunk, from the block on that its first one lies in.
__device__ __forceinline__ KeyRange keys_of(const RaggedTile& tile, int chunk) {
  const int from = tile.start + (tile.first_chunk + chunk) * tile.chunk;
  const int first = tile.start + (tile.begin - tile.start) / kBlockAlignment * kBlockAlignment;
  return {from > first ? from : first, from + tile.chunk < tile.end ? from + tile.chunk : tile.end};
}

// Two bins for each doubling of the keys: an exponent and a bit.
__device__ __forceinline__ int bin_of(const KeyRange& keys) {
  return static_cast<int>(float_bits(static_cast<float>(keys.end - keys.begin)) >> 22) - 2 * 127;
}

struct RaggedSchedule {  // in shared memory
  int32_t tiles, slots;
  int32_t counts[kBins], places[kBins];
};

static __global__ void __launch_bounds__(kScheduleThreads)
    ragged_schedule_kernel(const __grid_constant__ RaggedAttentionParams p, const __grid_constant__ RaggedWork w) {
  auto& shared = *reinterpret_cast<RaggedSchedule*>(ptx::dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (thread < kBins) shared.counts[thread] = 0;
  if (thread == 0) shared.tiles = shared.slots = 0;
  const int64_t live = rises(p) ? live_entries(p) : 0;
  __syncthreads();
  for (int64_t r = thread; r < live; r += kScheduleThreads) {
    const int32_t tiles = static_cast<int32_t>(tiles_of(p, r)), first = atomicAdd(&shared.tiles, tiles);
    for (int32_t i = 0; i < tiles; ++i) w.items[first + i] = {static_cast<int32_t>(r), i};  // entries, for a while
  }
  __syncthreads();
  const int tiles = shared.tiles;
  for (int at = warp; at < tiles; at += kScheduleWarps) {
    RaggedTile tile = find_tile(p, w.items[at].tile, w.items[at].chunk);
    if (lane == 0) {
      if (tile.chunks > 1) tile.slot = atomicAdd(&shared.slots, tile.chunks * tile.count);
      w.tiles[at] = tile;
    }
    for (int chunk = lane; chunk < tile.chunks; chunk += 32) atomicAdd(&shared.counts[bin_of(keys_of(tile, chunk))], 1);
  }
  __syncthreads();
  if (thread < kBins) {
    int32_t longer = 0;
    for (int bin = thread + 1; bin < kBins; ++bin) longer += shared.counts[bin];
    shared.places[thread] = longer;
    if (thread == 0) *w.counts = {tiles, longer + shared.counts[0]};
  }
  __syncthreads();
  for (int at = warp; at < tiles; at += kScheduleWarps) {
    const RaggedTile tile = w.tiles[at];
    for (int chunk = lane; chunk < tile.chunks; chunk += 32)
      w.items[atomicAdd(&shared.places[bin_of(keys_of(tile, chunk))], 1)] = {at, chunk};
  }
}

}  // namespace exeunt::cuda
