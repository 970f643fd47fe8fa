// ragged_attention: the units of its work, and a thread's scratch memory.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

constexpr int64_t kTileVectors = 32;  // query vectors (queries x heads of a group) that share a read of the keys
constexpr int64_t kStepKeys = 32;     // keys of one step of the online softmax: two such blocks lie in L1
constexpr int64_t kChunkKeys = 1024;  // keys of one partial result; counted from kv_start: bits depend on it alone

// Some query vectors of one entry and one key head, over some chunks of keys. Vector i is query i / group of the entry,
// head i % group of the group.
struct RaggedTask {
  int64_t entry, head;
  int64_t first, count;  // vectors
  int64_t begin, end;    // keys that any of them sees, within these chunks
  int64_t ahead;         // end of the tile's keys, which the same thread is likely to read next
  int64_t partial;       // where its chunks' results go, one after the other: element of the partials; or -1: it is
                         // whole and goes to out
};

inline int64_t padded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Floats of a result before it is normalised: maximum and sum of each vector, padded so that what follows is aligned,
// and its weighted values, [vectors][ragged_width()].
inline int64_t ragged_width(int64_t value_size) { return padded(value_size, 32); }
inline int64_t ragged_partial(int64_t vectors, int64_t value_size) {
  return padded(2 * vectors, 16) + vectors * ragged_width(value_size);
}

// Offsets in floats; every part begins at 64 bytes.
struct RaggedScratch {
  int64_t queries, keys, values, scores, turned, chunk, whole, total;
  // Inlined even where nothing is optimised: objects of an instruction set may not export it.
  inline __attribute__((always_inline)) RaggedScratch(int64_t size, int64_t value_size) {
    const int64_t depth = padded(size, 32), width = ragged_width(value_size);
    queries = 0;                                     // [vectors][depth]
    keys = queries + kTileVectors * depth;           // [kStepKeys][depth], copies
    values = keys + kStepKeys * depth;               // [kStepKeys][width], copies
    scores = values + kStepKeys * width;             // [vectors][Products::kRow], then weights
    turned = scores + 2 * kTileVectors * kStepKeys;  // scores as tile registers leave them
    chunk = turned + kTileVectors * kStepKeys;       // a result of kTileVectors
    whole = chunk + padded(ragged_partial(kTileVectors, value_size), 16);
    total = whole + padded(ragged_partial(kTileVectors, value_size), 16);
  }
};

}  // namespace exeunt::cpu
