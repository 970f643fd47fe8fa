// Hidden rows before the product: their norm, rounded to the dtype of the weight that they will meet.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kWide = 8;
using Wide = double __attribute__((vector_size(kWide * 8)));

EXEUNT_INLINE Wide wide_at(const double* p) {
  Wide v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
EXEUNT_INLINE Wide wide_at(const float* p) {
  float __attribute__((vector_size(kWide * 4))) v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Wide);
}

// Sum of f(element) over a row of float or double in sixteen interleaved parts, so that additions overlap; always in
// the same order.
template <class T, class F>
EXEUNT_INLINE double sum_of(const T* row, int64_t width, F f) {
  Wide part[2] = {};
  int64_t d = 0;
  for (; d + 2 * kWide <= width; d += 2 * kWide)
    for (int i = 0; i < 2; ++i) part[i] += f(wide_at(row + d + i * kWide));
  for (; d < width; ++d) part[0][d % kWide] += f(Wide{} + static_cast<double>(row[d]))[0];
  const Wide s = part[0] + part[1];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// What a norm takes from each element, and multiplies it by.
struct Statistic {
  double mean, rstd;
};

template <class T>
EXEUNT_INLINE Statistic statistic(const T* row, int64_t width, Norm kind, float eps) {
  if (kind == Norm::none) return {0.0, 1.0};
  const double n = static_cast<double>(width);
  const double mean = kind == Norm::layer ? sum_of(row, width, [](Wide v) { return v; }) / n : 0.0;
  const double power = sum_of(row, width, [&](Wide v) { return (v - mean) * (v - mean); }) / n;
  return {mean, 1.0 / std::sqrt(power + static_cast<double>(eps))};
}

// values[0..count) = elements [begin, begin + count) of a vector.
void widen(const VectorArg& vector, int64_t begin, int64_t count, float* values) {
  typed(vector.data, vector.dtype, [&](auto* v) {
    int64_t d = 0;
    for (; vector.stride == 1 && d + kLanes <= count; d += kLanes) store(values + d, load(v + begin + d));
    for (; d < count; ++d) values[d] = to_float(v[(begin + d) * vector.stride]);
  });
}

}  // namespace

void standardise(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps, double* wide) {
  typed(hidden, dtype, [&](auto* h) {
    for (int64_t d = 0; d < width; ++d) wide[d] = to_float(h[at + d]);
  });
  const Statistic s = statistic(wide, width, kind, eps);
  for (int64_t d = 0; d < width; ++d) wide[d] = (wide[d] - s.mean) * s.rstd;
}

void normalise(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm, DType weight,
               float* x) {
  constexpr int64_t kStrip = 256;
  float gain[kStrip], shift[kStrip];
  for (int64_t d = 0; d < kStrip; ++d) gain[d] = 1.0f, shift[d] = 0.0f;
  widen({hidden, dtype, 1}, at, width, x);
  const Statistic s = statistic(x, width, norm.kind, norm.eps);
  const bool shifts = s.mean != 0.0 || norm.bias.data;
  for (int64_t begin = 0; begin < width; begin += kStrip) {
    const int64_t count = width - begin < kStrip ? width - begin : kStrip;
    if (norm.weight.data) widen(norm.weight, begin, count, gain);
    if (norm.bias.data) widen(norm.bias, begin, count, shift);
    float* strip = x + begin;
    if (shifts)
      for (int64_t d = 0; d < count; ++d)
        strip[d] = static_cast<float>((strip[d] - s.mean) * s.rstd * gain[d] + shift[d]);
    else
      for (int64_t d = 0; d < count; ++d) strip[d] = static_cast<float>(strip[d] * s.rstd * gain[d]);
  }
  round_to(weight, x, width);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
