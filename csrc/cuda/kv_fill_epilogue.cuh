// What kv_fill does with the products of a tile of heads, in the registers that they come in: what a stock layer does
// to keys and values before it hands them to the cache.
//
//   values   + bias                                       -> rounded, into the cache
//   keys     + bias -> norm over the head -> rotary embedding -> likewise
//
//   norm     a thread's elements -> over the eight lanes of a row -> shared memory -> over the head's warps, in order;
//            a head of several tiles waits in shared memory until its last tile is there
//
// Hazard: the sums in shared memory are read behind a barrier, and written again only after one of the next tile's
// product. No two rows share a slot; the caller sees to that.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/params.h"
#include "cuda/product.cuh"
#include "cuda/rows.cuh"

namespace exeunt::cuda {

// Which elements of which head a warp's 32 rows of a tile are: both ends of pairs first_pair .. first_pair + 15.
struct KvWarp {
  bool keys;
  int head;  // `heads` or more where there is none
  int first_pair;
};

// How the keys' heads of a layer, and its values' heads behind them, lie in tiles.
struct KvHeads {
  int heads, size, rotary;
  bool interleaved;
  int warps, tiles, at_once;  // of a head; tiles of a head and heads of a tile, one of which is 1

  // Of a layer and a block of rows: an item is `tiles` tiles.
  EXEUNT_HOST_DEVICE int items() const { return 2 * ((heads + at_once - 1) / at_once); }

  // Which head of a tile a warp of it works on; `at_once` for none.
  __device__ int place(int warp) const { return tiles > 1 ? 0 : warp / warps; }

  __device__ KvWarp warp(int tile, int warp) const {
    const int item = tile / tiles, half = items() / 2, head = item % half * at_once + place(warp);
    return {item < half, place(warp) < at_once ? head : heads,
            16 * (tiles > 1 ? tile % tiles * kWarps + warp : warp % warps)};
  }
  // End i of pair u of a warp, -1 where there is none: pairs of the rotary embedding first.
  __device__ int element(const KvWarp& warp, int u, int i) const {
    const int pair = warp.first_pair + u, rotated = rotary / 2;
    if (warp.head >= heads) return -1;
    if (pair < rotated) return interleaved ? 2 * pair + i : pair + i * rotated;
    const int rest = pair - rotated, apart = (size - rotary + 1) / 2, at = rotary + rest + i * apart;
    return rest < apart && at < size ? at : -1;
  }
};

// A row that owes something, and where it goes.
struct KvRow {
  int64_t source, batch_row, slot;
  RowStatistics norm;
};

struct KvWorkspace {
  KvRow* rows;      // [N], by first layer
  int64_t* served;  // [until] how many of them a layer serves
  int64_t* begins;  // [until + 1] where a layer's items begin
  char* x;          // [layers of a launch, padded, x_width], of the weights' dtype
  int64_t padded, x_width, block_rows;
  int64_t first, end;  // layers of a launch
  KvHeads heads;
};

constexpr int kMaxLayers = 128;  // of a launch

struct KvTables {
  KvRotary layer[kMaxLayers];
};

// The (layer, tile, row block) triples that a thread block works through; see kv_fill.cuh.
struct KvJobs {
  const int64_t *served, *begins;
  int64_t block_rows, items;
  int64_t item = 0, layer = 0, block = 0;
  int tiles, tile = 0, end = 0;

  __device__ explicit KvJobs(const KvWorkspace& w)
      : served(w.served),
        begins(w.begins),
        block_rows(w.block_rows),
        items(w.begins[w.end]),
        layer(w.first),
        tiles(w.heads.tiles) {
    start(w.begins[w.first] + blockIdx.x);
  }
  __device__ bool done() const { return item >= items; }
  __device__ void start(int64_t i) {
    item = i;
    if (done()) return;
    while (item >= begins[layer + 1]) ++layer;
    const int64_t blocks = (served[layer] + block_rows - 1) / block_rows, within = item - begins[layer];
    block = within % blocks;
    tile = static_cast<int>(within / blocks) * tiles;
    end = tile + tiles;
  }
  __device__ void next() {
    if (++tile == end) start(item + gridDim.x);
  }
};

template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return to_bfloat16(value);
  else if constexpr (std::is_same_v<T, Float16>)
    return to_float16(value);
  else
    return value;
}

template <class T, int kRows>
class KvFillEpilogue {
 public:
  // Of shared memory, for the constructor's `scratch`: two kinds of sums by warp and row, and what waits of a head.
  static constexpr int scratch_bytes(int tiles_of_a_head) {
    return 2 * kWarps * kRows * static_cast<int>(sizeof(double)) +
           (tiles_of_a_head - 1) * kThreads * kRows * static_cast<int>(sizeof(float));
  }

  __device__ KvFillEpilogue(const KvFillParams& p, const KvWorkspace& w, const KvTables& tables, char* scratch)
      : p_(p),
        w_(w),
        tables_(tables),
        sums_(reinterpret_cast<double*>(scratch)),
        powers_(sums_ + kWarps * kRows),
        held_(reinterpret_cast<float*>(powers_ + kWarps * kRows)) {}

  __device__ void operator()(const KvJobs& job, Accumulator<kRows>& acc) const {
    const Elements own(*this, job, job.tile);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int q = 0; q < 8; ++q) acc[q / 4][j][q % 4] += own.bias[q / 4][q % 4 / 2];
    if (!own.warp.keys || p_.key_norm == Norm::none) return finish(job, job.tile, false, acc);
    if (job.tile + 1 < job.end) {
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int q = 0; q < 8; ++q) *held(job, job.tile, j, q) = acc[q / 4][j][q % 4];
      return;
    }
    if (p_.key_norm == Norm::layer) {
      sum_up(job, acc, sums_, [](float z, int) { return static_cast<double>(z); });
      __syncthreads();
    }
    sum_up(job, acc, powers_, [&](float z, int row) {
      const double off = static_cast<double>(z) - mean(row);
      return off * off;
    });
    __syncthreads();
    // One thread for each head and row takes the root.
    for (int i = threadIdx.x; i < w_.heads.at_once * kRows; i += kThreads) {
      const double power = of_head(powers_, i / kRows, i % kRows);
      powers_[i / kRows * warps() * kRows + i % kRows] = 1.0 / sqrt(power + static_cast<double>(p_.key_eps));
    }
    __syncthreads();
    for (int tile = job.end - w_.heads.tiles; tile < job.end; ++tile) finish(job, tile, true, acc);
  }

 private:
  // What a thread holds of a tile: with u = g + 8 b, both ends i of two pairs.
  struct Elements {
    KvWarp warp;
    int at[2][2];  // [i][b]: element of the head, -1 for none
    float bias[2][2];

    __device__ Elements(const KvFillEpilogue& e, const KvJobs& job, int tile)
        : warp(e.w_.heads.warp(tile, threadIdx.x / 32)) {
      const KvLayer& layer = e.p_.layers[job.layer];
      const void* biases = warp.keys ? layer.key_bias : layer.value_bias;
      const int64_t first = warp.head * (warp.keys ? layer.key_bias_head : layer.value_bias_head);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int element = e.w_.heads.element(warp, threadIdx.x % 32 / 4 + 8 * (q % 2), q / 2);
        at[q / 2][q % 2] = element;
        bias[q / 2][q % 2] = biases && element >= 0 ? to_float(static_cast<const T*>(biases)[first + element]) : 0.0f;
      }
    }
  };

  // Warps of a tile that share a head, and which of the tile's heads this thread's warp is with.
  __device__ int warps() const { return w_.heads.tiles > 1 ? kWarps : w_.heads.warps; }
  __device__ int place() const {
    const int place = w_.heads.place(threadIdx.x / 32);
    return place < w_.heads.at_once ? place : 0;  // a warp without a head, whose elements are none
  }

  // Mean over a head of what its warps have summed up of a row.
  __device__ double of_head(const double* sums, int place, int row) const {
    double sum = 0.0;
    for (int w = place * warps(); w < (place + 1) * warps(); ++w) sum += sums[w * kRows + row];
    return sum / static_cast<double>(w_.heads.size);
  }
  __device__ double mean(int row) const { return p_.key_norm == Norm::layer ? of_head(sums_, place(), row) : 0.0; }

  __device__ float* held(const KvJobs& job, int tile, int j, int q) const {
    return held_ + ((tile + w_.heads.tiles - job.end) * kRows + 8 * j + q) * kThreads + threadIdx.x;
  }

  // use(j, z), z[i][2 b + e] of each eight rows of a tile that waits or, if it does not, of the one in registers. Those
  // cannot be indexed, and the body is too long to unroll: each eight's sums move to j = 0 in turn, and on around.
  template <class Use>
  __device__ void each(const KvJobs& job, int tile, bool waits, Accumulator<kRows>& acc, Use use) const {
#pragma unroll 1
    for (int j = 0; j < kRows / 8; ++j) {
      float z[2][4];
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        z[q / 4][q % 4] = waits ? *held(job, tile, j, q) : acc[q / 4][0][q % 4];
        const float first = acc[q / 4][0][q % 4];
#pragma unroll
        for (int k = 0; k + 1 < kRows / 8; ++k) acc[q / 4][k][q % 4] = acc[q / 4][k + 1][q % 4];
        acc[q / 4][kRows / 8 - 1][q % 4] = first;
      }
      use(j, z);
    }
  }

  // sums[warp][row] of term(z, row) over the warp's elements of a head, all its tiles.
  template <class Term>
  __device__ void sum_up(const KvJobs& job, Accumulator<kRows>& acc, double* sums, Term term) const {
    const int lane = threadIdx.x % 32;
    for (int tile = job.end - w_.heads.tiles; tile < job.end; ++tile) {
      const Elements own(*this, job, tile);
      each(job, tile, tile + 1 < job.end, acc, [&](int j, const float (&z)[2][4]) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * j + 2 * (lane % 4) + e;
          double sum = 0.0;
#pragma unroll
          for (int q = 0; q < 4; ++q)
            if (own.at[q / 2][q % 2] >= 0) sum += term(z[q / 2][q % 2 * 2 + e], row);
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
          if (lane >= 4) continue;
          double& all = sums[threadIdx.x / 32 * kRows + row];
          all = tile + w_.heads.tiles == job.end ? sum : all + sum;
        }
      });
    }
  }

  // Norm, where the sums for it are there, rotary embedding, and out.
  __device__ void finish(const KvJobs& job, int tile, bool normed, Accumulator<kRows>& acc) const {
    const Elements own(*this, job, tile);
    const KvLayer& layer = p_.layers[job.layer];
    const KvPlace& to = p_.places[job.layer];
    const KvRotary tables = own.warp.keys ? tables_.layer[job.layer - w_.first] : KvRotary{nullptr, nullptr};
    const int64_t live = w_.served[job.layer] - job.block * kRows;
    T* const out = static_cast<T*>(own.warp.keys ? to.keys : to.values) +
                   own.warp.head * (own.warp.keys ? to.key_head : to.value_head);
    float weight[2][2];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int element = own.at[q / 2][q % 2];
      weight[q / 2][q % 2] =
          normed && element >= 0
              ? to_float(static_cast<const T*>(layer.key_norm)[own.warp.head * layer.key_norm_head + element]) +
                    p_.shift
              : 1.0f;
    }
    each(job, tile, normed && tile + 1 < job.end, acc, [&](int j, float (&z)[2][4]) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * j + 2 * (threadIdx.x % 4) + e;
        if (r >= live) continue;
        const KvRow& row = w_.rows[job.block * kRows + r];
        if (row.slot >= p_.capacities[job.layer]) continue;
        T* const at = out + row.batch_row * (own.warp.keys ? to.key_row : to.value_row) +
                      row.slot * (own.warp.keys ? to.key_slot : to.value_slot);
        const double off = normed ? mean(r) : 0.0, rstd = normed ? powers_[place() * warps() * kRows + r] : 1.0;
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int first = own.at[0][b], second = own.at[1][b];
          float x = z[0][2 * b + e], y = z[1][2 * b + e];
          if (normed) {
            x = static_cast<float>((static_cast<double>(x) - off) * rstd) * weight[0][b];
            y = static_cast<float>((static_cast<double>(y) - off) * rstd) * weight[1][b];
          }
          if (tables.cos && first >= 0 && first < p_.rotary) {  // then so is the second
            const auto table = [&](const void* data, int element) {
              return value_at(data, p_.tables_dtype, row.source * p_.rotary + element);
            };
            const float turned = x * table(tables.cos, first) - y * table(tables.sin, first);
            y = y * table(tables.cos, second) + x * table(tables.sin, second);
            x = turned;
          }
          if (first >= 0) at[first] = narrow<T>(x);
          if (second >= 0) at[second] = narrow<T>(y);
        }
      }
    });
  }

  const KvFillParams& p_;
  const KvWorkspace& w_;
  const KvTables& tables_;
  double *sums_, *powers_;  // [kWarps, kRows] each
  float* held_;             // [tiles of a head - 1, kRows, kThreads]
};

}  // namespace exeunt::cuda
