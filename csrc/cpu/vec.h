// One vector of floats as wide as the ISA this file is compiled for, in GCC/Clang vector extensions: the same source
// becomes SSE2 or NEON (4 lanes), AVX2 (8) and AVX-512 (16). Everything is static and inside the ISA's namespace.
#pragma once
#include <cstdint>
#include <limits>

#include "core/dtype.h"

namespace exeunt::cpu::EXEUNT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IVec = int32_t __attribute__((vector_size(kLanes * 4)));
using UVec = uint32_t __attribute__((vector_size(kLanes * 4)));
using Vec4 = float __attribute__((vector_size(16)));

#define EXEUNT_INLINE static inline __attribute__((always_inline))

template <class To, class From>
EXEUNT_INLINE To bits(From from) {  // the same bits under another element type
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

EXEUNT_INLINE Vec splat(float value) { return Vec{} + value; }

EXEUNT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// A vector register full of weights as floats: one Vec of float32, two of bfloat16 (even elements, then odd ones).
// Splitting a register by parity takes a shift and a mask, where widening it in order takes three shuffles; the hidden
// rows are laid out to match (lane_order() in exit_stats.cpp).
template <class W>
constexpr int kVecs = 4 / sizeof(W);
template <class W>
constexpr int kStep = kLanes * kVecs<W>;

EXEUNT_INLINE void load_weights(const float* p, Vec (&out)[1]) { out[0] = load(p); }

EXEUNT_INLINE void load_weights(const BFloat16* p, Vec (&out)[2]) {  // bfloat16 is the upper half of a float
  UVec pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  const UVec even = pairs << 16, odd = pairs & 0xffff0000u;
  out[0] = bits<Vec>(even);
  out[1] = bits<Vec>(odd);
}

// The first `count` < kStep elements, zeros after: never reads past the row.
template <class W>
EXEUNT_INLINE void load_weights_tail(const W* p, int64_t count, Vec (&out)[kVecs<W>]) {
  alignas(64) W padded[kStep<W>] = {};
  __builtin_memcpy(padded, p, sizeof(W) * static_cast<uint64_t>(count));
  load_weights(padded, out);
}

EXEUNT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

EXEUNT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

#if defined(__clang__)
#define EXEUNT_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define EXEUNT_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

// Fold a vector to four lanes: lane i holds the sum of the lanes that are i modulo 4, in a fixed order.
EXEUNT_INLINE Vec4 fold(Vec v) {
  Vec4 part[kLanes / 4];
  __builtin_memcpy(part, &v, sizeof v);
  if constexpr (kLanes == 16) return (part[0] + part[2]) + (part[1] + part[3]);
  if constexpr (kLanes == 8) return part[0] + part[1];
  return part[0];
}

// Horizontal sums of four vectors at once, as the four lanes of the result.
EXEUNT_INLINE Vec4 sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  const Vec4 ab = EXEUNT_SHUFFLE(fa, fb, 0, 4, 1, 5) + EXEUNT_SHUFFLE(fa, fb, 2, 6, 3, 7);  // a02 b02 a13 b13
  const Vec4 cd = EXEUNT_SHUFFLE(fc, fd, 0, 4, 1, 5) + EXEUNT_SHUFFLE(fc, fd, 2, 6, 3, 7);
  return EXEUNT_SHUFFLE(ab, cd, 0, 1, 4, 5) + EXEUNT_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// e^x for x in [-87, 88], relative error below 2^-22.5: x = n ln2 + r with |r| <= ln2 / 2, then a polynomial in r.
EXEUNT_INLINE Vec exp(Vec x) {
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / ln2) in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + round_magic;
  const Vec n = shifted - round_magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IVec exponent = (bits<IVec>(shifted) - 0x4b400000 + 127) << 23;
  return p * bits<Vec>(exponent);
}

// tanh: a polynomial near zero, where the quotient would cancel, (1 - 2 / (e^2|x| + 1)) beyond. NaN stays NaN.
EXEUNT_INLINE Vec tanh(Vec x) {
  const Vec magnitude = x < 0.0f ? -x : x;
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = x + x * square * p;
  const Vec doubled = 2.0f * (magnitude < 9.1f ? magnitude : splat(9.1f));  // tanh(9.1) rounds to 1
  const Vec far = 1.0f - 2.0f / (exp(doubled) + 1.0f);
  const Vec result = magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
  return x == x ? result : x;
}

}  // namespace exeunt::cpu::EXEUNT_ISA
