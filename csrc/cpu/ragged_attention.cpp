// ragged_attention on CPU: which tiles there are, which of them are split over chunks of their keys, and who does what.
//
//   tile     up to 32 vectors (queries x heads of a group) of one entry and one key head
//   task     a tile over all its keys; where there are few tiles, over some chunks of them each
//
//   workspace: | partial results of split tiles | per thread: scratch |
//
// Tasks lie in the order of the cache, and a tile's chunks are merged in order whoever computed them.
#include "cpu/ragged_attention.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace exeunt::cpu {
namespace {

constexpr double kSerialWork = 262144;   // multiply-adds below which a parallel region costs more than it saves
constexpr int64_t kTilesPerThread = 16;  // with fewer, they are split over their keys
constexpr int64_t kChunksAtOnce = 4;     // of a task at most where tiles are split: its first keys come unfetched
constexpr int64_t kTasksPerThread = 8;   // or fewer chunks, for so many

[[noreturn]] void refuse(const std::string& what, int64_t got, int64_t entry) {
  throw std::invalid_argument("ragged_attention: " + what + ", got " + std::to_string(got) + " at " +
                              std::to_string(entry));
}

std::string range(const char* name, int64_t end) {
  return std::string(name) + " must lie in 0.." + std::to_string(end);
}

void check(const RaggedAttentionParams& p) {
  if (p.q_indptr[0] != 0 || p.q_indptr[p.entries] != p.tokens)
    throw std::invalid_argument("ragged_attention: q_indptr must rise from 0 to " + std::to_string(p.tokens) +
                                ", got " + std::to_string(p.q_indptr[0]) + " to " +
                                std::to_string(p.q_indptr[p.entries]));
  for (int64_t r = 0; r < p.entries; ++r)
    if (p.q_indptr[r + 1] < p.q_indptr[r]) refuse("q_indptr must rise", p.q_indptr[r + 1], r + 1);
  if (p.live < 0 || p.live > p.entries)
    throw std::invalid_argument("ragged_attention: " + range("count", p.entries) + ", got " + std::to_string(p.live));
  const bool paged = p.page_columns >= 0;
  const int64_t listed = paged ? p.page_rows : p.rows_held, room = p.slots * (paged ? p.page_columns : 1);
  for (int64_t r = 0; r < p.live; ++r) {
    const int64_t row = p.rows[r], stop = p.kv_len[r], start = p.kv_start ? p.kv_start[r] : 0;
    if (row < 0 || row >= listed) refuse(range("rows", listed - 1), row, r);
    if (stop < 0 || stop > room) refuse(range("kv_len", room) + ", the keys of a row", stop, r);
    if (start < 0 || start > stop) refuse(range("kv_start", stop) + ", the row's kv_len", start, r);
    if (p.bias_keys >= 0 && p.q_indptr[r] < p.q_indptr[r + 1] && stop > p.bias_keys)
      refuse("bias must reach over the " + std::to_string(stop) + " keys of a row", p.bias_keys, r);
    if (paged && start < stop)
      for (int64_t at = start / p.slots; at <= (stop - 1) / p.slots; ++at) {
        const int32_t page = p.pages[row * p.page_row + at * p.page_column];
        if (page < 0 || page >= p.rows_held) refuse(range("pages", p.rows_held - 1), page, r);
      }
  }
}

// Few enough vectors that tiles may be split: by their number, so that the workspace is known before the lists are
// read.
bool may_split(int64_t tokens, int64_t heads, int32_t threads) {
  return threads > 1 && tokens * heads < kTileVectors * kTilesPerThread * threads;
}

// What a tile's vectors see together.
RaggedTask tile_of(const RaggedAttentionParams& p, int64_t entry, int64_t head, int64_t first, int64_t count) {
  const int64_t group = p.heads / p.kv_heads, len = p.kv_len[entry], start = p.kv_start ? p.kv_start[entry] : 0;
  RaggedTask task{entry, head, first, count, start, len, len, -1};
  if (!p.causal) return task;
  const int64_t token = p.q_indptr[entry], queries = p.q_indptr[entry + 1] - token;
  int64_t lowest = len - queries + first / group, highest = len - queries + (first + count - 1) / group;
  if (p.positions) {
    const auto [low, high] =
        std::minmax_element(p.positions + token + first / group, p.positions + token + (first + count - 1) / group + 1);
    lowest = *low, highest = *high;
  }
  task.end = task.ahead = std::min(len, highest + 1);
  if (p.window) task.begin = std::max(start, lowest - p.window + 1);
  return task;
}

}  // namespace

int64_t ragged_attention_workspace(int64_t tokens, int64_t heads, int64_t room, int64_t size, int64_t value_size,
                                   int32_t threads) {
  threads = std::max(1, threads);
  const int64_t chunks = may_split(tokens, heads, threads) ? room / kChunkKeys + 1 : 0;
  const int64_t partials = chunks * tokens * heads * ragged_partial(1, value_size);
  return (partials + threads * RaggedScratch(size, value_size).total) * static_cast<int64_t>(sizeof(float));
}

RaggedPlan ragged_attention_plan(const RaggedAttentionParams& p) {
  check(p);
  RaggedPlan plan{};
  const int64_t group = p.heads / p.kv_heads;
  double work = 0.0;
  for (int64_t r = 0; r < p.live; ++r) {
    const int64_t vectors = (p.q_indptr[r + 1] - p.q_indptr[r]) * group;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t first = 0; first < vectors; first += kTileVectors) {
        const RaggedTask task = tile_of(p, r, head, first, std::min(kTileVectors, vectors - first));
        plan.tasks.push_back(task);
        work += static_cast<double>(task.count) * static_cast<double>(std::max<int64_t>(task.end - task.begin, 0));
      }
  }
  plan.threads = work * static_cast<double>(p.size + p.value_size) < kSerialWork ? 1 : std::max(1, p.threads);
  const int64_t tiles = static_cast<int64_t>(plan.tasks.size());
  if (may_split(p.tokens, p.heads, plan.threads) && tiles < kTilesPerThread * plan.threads) {
    const auto start_of = [&](const RaggedTask& tile) { return p.kv_start ? p.kv_start[tile.entry] : 0; };
    const auto chunks_of = [&](const RaggedTask& tile) -> int64_t {  // those that its keys lie in
      if (tile.begin >= tile.end) return 0;
      const int64_t start = start_of(tile);
      return (tile.end - start - 1) / kChunkKeys + 1 - (tile.begin - start) / kChunkKeys;
    };
    int64_t all = 0;
    for (const RaggedTask& tile : plan.tasks) all += chunks_of(tile);
    const int64_t at_once = std::clamp<int64_t>(all / (plan.threads * kTasksPerThread), 1, kChunksAtOnce);
    std::vector<RaggedTask> parts;
    for (RaggedTask tile : plan.tasks) {
      const int64_t chunks = chunks_of(tile), each = ragged_partial(tile.count, p.value_size);
      if (chunks <= at_once) {
        parts.push_back(tile);
        continue;
      }
      tile.partial = plan.partials;
      plan.splits.push_back({tile, chunks});
      const int64_t first = start_of(tile) + (tile.begin - start_of(tile)) / kChunkKeys * kChunkKeys;
      for (int64_t i = 0; i < chunks; i += at_once) {
        RaggedTask part = tile;
        part.begin = std::max(tile.begin, first + i * kChunkKeys);
        part.end = std::min(tile.end, first + (i + at_once) * kChunkKeys);
        part.partial = plan.partials + i * each;
        parts.push_back(part);
      }
      plan.partials += chunks * each;
    }
    plan.tasks = std::move(parts);
  }
  return plan;
}

void ragged_attention(const RaggedAttentionParams& p, const RaggedPlan& plan) {
  const Isa& isa = selected_isa();
  const int64_t each = RaggedScratch(p.size, p.value_size).total;
  float* partials = static_cast<float*>(p.workspace);
  const int64_t row = p.heads * p.value_size * element_bytes(p.dtype), live = p.q_indptr[p.live];
  __builtin_memset(static_cast<char*>(p.out) + live * row, 0, static_cast<uint64_t>((p.tokens - live) * row));
  const auto run = [&](const RaggedTask& task, int thread) {
    isa.ragged_attention_task(p, task, partials + plan.partials + thread * each,
                              task.partial < 0 ? nullptr : partials + task.partial);
  };
  if (plan.threads == 1) {
    for (const RaggedTask& task : plan.tasks) run(task, 0);
    return;
  }
#pragma omp parallel num_threads(plan.threads)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < plan.tasks.size(); ++i) run(plan.tasks[i], omp_get_thread_num());
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < plan.splits.size(); ++i)
      isa.ragged_attention_merge(p, plan.splits[i].tile, plan.splits[i].chunks, partials + plan.splits[i].tile.partial);
  }
}

}  // namespace exeunt::cpu
