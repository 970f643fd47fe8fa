// Hidden rows before the product: what does not depend on the ISA.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Sum of f(d) over [0, width) in eight interleaved parts, so that additions overlap; always in the same order.
template <class F>
double sum_of(int64_t width, F f) {
  double part[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    for (int i = 0; i < 8; ++i) part[i] += f(d + i);
  for (int i = 0; d < width; ++d, ++i) part[i] += f(d);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// wide[0..width) = the row that begins at element `at` of hidden, without its mean (layer) and divided by its size.
// Statistics are taken in double: D is short beside the product, and squares of large hidden values cannot overflow.
inline void standardise(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps,
                        double* wide) {
  typed(hidden, dtype, [&](auto* h) {
    for (int64_t d = 0; d < width; ++d) wide[d] = to_float(h[at + d]);
  });
  if (kind == Norm::none) return;
  const double n = static_cast<double>(width);
  const double mean = kind == Norm::layer ? sum_of(width, [&](int64_t d) { return wide[d]; }) / n : 0.0;
  const double power = sum_of(width, [&](int64_t d) { return (wide[d] - mean) * (wide[d] - mean); }) / n;
  const double rstd = 1.0 / std::sqrt(power + static_cast<double>(eps));
  for (int64_t d = 0; d < width; ++d) wide[d] = (wide[d] - mean) * rstd;
}

// x[0..width) = the norm of that row, rounded once to the dtype of the weight that it will meet, as the model's own
// norm would hand it over. `wide` is scratch for `width` doubles.
inline void normalise(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm, DType weight,
                      float* x, double* wide) {
  standardise(hidden, dtype, at, width, norm.kind, norm.eps, wide);
  if (norm.weight.data)
    typed(norm.weight.data, norm.weight.dtype, [&](auto* w) {
      for (int64_t d = 0; d < width; ++d) wide[d] *= to_float(w[d * norm.weight.stride]);
    });
  if (norm.bias.data)
    typed(norm.bias.data, norm.bias.dtype, [&](auto* b) {
      for (int64_t d = 0; d < width; ++d) wide[d] += to_float(b[d * norm.bias.stride]);
    });
  for (int64_t d = 0; d < width; ++d) x[d] = static_cast<float>(wide[d]);
  if (weight == DType::bfloat16 || weight == DType::float16)
    for (int64_t d = 0; d < width; ++d) x[d] = rounded_to(weight, x[d]);
}

}  // namespace exeunt::cpu
