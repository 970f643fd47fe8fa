// A plain layer for few rows: products (dots.h), bias and activation.
#include "cpu/dots.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

EXEUNT_INLINE Vec activated(Vec v, Activation activation) {
  if (activation == Activation::tanh) return tanh(v);
  if (activation == Activation::relu) return v < 0.0f ? splat(0.0f) : v;  // NaN stays
  if (activation == Activation::sigmoid) {
    const Vec bounded = v < -87.0f ? splat(-87.0f) : v > 87.0f ? splat(87.0f) : v;
    const Vec result = 1.0f / (1.0f + exp(-bounded));
    return v == v ? result : v;
  }
  return v;
}

}  // namespace

void linear_rows(const LinearArgs& a) {
  const LayerArg& layer = *a.layer;
  const VectorArg& bias = layer.bias;
  dots({a.x, a.x_stride, layer.inputs, a.out + a.begin, layer.outputs}, a.rows, layer.weight, a.begin, a.end);
  for (int64_t at = a.begin; at < a.end; at += kLanes) {
    const int64_t count = a.end - at < kLanes ? a.end - at : kLanes;
    const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(float);
    alignas(64) float shift[kLanes] = {}, z[kLanes] = {};
    for (int64_t i = 0; bias.data && i < count; ++i) shift[i] = value_at(bias.data, bias.dtype, (at + i) * bias.stride);
    for (int64_t r = 0; r < a.rows; ++r) {
      float* out = a.out + r * layer.outputs + at;
      __builtin_memcpy(z, out, bytes);
      store(z, activated(load(z) + load(shift), layer.activation));
      __builtin_memcpy(out, z, bytes);
    }
  }
}

}  // namespace exeunt::cpu::EXEUNT_ISA
