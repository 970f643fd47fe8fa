// kv_fill on CUDA: the streaming product (product.cuh) over the keys' and values' weights of all skipped layers, read
// from a table of their addresses, in three launches.
//
//   plan      a thread block a row: its place among the rows by first layer, its norm's statistics, once for all
//   layers;
//             one more: how many rows each layer serves, and with that where its items begin
//   pack      a thread block a row and layer: times the layer's norm weight, rounded once -> x in the workspace
//   product   tiles of heads -> bias, norm over the head, rotary embedding -> rounded once more, into the cache
//             (kv_fill_epilogue.cuh)
//
//   item      all tiles of a head (or a tile of some heads), keys or values, for a block of rows;  layer by layer, in a
//             layer in the order of its weights, row blocks of one weight next to each other
//
//   warp's 32 rows of a tile, of one head:   16 i + u  =  element i of pair u      i = 0, 1     u = 0..15
//
// The pairs are those of the rotary embedding (half the table apart, or neighbours; then what is not rotated,
// likewise), so that both ends of each meet in one thread's registers: acc[0] and acc[1] of the layout in product.cuh.
// A head takes whole warps: up to 32 elements one, 128 four (a tile), 256 two tiles.
//
// What is not known on the host (counts, first layers, places) is read on the device, so all of it may be captured in a
// graph. Each product is one chain over D and each norm is summed in one order, so a row has the same bits in any
// batch.
#pragma once
#include "cuda/kv_fill_epilogue.cuh"

namespace exeunt::cuda {

// Whether row n owes anything.
__device__ __forceinline__ bool kv_owes(const KvFillParams& p, int64_t n) {
  return p.slots[n] >= 0 && p.from_layer[n] >= 0 && p.from_layer[n] < p.until && p.batch_rows[n] >= 0 &&
         p.batch_rows[n] < p.batch;
}

constexpr int kPlanScratch = 3 * kWarps * static_cast<int>(sizeof(double));  // and until integers

// Blocks 0..N - 1: a row each. Block N: the layers.
static __global__ void __launch_bounds__(kThreads)
    kv_plan_kernel(const __grid_constant__ KvFillParams p, const __grid_constant__ KvWorkspace w) {
  const int64_t n = blockIdx.x;
  if (n < p.rows) {
    if (!kv_owes(p, n)) return;
    double* scratch = reinterpret_cast<double*>(ptx::dynamic_shared());
    const int64_t from = p.from_layer[n];
    double before = 0.0;
    for (int64_t m = threadIdx.x; m < p.rows; m += kThreads)
      if (kv_owes(p, m) && (p.from_layer[m] < from || (p.from_layer[m] == from && m < n))) before += 1.0;
    before = block_sum(before, scratch);
    const RowStatistics statistics =
        row_statistics(p.hidden, p.hidden_dtype, n * p.hidden_stride, p.width, p.norm, p.eps, scratch + kWarps);
    if (threadIdx.x == 0) w.rows[static_cast<int64_t>(before)] = {n, p.batch_rows[n], p.slots[n], statistics};
    return;
  }
  int* owing = reinterpret_cast<int*>(ptx::dynamic_shared() + kPlanScratch);  // by first layer
  for (int64_t l = threadIdx.x; l < p.until; l += kThreads) owing[l] = 0;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < p.rows; m += kThreads)
    if (kv_owes(p, m)) atomicAdd(owing + p.from_layer[m], 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t rows = 0, items = 0;
  for (int64_t l = 0; l < p.until; ++l) {
    w.served[l] = rows += owing[l];
    w.begins[l] = items;
    items += (rows + w.block_rows - 1) / w.block_rows * w.heads.items();
  }
  w.begins[p.until] = items;
}

// Row blockIdx.x % w.padded of layer blockIdx.x / w.padded of those of this launch; zeros up to whole blocks of rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)  // or ptxas keeps to 32 registers for sm_100, and spills
    kv_pack_kernel(const __grid_constant__ KvFillParams p, const __grid_constant__ KvWorkspace w) {
  const int64_t layer = w.first + blockIdx.x / w.padded, at = blockIdx.x % w.padded, rows = w.served[layer];
  if (at >= (rows + w.block_rows - 1) / w.block_rows * w.block_rows) return;
  T* x = reinterpret_cast<T*>(w.x) + blockIdx.x * w.x_width;
  for (int64_t d = (at < rows ? p.width : 0) + threadIdx.x; d < w.x_width; d += kThreads) x[d] = T{};
  if (at >= rows) return;
  const KvRow row = w.rows[at];
  const T* weight = static_cast<const T*>(p.layers[layer].norm_weight);
  const T* bias = static_cast<const T*>(p.layers[layer].norm_bias);
#pragma unroll 4
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
    const double hidden = static_cast<double>(value_at(p.hidden, p.hidden_dtype, row.source * p.hidden_stride + d));
    double value = (hidden - row.norm.mean) * row.norm.rstd;
    if (weight) value *= static_cast<double>(to_float(weight[d])) + static_cast<double>(p.shift);
    if (bias) value += static_cast<double>(to_float(bias[d]));
    x[d] = narrow<T>(static_cast<float>(value));
  }
}

// Where the product finds the rows of a head's tile.
template <class T, int kRows>
struct KvSource {
  using Jobs = KvJobs;

  const KvFillParams& p;
  const KvWorkspace& w;

  __device__ const char* weight_row(const Jobs& jobs, int r) const {
    const KvWarp warp = w.heads.warp(jobs.tile, r / 32);
    const int element = w.heads.element(warp, r % 16, r / 16 % 2);
    if (element < 0) return nullptr;
    const KvLayer& layer = p.layers[jobs.layer];
    return static_cast<const char*>(warp.keys ? layer.key : layer.value) +
           warp.head * (warp.keys ? layer.key_head : layer.value_head) +
           element * (warp.keys ? layer.key_row : layer.value_row);
  }
  __device__ const char* hidden_rows(const Jobs& jobs) const {
    return w.x + ((jobs.layer - w.first) * w.padded + jobs.block * kRows) * w.x_width * static_cast<int64_t>(sizeof(T));
  }
  __device__ bool aligned(const Jobs& jobs) const {
    const KvLayer& layer = p.layers[jobs.layer];
    const auto all = [](const void* data, int64_t head, int64_t row) {
      return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(head | row)) % 16 == 0;
    };
    return w.heads.warp(jobs.tile, 0).keys ? all(layer.key, layer.key_head, layer.key_row)
                                           : all(layer.value, layer.value_head, layer.value_row);
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    kv_fill_kernel(const __grid_constant__ KvFillParams p, const __grid_constant__ KvWorkspace w,
                   const __grid_constant__ KvTables tables) {
  char* shared = ptx::dynamic_shared();
  const KvJobs jobs(w);
  Loader<T, T, kRows, KvSource<T, kRows>> loader({p, w}, jobs, p.width * static_cast<int64_t>(sizeof(T)),
                                                 w.x_width * static_cast<int64_t>(sizeof(T)));
  const KvFillEpilogue<T, kRows> epilogue(p, w, tables, shared + kStages<kRows> * kStageBytes<kRows>);
  product(loader, jobs, shared, epilogue);
}

}  // namespace exeunt::cuda
