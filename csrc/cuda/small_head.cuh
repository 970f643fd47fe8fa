// Heads of a few classes, probes and saturation on CUDA.
//
//   normalise   a thread block per row -> x in the workspace, rounded once to the weight's dtype
//   linear      a warp per output and block of eight rows: its lanes walk along D side by side, one float32 sum a row,
//               joined over the lanes -> bias, activation -> pooled rows in the workspace, or the result
//   saturation  a thread block per row, three sums in double
//
// Each sum is that of one row and one output, always in the same order: a row's bits do not depend on its batch.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/params.h"
#include "cuda/rows.cuh"

namespace exeunt::cuda {

// Row blockIdx.x of x [N, D] of that dtype.
static __global__ void __launch_bounds__(kThreads)
    small_head_normalise_kernel(const __grid_constant__ SmallHeadParams p, void* x, DType dtype) {
  const int64_t m = blockIdx.x;
  normalise(p.hidden, p.hidden_dtype, m * p.hidden_stride, p.width, p.norm,
            reinterpret_cast<double*>(ptx::dynamic_shared()),
            [&](int64_t d, float value) { store_at(x, dtype, m * p.width + d, value); });
}

__device__ __forceinline__ float activated(Activation activation, float z) {
  switch (activation) {
    case Activation::tanh:
      return tanhf(z);
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;  // NaN stays
    case Activation::sigmoid:
      return 1.0f / (1.0f + expf(-z));
    default:
      return z;
  }
}

// out [rows, outputs] of dtype out_dtype = activation(x W^T + b), x [rows, inputs] of the weight's dtype T.
template <class T>
__global__ void __launch_bounds__(kThreads)
    linear_kernel(const __grid_constant__ LayerArg layer, const T* x, int64_t rows, void* out, DType out_dtype) {
  constexpr int kAtOnce = 8;
  const int64_t output_blocks = (layer.outputs + kWarps - 1) / kWarps;
  const int64_t output = blockIdx.x % output_blocks * kWarps + threadIdx.x / 32;
  const int64_t first = blockIdx.x / output_blocks * kAtOnce;
  if (output >= layer.outputs) return;
  const T* w =
      reinterpret_cast<const T*>(static_cast<const char*>(layer.weight.data) + output * layer.weight.row_stride);
  float sums[kAtOnce] = {};
  for (int64_t d = threadIdx.x % 32; d < layer.inputs; d += 32) {
    const float weight = to_float(w[d]);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r)
      if (first + r < rows) sums[r] = __fmaf_rn(weight, to_float(x[(first + r) * layer.inputs + d]), sums[r]);
  }
  const float bias = layer.bias.data ? value_at(layer.bias.data, layer.bias.dtype, output * layer.bias.stride) : 0.0f;
#pragma unroll
  for (int r = 0; r < kAtOnce; ++r) {
    float sum = sums[r];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0 && first + r < rows)
      store_at(out, out_dtype, (first + r) * layer.outputs + output, activated(layer.activation, sum + bias));
  }
}

static __global__ void __launch_bounds__(kThreads) saturation_kernel(const __grid_constant__ SaturationParams p) {
  double* scratch = reinterpret_cast<double*>(ptx::dynamic_shared());  // [3][kWarps]
  const int64_t m = blockIdx.x;
  double aa = 0.0, bb = 0.0, ab = 0.0;
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
    const double a = static_cast<double>(value_at(p.a, p.a_dtype, m * p.a_stride + d));
    const double b = static_cast<double>(value_at(p.b, p.b_dtype, m * p.b_stride + d));
    aa += a * a;
    bb += b * b;
    ab += a * b;
  }
  aa = block_sum(aa, scratch);
  bb = block_sum(bb, scratch + kWarps);
  ab = block_sum(ab, scratch + 2 * kWarps);
  if (threadIdx.x != 0) return;
  const double norms = sqrt(aa) * sqrt(bb);
  double cosine = ab / (norms < 1e-300 ? 1e-300 : norms);  // 0 where a row is 0; NaN stays
  if (cosine > 1.0) cosine = 1.0;
  if (cosine < -1.0) cosine = -1.0;
  p.out[m] = static_cast<float>(cosine);
}

}  // namespace exeunt::cuda
