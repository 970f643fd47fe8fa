#include <algorithm>

#include "cuda/launch.h"
#include "cuda/ragged_attention.cuh"
#include "cuda/ragged_attention.h"

namespace exeunt::cuda {
namespace {

constexpr int64_t kFillBlocks = 32;

struct Plan {
  RaggedWork w;
  int64_t bytes;
};

// How much there can be of everything. An entry of V vectors has tiles = ceil(V / 64), each of at most
// floor(room / (256 tiles)) + 1 chunks; V / tiles is at most V and at most 64.
Plan plan(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t entries, int64_t room, int64_t value_size,
          char* base) {
  const int64_t vectors = tokens * (heads / kv_heads), chunks = room / kChunkKeys;
  RaggedWork w{};
  w.most_tiles = entries + vectors / kTileVectors;
  w.most_items = entries * chunks + w.most_tiles;
  w.most_slots = std::min(vectors, entries * kTileVectors) * chunks + vectors;
  int64_t bytes = 0;
  const auto part = [&]<class T>(T*& at, int64_t count) {
    at = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  };
  part(w.counts, 1);
  part(w.tiles, w.most_tiles);
  part(w.items, w.most_items);
  part(w.extremes, kv_heads * w.most_slots);
  part(w.values, kv_heads * w.most_slots * value_size);
  return {w, bytes};
}

int64_t room_of(const RaggedAttentionParams& p) { return p.slots * (p.page_columns >= 0 ? p.page_columns : 1); }

template <class T, int kSize>
void attend(const RaggedAttentionParams& p, const RaggedWork& w, const Target& target) {
  constexpr int kShared = RaggedShape<T, kSize>::kShared;
  launch(&ragged_attention_kernel<T, kSize>,
         std::min(w.most_items * p.kv_heads, target.resident(kShared, kRaggedBlocks<T, kSize>)), kThreads, kShared,
         target.stream, p, w);
}

template <class T>
void attend(const RaggedAttentionParams& p, const RaggedWork& w, const Target& target) {
  const int64_t size = std::max(p.size, p.value_size);
  if (size <= 64)
    attend<T, 64>(p, w, target);
  else if (size <= 128)
    attend<T, 128>(p, w, target);
  else
    attend<T, 256>(p, w, target);
}

}  // namespace

int64_t ragged_attention_workspace(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t entries, int64_t room,
                                   int64_t value_size) {
  return plan(tokens, heads, kv_heads, entries, room, value_size, nullptr).bytes;
}

void ragged_attention(const RaggedAttentionParams& p, int device, void* stream) {
  if (p.tokens == 0) return;
  if (std::max(p.size, p.value_size) > kLargestHead || room_of(p) > kMostKeys)
    throw std::runtime_error("expected heads of at most " + std::to_string(kLargestHead) + " and rows of at most " +
                             std::to_string(kMostKeys) + " keys, got " +
                             std::to_string(std::max(p.size, p.value_size)) + " and " + std::to_string(room_of(p)));
  const OnDevice on_device(device);
  const Target target(device, static_cast<cudaStream_t>(stream));
  const RaggedWork w =
      plan(p.tokens, p.heads, p.kv_heads, p.entries, room_of(p), p.value_size, static_cast<char*>(p.workspace)).w;
  launch(&ragged_schedule_kernel, 1, kScheduleThreads, sizeof(RaggedSchedule), target.stream, p, w);
  if (w.most_items > 0) typed(p.q, p.dtype, [&](auto* q) { attend<std::remove_cvref_t<decltype(*q)>>(p, w, target); });
  launch(&ragged_finish_kernel, w.most_tiles * p.kv_heads + kFillBlocks, kThreads, 0, target.stream, p, w);
}

}  // namespace exeunt::cuda
