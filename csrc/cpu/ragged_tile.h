// ragged_attention: the units of its work, and a thread's scratch memory.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

constexpr int64_t kTileVectors = 32;  // query vectors (queries x heads of a group) that share a read of the keys
constexpr int64_t kBlockKeys = 64;    // keys of one step of the online softmax
constexpr int64_t kChunkKeys =
    512;  // keys of one partial result; counted from kv_start, so that bits depend on it alone

// Some query vectors of one entry and one key head, over some chunks of keys. Vector i is query i / group of the entry,
// head i % group of the group.
struct RaggedTask {
  int64_t entry, head;
  int64_t first, count;  // vectors
  int64_t begin, end;    // keys that any of them sees, within these chunks
  int64_t partial;       // where its result goes: element of the partials, or -1: it is whole and goes to out
};

inline int64_t padded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Floats of a result before it is normalised: maximum and sum of each vector, and its weighted values.
inline int64_t ragged_partial(int64_t vectors, int64_t value_size) { return vectors * (2 + padded(value_size, 16)); }

// Offsets in floats; every part begins at 64 bytes.
struct RaggedScratch {
  int64_t depth, width;  // Dh and Dv with their padding
  int64_t queries, keys, values, scores, weights, chunk, whole, total;
  RaggedScratch(int64_t size, int64_t value_size) {
    depth = padded(size, 32);
    width = padded(value_size, 32);
    queries = 0;                                   // [vectors][depth]
    keys = queries + kTileVectors * depth;         // [depth][kBlockKeys]
    values = keys + depth * kBlockKeys;            // [kBlockKeys][width]
    scores = values + kBlockKeys * width;          // [vectors][kBlockKeys]
    weights = scores + kTileVectors * kBlockKeys;  // [vectors][kBlockKeys], pairs only
    chunk = weights + kTileVectors * kBlockKeys;   // a result of kTileVectors
    whole = chunk + padded(ragged_partial(kTileVectors, value_size), 16);
    total = whole + padded(ragged_partial(kTileVectors, value_size), 16);
  }
};

}  // namespace exeunt::cpu
