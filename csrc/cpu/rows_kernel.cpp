// Hidden rows before the product: their norm, rounded to the dtype of the weight that they will meet.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace exeunt::cpu::EXEUNT_ISA {

void standardise(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps, double* wide) {
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

void normalise(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm, DType weight, float* x,
               double* wide) {
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

}  // namespace exeunt::cpu::EXEUNT_ISA
