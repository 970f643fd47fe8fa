#include <algorithm>

#include "cuda/exit_stats.cuh"
#include "cuda/exit_stats.h"
#include "cuda/exit_stats_launch.h"

namespace exeunt::cuda {
namespace {

constexpr int64_t kMaxChunks = 2048;  // 262,144 vocabulary rows in chunks of one tile; beyond that, chunks grow

struct Plan {
  ExitStatsWorkspace w;
  int64_t padded_rows, bytes;
};

// hidden: the dtype of the hidden rows, for a head of float8_e4m3; any of 16 bits will do for sizes.
Plan plan(DType head, DType hidden, int64_t rows, int64_t vocab, int64_t width, int32_t topk, bool draws, char* base) {
  Plan plan;
  ExitStatsWorkspace& w = plan.w;
  w.x_dtype = head == DType::float8_e4m3 ? hidden : head;
  w.x_width = round_up(std::max<int64_t>(width, 1), kLine / element_bytes(head));
  w.tiles = parts(vocab, kTile);
  w.tiles_per_chunk = parts(w.tiles, kMaxChunks);
  w.chunks = parts(w.tiles, w.tiles_per_chunk);
  w.slots = topk + draws;
  plan.padded_rows = round_up(rows, rows > 64 ? 128 : block_rows(rows));  // whatever kernel takes them
  const int64_t partials = round_up(plan.padded_rows * w.x_width * element_bytes(w.x_dtype), 64);
  const int64_t candidates = partials + round_up(rows * w.chunks * static_cast<int64_t>(sizeof(ExitStats)), 64);
  plan.bytes = candidates + rows * w.chunks * w.slots * static_cast<int64_t>(sizeof(Candidate));
  w.x = base;
  w.partials = reinterpret_cast<ExitStats*>(base + partials);
  w.candidates = reinterpret_cast<Candidate*>(base + candidates);
  return plan;
}

template <class W, class T, int kRows>
void launch_product(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target) {
  const int shared =
      kStages<kRows> * kStageBytes<kRows, kRowLines<W, T>> + ExitStatsEpilogue<kRows>::scratch_bytes(w.slots);
  const int64_t items = w.chunks * parts(p.rows, kRows);
  launch(&exit_stats_kernel<W, T, kRows>, std::min(items, target.resident(shared, 2)), kThreads, shared, target.stream,
         p, w);
}

template <class T>
void launch_rows(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target) {
  switch (block_rows(p.rows)) {
    case 8:
      return launch_product<T, T, 8>(p, w, target);
    case 16:
      return launch_product<T, T, 16>(p, w, target);
    case 32:
      return launch_product<T, T, 32>(p, w, target);
    default:
      return launch_product<T, T, 64>(p, w, target);
  }
}

// Fewer shapes for a weight that is widened on its way: with more hidden rows its stages would not fit everywhere.
template <class T>
void launch_fp8(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target) {
  if (p.rows <= 16) return launch_product<Float8, T, 16>(p, w, target);
  return launch_product<Float8, T, 32>(p, w, target);
}

}  // namespace

int64_t exit_stats_workspace(DType head, int64_t rows, int64_t vocab, int64_t width, int32_t topk, bool draws) {
  return plan(head, DType::bfloat16, rows, vocab, width, topk, draws, nullptr).bytes;
}

void exit_stats(const ExitStatsParams& p, int device, void* stream_handle) {
  const OnDevice on_device(device);
  const Target target(device, static_cast<cudaStream_t>(stream_handle));
  const auto [w, padded_rows, bytes] = plan(p.head.dtype, p.hidden_dtype, p.rows, p.vocab, p.width, p.topk,
                                            p.seeds != nullptr, static_cast<char*>(p.workspace));
  launch(&normalise_kernel, padded_rows, kThreads, kNormaliseScratch, target.stream, p, w);
  if (sm90_takes(p, device))
    exit_stats_sm90(p, w, target);
  else if (p.head.dtype == DType::float8_e4m3 && w.x_dtype == DType::bfloat16)
    launch_fp8<BFloat16>(p, w, target);
  else if (p.head.dtype == DType::float8_e4m3)
    launch_fp8<Float16>(p, w, target);
  else if (p.head.dtype == DType::float32)
    launch_rows<float>(p, w, target);
  else if (p.head.dtype == DType::bfloat16)
    launch_rows<BFloat16>(p, w, target);
  else
    launch_rows<Float16>(p, w, target);
  launch(&finish_kernel, p.rows, 32, 0, target.stream, p, w);
}

}  // namespace exeunt::cuda
