// A block of keys and values: where they lie in the cache, and how those of later blocks are fetched meanwhile.
//
// Prefetches that come in a burst fill the core's line buffers, and then memory waits while products run. So the rows
// of the next block are fetched a few at a time, after each step of the work on this one, into L1, where products find
// them without a line buffer. Each line is asked for twice, the first time with the pair before it: with one request,
// or with two that are a KB or more apart, memory gives a fifth less.
#pragma once
#include "core/params.h"
#include "cpu/ragged_tile.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

template <class T>
class Block {
 public:
  static constexpr int64_t kKeys = kStepKeys;

  int64_t at = -1, count = 0;  // its first key, and how many
  const T *key[kKeys], *value[kKeys];
  bool even = false;  // all keys at one distance from each other

  // `steps` of work on a block are there to fetch another.
  Block(const RaggedAttentionParams& params, const RaggedTask& of, int64_t steps)
      : p(params), task(of), share((kKeys * kParts + steps - 1) / steps) {}

  // Becomes keys [first, first + many). Those up to a full register repeat the last one: their scores count nowhere.
  void find(int64_t first, int64_t many) {
    at = first, count = many, even = true, due = fetched = 0;
    const int64_t row = p.rows[task.entry];
    const T* k = static_cast<const T*>(p.keys.data) + task.head * p.keys.head;
    const T* v = static_cast<const T*>(p.values.data) + task.head * p.values.head;
    for (int64_t j = 0; j < count;) {
      int64_t held = row, slot = at + j, run = count - j;
      if (p.pages) {
        held = p.pages[row * p.page_row + slot / p.slots * p.page_column];
        slot %= p.slots;
        if (p.slots - slot < run) run = p.slots - slot, even = false;
      }
      const T* its_key = k + held * p.keys.row + slot * p.keys.slot;
      const T* its_value = v + held * p.values.row + slot * p.values.slot;
      for (int64_t i = 0; i < run; ++i)
        key[j + i] = its_key + i * p.keys.slot, value[j + i] = its_value + i * p.values.slot;
      j += run;
    }
    for (int64_t j = count; j % kLanes; ++j) key[j] = key[count - 1];
  }

  // Its share of rows for one step of work; lines by twos, cheaply, so a row's end may be passed by one.
  inline __attribute__((always_inline)) void fetch() {
    due += share;
    const int64_t until = due / kParts < count ? due / kParts : count;
    for (; fetched < until; ++fetched) {
      for (const T *at = key[fetched], *end = at + p.size; at < end; at += 2 * kLine) fetch_two(at);
      for (const T *at = value[fetched], *end = at + p.value_size; at < end; at += 2 * kLine) fetch_two(at);
    }
  }

 private:
  static constexpr int64_t kParts = 256;  // of a row
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const RaggedAttentionParams& p;
  const RaggedTask& task;
  const int64_t share;
  int64_t due = 0, fetched = 0;

  // The second pair is taken to follow in memory: a prefetch of what is not there does nothing.
  static inline __attribute__((always_inline)) void fetch_two(const T* at) {
    __builtin_prefetch(at, 0, 3);
    __builtin_prefetch(at + 2 * kLine, 0, 3);
    __builtin_prefetch(at + kLine, 0, 3);
    __builtin_prefetch(at + 3 * kLine, 0, 3);
  }
};

}  // namespace
}  // namespace exeunt::cpu::EXEUNT_ISA
