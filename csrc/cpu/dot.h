// One row times the rows of a weight as it lies, one by one: for weights of fewer rows than a tile has, where zeros
// around them would cost more than they do.
#pragma once
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {

template <class T>
EXEUNT_INLINE float dot(const float* x, const T* w, int64_t width) {
  constexpr int kChains = 4;
  Vec sum[kChains] = {};
  int64_t d = 0;
  for (; d + kChains * kLanes <= width; d += kChains * kLanes)
    for (int i = 0; i < kChains; ++i) sum[i] += load(x + d + i * kLanes) * load(w + d + i * kLanes);
  for (; d + kLanes <= width; d += kLanes) sum[0] += load(x + d) * load(w + d);
  float rest = 0.0f;
  for (; d < width; ++d) rest += x[d] * to_float(w[d]);
  return across((sum[0] + sum[1]) + (sum[2] + sum[3]), [](Vec a, Vec b) { return a + b; })[0] + rest;
}

// z[0..end - begin) = x[0..width) times weight rows [begin, end).
EXEUNT_INLINE void dots(const float* x, int64_t width, const WeightArg& weight, int64_t begin, int64_t end, float* z) {
  typed(weight.data, weight.dtype, [&](auto* w) {
    const int64_t stride = weight.row_stride / static_cast<int64_t>(sizeof *w);
    for (int64_t v = begin; v < end; ++v) z[v - begin] = dot(x, w + v * stride, width);
  });
}

}  // namespace exeunt::cpu::EXEUNT_ISA
