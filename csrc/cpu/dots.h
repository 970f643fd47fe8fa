// A few rows times the rows of a small weight as it lies, lanes along their width: neither is packed or turned, which
// would cost more than a classifier's few products do.
//
//   block   R rows x C weight rows of sums in registers, at most as many as lanes; a load of either serves the other
//           side of the block
//   end     sums are added up across lanes, all of them at once: lane i becomes the total of sum i
//
// Bits: a total is one chain of vectors over the width, its lanes added in a fixed order, and then the elements that
// fill no vector, whatever the block.
#pragma once
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kDotRows = 4;

// z[row][column], rows `stride` apart, of x[row][0..width) and weight rows w.
struct DotRows {
  const float* x;
  int64_t x_stride, width;
  float* z;
  int64_t z_stride;
};

template <int R, int C, class T>
EXEUNT_INLINE void dots_block(const DotRows& a, const T* w, int64_t w_stride, float* z) {
  Vec sum[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= a.width; d += kLanes) {
    Vec x[R];
    for (int r = 0; r < R; ++r) x[r] = load(a.x + r * a.x_stride + d);
    for (int c = 0; c < C; ++c) {
      const Vec v = load(w + c * w_stride + d);
      for (int r = 0; r < R; ++r) sum[r * C + c] += x[r] * v;
    }
  }
  alignas(64) float total[kLanes];
  store(total, sum_each(sum));
  for (; d < a.width; ++d)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) total[r * C + c] += a.x[r * a.x_stride + d] * to_float(w[c * w_stride + d]);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) z[r * a.z_stride + c] = total[r * C + c];
}

// R rows with `count` weight rows, C at a time and the rest by ever fewer.
template <int R, int C, class T>
void dots_columns(const DotRows& a, const T* w, int64_t w_stride, float* z, int64_t count) {
  for (; count >= C; count -= C, w += C * w_stride, z += C) dots_block<R, C>(a, w, w_stride, z);
  if constexpr (C > 1) dots_columns<R, C / 2>(a, w, w_stride, z, count);
}

// Weight rows [begin, end).
EXEUNT_INLINE void dots(DotRows a, int64_t rows, const WeightArg& weight, int64_t begin, int64_t end) {
  typed(weight.data, weight.dtype, [&](auto* w) {
    const int64_t stride = weight.row_stride / static_cast<int64_t>(sizeof *w);
    w += begin * stride;
    for (; rows >= kDotRows; rows -= kDotRows, a.x += kDotRows * a.x_stride, a.z += kDotRows * a.z_stride)
      dots_columns<kDotRows, kLanes / kDotRows>(a, w, stride, a.z, end - begin);
    for (; rows > 0; --rows, a.x += a.x_stride, a.z += a.z_stride)
      dots_columns<1, kLanes>(a, w, stride, a.z, end - begin);
  });
}

}  // namespace
}  // namespace exeunt::cpu::EXEUNT_ISA
