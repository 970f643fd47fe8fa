#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kv_fill.cuh"
#include "cuda/kv_fill.h"
#include "cuda/launch.h"

namespace exeunt::cuda {
namespace {

constexpr int64_t kPacked = 64 << 20;  // bytes of normalised rows, which stay near the multiprocessors: of L2 or about
constexpr int kFewRows = 16, kManyRows = 64;

// Layers of one launch.
int64_t group_of(int64_t layer_bytes, int64_t layers) {
  return std::clamp<int64_t>(kPacked / layer_bytes, 1, std::clamp<int64_t>(layers, 1, kMaxLayers));
}

KvHeads heads_of(const KvFillParams& p) {
  const int size = static_cast<int>(p.head_size), warps = (size + 31) / 32, tiles = (warps + kWarps - 1) / kWarps;
  return {static_cast<int>(p.heads),     size, static_cast<int>(p.rotary), p.interleaved, warps, tiles,
          tiles > 1 ? 1 : kWarps / warps};
}

struct Plan {
  KvWorkspace w;
  int64_t group, bytes;
};

Plan plan(DType dtype, int64_t rows, int64_t width, int64_t layers, char* base) {
  const int64_t x_width = round_up(width, kLine / element_bytes(dtype)),
                padded = round_up(rows, rows > kFewRows ? kManyRows : kFewRows);
  const int64_t layer_bytes = std::max<int64_t>(padded, 1) * x_width * element_bytes(dtype);
  const int64_t served = round_up(rows * static_cast<int64_t>(sizeof(KvRow)), 64);
  const int64_t begins = served + round_up(layers * static_cast<int64_t>(sizeof(int64_t)), 64);
  const int64_t x = begins + round_up((layers + 1) * static_cast<int64_t>(sizeof(int64_t)), 64);
  const int64_t group = group_of(layer_bytes, layers);
  KvWorkspace w{};
  w.rows = reinterpret_cast<KvRow*>(base);
  w.served = reinterpret_cast<int64_t*>(base + served);
  w.begins = reinterpret_cast<int64_t*>(base + begins);
  w.x = base + x;
  w.x_width = x_width;
  return {w, group, x + group * layer_bytes};
}

template <class T, int kRows>
int shared_bytes(const KvFillParams& p, const KvHeads& heads) {
  const int waiting = p.key_norm == Norm::none ? 1 : heads.tiles;
  return kStages<kRows> * kStageBytes<kRows> + KvFillEpilogue<T, kRows>::scratch_bytes(waiting);
}

template <class T, int kRows>
void launch_rows(const KvFillParams& p, KvWorkspace w, int64_t group, const Target& target) {
  const int shared = shared_bytes<T, kRows>(p, w.heads);
  w.block_rows = kRows;
  w.padded = round_up(p.rows, kRows);
  launch(&kv_plan_kernel, p.rows + 1, kThreads, kPlanScratch + static_cast<int>(p.until * int64_t{sizeof(int)}),
         target.stream, p, w);
  for (w.first = 0; w.first < p.until; w.first = w.end) {
    w.end = std::min(w.first + group, p.until);
    const int64_t layers = w.end - w.first;
    KvTables tables{};
    for (int64_t l = 0; p.tables && l < layers; ++l) tables.layer[l] = p.tables[p.one_table ? 0 : w.first + l];
    launch(&kv_pack_kernel<T>, layers * w.padded, kThreads, 0, target.stream, p, w);
    const int64_t items = layers * w.heads.items() * (w.padded / kRows);
    launch(&kv_fill_kernel<T, kRows>, std::min(items, target.resident(shared, 2)), kThreads, shared, target.stream, p,
           w, tables);
  }
}

template <class T>
void launch_typed(const KvFillParams& p, const Plan& plan, const Target& target) {
  // A head of several tiles, which waits in shared memory for its norm, may leave large blocks of rows no room.
  if (p.rows > kFewRows && shared_bytes<T, kManyRows>(p, plan.w.heads) <= target.block_shared)
    launch_rows<T, kManyRows>(p, plan.w, plan.group, target);
  else if (const int least = shared_bytes<T, kFewRows>(p, plan.w.heads); least <= target.block_shared)
    launch_rows<T, kFewRows>(p, plan.w, plan.group, target);
  else
    throw std::runtime_error("a norm over heads of " + std::to_string(p.head_size) + " needs " + std::to_string(least) +
                             " bytes of shared memory, the device has " + std::to_string(target.block_shared));
}

}  // namespace

int64_t kv_fill_workspace(DType dtype, int64_t rows, int64_t width, int64_t layers) {
  return plan(dtype, rows, width, layers, nullptr).bytes;
}

void kv_fill(const KvFillParams& p, int device, void* stream) {
  if (p.rows == 0 || p.until == 0) return;
  const OnDevice on_device(device);
  const Target target(device, static_cast<cudaStream_t>(stream));
  Plan made = plan(p.dtype, p.rows, p.width, p.until, static_cast<char*>(p.workspace));
  made.w.heads = heads_of(p);
  typed(nullptr, p.dtype,
        [&](auto* of) { launch_typed<std::remove_const_t<std::remove_pointer_t<decltype(of)>>>(p, made, target); });
}

}  // namespace exeunt::cuda
