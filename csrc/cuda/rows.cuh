// Hidden rows before a product: picked and normalised, all in double (csrc/cpu/rows_kernel.cpp but for weight and
// bias).
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/params.h"
#include "cuda/product.cuh"

namespace exeunt::cuda {

__device__ __forceinline__ int64_t index_at(const void* list, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(list)[i] : static_cast<const int32_t*>(list)[i];
}

// How many of the M rows are live: read on the device, so that nobody waits for it.
__device__ __forceinline__ int64_t live_rows(const ExitStatsParams& p) {
  if (!p.count) return p.rows;
  const int64_t count = index_at(p.count, p.count_64, 0);
  return count < 0 ? 0 : count < p.rows ? count : p.rows;
}

// The row of hidden (and logits_out) behind checked row m, -1 for an index out of range.
__device__ __forceinline__ int64_t hidden_row(const ExitStatsParams& p, int64_t m) {
  const int64_t row = p.row_list ? index_at(p.row_list, p.row_list_64, m) : m;
  return row >= 0 && row < p.hidden_rows ? row : -1;
}

// Sum over the block, the same in every thread; always in the same order. `scratch` [kWarps].
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

// What a norm takes off a row, and what it multiplies it with.
struct RowStatistics {
  double mean, rstd;
};

// Of the row of `width` elements that begins at element `at` of hidden, by the threads of the block, for all of them.
// Taken in double: D is short beside the product, and squares of large hidden values cannot overflow. `scratch`
// [2][kWarps].
__device__ __forceinline__ RowStatistics row_statistics(const void* data, DType dtype, int64_t at, int64_t width,
                                                        Norm norm, float eps, double* scratch) {
  const auto hidden = [&](int64_t d) { return static_cast<double>(value_at(data, dtype, at + d)); };
  RowStatistics s{0.0, 1.0};
  if (norm == Norm::layer) {
    double sum = 0.0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) sum += hidden(d);
    s.mean = block_sum(sum, scratch) / static_cast<double>(width);
  }
  if (norm != Norm::none) {
    double power = 0.0;
    for (int64_t d = threadIdx.x; d < width; d += kThreads) power += (hidden(d) - s.mean) * (hidden(d) - s.mean);
    power = block_sum(power, scratch + kWarps) / static_cast<double>(width);
    s.rstd = 1.0 / sqrt(power + static_cast<double>(eps));
  }
  return s;
}

// write(d, value) for the norm of that row, likewise.
template <class Write>
__device__ __forceinline__ void normalise(const void* data, DType dtype, int64_t at, int64_t width, const NormArg& norm,
                                          double* scratch, Write write) {
  const auto [mean, rstd] = row_statistics(data, dtype, at, width, norm.kind, norm.eps, scratch);
  const VectorArg weight = norm.weight, bias = norm.bias;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) {
    double value = (static_cast<double>(value_at(data, dtype, at + d)) - mean) * rstd;
    if (weight.data) value *= static_cast<double>(value_at(weight.data, weight.dtype, d * weight.stride));
    if (bias.data) value += static_cast<double>(value_at(bias.data, bias.dtype, d * bias.stride));
    write(d, static_cast<float>(value));
  }
}

constexpr int kNormaliseScratch = 2 * kWarps * static_cast<int>(sizeof(double));

}  // namespace exeunt::cuda
