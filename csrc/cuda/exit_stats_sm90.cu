#include <algorithm>

#include "cuda/exit_stats_launch.h"
#include "cuda/exit_stats_sm90.cuh"
#include "cuda/tensor_map.h"

namespace exeunt::cuda {
namespace {

template <class T, int kRows>
void launch_product(const ExitStatsParams& p, const ExitStatsWorkspace& w, int shared, const Target& target) {
  using S = Sm90<kRows>;
  const int64_t blocks = (p.rows + kRows - 1) / kRows, chunks = (w.chunks + S::kGroups - 1) / S::kGroups;
  const CUtensorMap head = tensor_map(p.head.data, p.head_rows, p.width, p.head.row_stride, kTile);
  const CUtensorMap x = tensor_map(w.x, blocks * kRows, w.x_width, w.x_width * static_cast<int64_t>(sizeof(T)), kRows);
  launch(&exit_stats_sm90_kernel<T, kRows>, std::min(chunks * blocks, target.resident(shared, S::kBlocks)),
         S::kBlockThreads, shared, target.stream, p, w, head, x);
}

template <int kRows>
int shared_bytes(const ExitStatsWorkspace& w) {
  return Sm90<kRows>::kScratch + Sm90<kRows>::kGroups * ExitStatsEpilogue<kRows, true>::scratch_bytes(w.slots);
}

template <class T>
void launch_rows(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target) {
  // Long candidate lists leave the widest blocks no room.
  if (p.rows > 64 && shared_bytes<128>(w) <= target.block_shared)
    return launch_product<T, 128>(p, w, shared_bytes<128>(w), target);
  switch (block_rows(p.rows)) {
    case 8:
      return launch_product<T, 8>(p, w, shared_bytes<8>(w), target);
    case 16:
      return launch_product<T, 16>(p, w, shared_bytes<16>(w), target);
    case 32:
      return launch_product<T, 32>(p, w, shared_bytes<32>(w), target);
    default:
      return launch_product<T, 64>(p, w, shared_bytes<64>(w), target);
  }
}

}  // namespace

bool sm90_takes(const ExitStatsParams& p, int device) {
  const int64_t row_bytes = p.width * element_bytes(p.head.dtype);
  return built_archs().find("90a") != std::string::npos && compute_capability(device) == 90 &&
         (p.head.dtype == DType::bfloat16 || p.head.dtype == DType::float16) && !p.columns && p.width > 0 &&
         (reinterpret_cast<uintptr_t>(p.head.data) | static_cast<uintptr_t>(p.head.row_stride)) % 16 == 0 &&
         p.head.row_stride >= row_bytes;
}

void exit_stats_sm90(const ExitStatsParams& p, const ExitStatsWorkspace& w, const Target& target) {
  if (p.head.dtype == DType::bfloat16)
    launch_rows<BFloat16>(p, w, target);
  else
    launch_rows<Float16>(p, w, target);
}

}  // namespace exeunt::cuda
