// Hidden rows before the product: their norm, rounded to the dtype of the weight that they will meet.
#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kWide = kLanes / 2;
using Wide = double __attribute__((vector_size(kWide * 8)));
using Half = float __attribute__((vector_size(kWide * 4)));

EXEUNT_INLINE Half half_at(const float* p) {
  Half v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
EXEUNT_INLINE Wide wide_at(const float* p) { return __builtin_convertvector(half_at(p), Wide); }
EXEUNT_INLINE Wide wide_at(const double* p) {
  Wide v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Sum of f(element) over a row of float or double in four interleaved vectors, so that additions overlap; always in the
// same order.
template <class T, class F>
EXEUNT_INLINE double sum_of(const T* row, int64_t width, F f) {
  Wide part[4] = {};
  int64_t d = 0;
  for (; d + 4 * kWide <= width; d += 4 * kWide)
    for (int i = 0; i < 4; ++i) part[i] += f(wide_at(row + d + i * kWide));
  for (; d < width; ++d) part[d / kWide % 4][d % kWide] += f(Wide{} + static_cast<double>(row[d]))[0];
  const Wide s = (part[0] + part[1]) + (part[2] + part[3]);
  double sum = 0.0;
  for (int i = 0; i < kWide; ++i) sum += s[i];
  return sum;
}

// What a norm takes from each element, and multiplies it by.
struct Statistic {
  double mean, rstd;
};

template <class T>
EXEUNT_INLINE Statistic statistic(const T* row, int64_t width, Norm kind, float eps) {
  if (kind == Norm::none) return {0.0, 1.0};
  const double n = static_cast<double>(width);
  const auto rstd = [&](double power) { return 1.0 / std::sqrt(power / n + static_cast<double>(eps)); };
  if (kind == Norm::rms) return {0.0, rstd(sum_of(row, width, [](Wide v) { return v * v; }))};
  const double mean = sum_of(row, width, [](Wide v) { return v; }) / n;
  return {mean, rstd(sum_of(row, width, [&](Wide v) { return (v - mean) * (v - mean); }))};
}

// Elements [begin, begin + count) of a vector as floats: where they lie, or in `room`; `missing` where it is not given.
EXEUNT_INLINE const float* floats_of(const VectorArg& vector, int64_t begin, int64_t count, float missing,
                                     float* room) {
  if (!vector.data)
    for (int64_t d = 0; d < count; ++d) room[d] = missing;
  else if (vector.dtype == DType::float32 && vector.stride == 1)
    return static_cast<const float*>(vector.data) + begin;
  else
    typed(vector.data, vector.dtype, [&](auto* v) {
      int64_t d = 0;
      for (; vector.stride == 1 && d + kLanes <= count; d += kLanes) store(room + d, load(v + begin + d));
      for (; d < count; ++d) room[d] = to_float(v[(begin + d) * vector.stride]);
    });
  return room;
}

// A strip of a row, normalised; `shift` is nullptr where neither it nor the mean counts.
EXEUNT_INLINE void scale(float* strip, int64_t count, const float* gain, const float* shift, Statistic s) {
  const auto scaled = [&](auto shifts) {
    int64_t d = 0;
    for (; d + kWide <= count; d += kWide) {
      const Wide wide = wide_at(strip + d);
      Half v = __builtin_convertvector((shifts ? wide - s.mean : wide) * s.rstd, Half) * half_at(gain + d);
      if (shifts) v += half_at(shift + d);
      __builtin_memcpy(strip + d, &v, sizeof v);
    }
    for (; d < count; ++d) {
      strip[d] = static_cast<float>((strip[d] - s.mean) * s.rstd) * gain[d];
      if (shifts) strip[d] += shift[d];
    }
  };
  if (shift)
    scaled(std::true_type());
  else
    scaled(std::false_type());
}

}  // namespace

void standardise(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps, double* wide) {
  typed(hidden, dtype, [&](auto* h) {
    for (int64_t d = 0; d < width; ++d) wide[d] = to_float(h[at + d]);
  });
  const Statistic s = statistic(wide, width, kind, eps);
  for (int64_t d = 0; d < width; ++d) wide[d] = (wide[d] - s.mean) * s.rstd;
}

// Mean, power and what is left of an element once they are out are double: a large mean costs nothing.
void normalise(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm, DType weight,
               float* x) {
  constexpr int64_t kStrip = 256;
  float gain_room[kStrip], shift_room[kStrip];
  if (const float* row = floats_of({hidden, dtype, 1}, at, width, 0.0f, x); row != x)
    __builtin_memcpy(x, row, static_cast<uint64_t>(width) * sizeof(float));
  const Statistic s = statistic(x, width, norm.kind, norm.eps);
  const bool shifts = norm.kind == Norm::layer || norm.bias.data;
  for (int64_t begin = 0; begin < width && (norm.kind != Norm::none || norm.weight.data || shifts); begin += kStrip) {
    const int64_t count = width - begin < kStrip ? width - begin : kStrip;
    const float* gain = floats_of(norm.weight, begin, count, 1.0f, gain_room);
    scale(x + begin, count, gain, shifts ? floats_of(norm.bias, begin, count, 0.0f, shift_room) : nullptr, s);
  }
  round_to(weight, x, width);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
