// One vector of floats as wide as the ISA this file is compiled for, in GCC/Clang vector extensions: the same source
// becomes SSE2 or NEON (4 lanes), AVX2 (8) and AVX-512 (16). Everything is static and inside the ISA's namespace.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

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

#define EXEUNT_INLINE static inline __attribute__((always_inline, unused))  // not every ISA uses every kind

template <class To, class From>
EXEUNT_INLINE To bits(From from) {  // the same bits under another element type
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

EXEUNT_INLINE Vec splat(float value) { return value - Vec{}; }  // 0 + value would be an addition: -0 becomes 0

EXEUNT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EXEUNT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

EXEUNT_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC would spread the halves of a vector one after the other
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bits<Vec>((UVec)_mm512_maskz_cvtepu16_epi32(0xffff, narrow) << 16);
#else
  uint16_t __attribute__((vector_size(kLanes * 2))) narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return bits<Vec>(__builtin_convertvector(narrow, UVec) << 16);
#endif
}

EXEUNT_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  uint16_t __attribute__((vector_size(kLanes * 2))) narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  const UVec half = __builtin_convertvector(narrow, UVec);
  const UVec sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
  const UVec finite = bits<UVec>(bits<Vec>(rest) * 0x1p112f);
  return bits<Vec>(sign | (rest >= (0x7c00u << 13) ? rest | 0x7f800000u : finite));
#endif
}

// rounded_to() of each value; the dtype is known within each loop, so that it is vectorised.
EXEUNT_INLINE void round_to(DType dtype, float* x, int64_t count) {
  int64_t d = 0;
#if defined(__F16C__)
  for (; dtype == DType::float16 && d + 8 <= count; d += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + d), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_ps(x + d, _mm256_cvtph_ps(half));
  }
#endif
  if (dtype == DType::float16)
    for (; d < count; ++d) x[d] = rounded_to(DType::float16, x[d]);
  if (dtype == DType::bfloat16)
    for (; d < count; ++d) x[d] = rounded_to(DType::bfloat16, x[d]);
}

// Half a vector from each of two places.
EXEUNT_INLINE UVec load_halves(const char* low, const char* high) {
#if defined(__AVX512F__)
  const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  return (UVec)_mm512_maskz_inserti64x4(0xff, both, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
#else
  UVec v;
  __builtin_memcpy(&v, low, sizeof v / 2);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof v / 2, high, sizeof v / 2);
  return v;
#endif
}

EXEUNT_INLINE bool any(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int l = 0; l < kLanes; ++l) found |= mask[l];
  return found != 0;
#endif
}

EXEUNT_INLINE Vec max(Vec a, Vec b) {  // b where either is NaN; GCC makes two instructions of a > b ? a : b
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// w[0] * x[0] + w[1] * x[1] of pairs of int16, lane by lane.
EXEUNT_INLINE IVec product_of_pairs(IVec w, IVec x) {
#if defined(__AVX512F__)
  return (IVec)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  return (IVec)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
  return (IVec)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  return (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}

// Shuffles of two vectors by compile-time lane numbers (of b: kLanes and up).
#if defined(__clang__)
template <int... I, class V>
EXEUNT_INLINE V shuffle(V a, V b) {
  return __builtin_shufflevector(a, b, I...);
}
#else
template <int... I, class V>
EXEUNT_INLINE V shuffle(V a, V b) {
  return __builtin_shuffle(a, b, IVec{I...});
}
#endif

// Lane I of the lower (half = 0) or upper (1) halves of a's and b's blocks of `block` lanes, side by side.
constexpr int half_lane(int lane, int block, int half) {
  const int start = lane / block * block, within = lane % block, size = block / 2;
  return within < size ? start + half * size + within : kLanes + start + half * size + within - size;
}

template <int Block, int Half, class V, int... I>
EXEUNT_INLINE V take_halves(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<half_lane(I, Block, Half)...>(a, b);
}
template <int Block, int Half, class V>
EXEUNT_INLINE V take_halves(V a, V b) {
  return take_halves<Block, Half>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Horizontal sums of kLanes vectors at once: lane i of the result is the sum of v[i], always in the same order.
template <int Count = kLanes, class V>
EXEUNT_INLINE V sum_each(V* v) {
  if constexpr (Count > 1) {
    for (int i = 0; i < Count / 2; ++i)
      v[i] = take_halves<Count, 0>(v[i], v[i + Count / 2]) + take_halves<Count, 1>(v[i], v[i + Count / 2]);
    return sum_each<Count / 2>(v);
  }
  return v[0];
}

// v[0..kLanes) with lanes l and l + Block / 2 of each block exchanged.
template <int Block, class V, int... I>
EXEUNT_INLINE V swap_halves(V v, std::integer_sequence<int, I...>) {
  return shuffle<(I ^ (Block / 2))...>(v, v);
}

// One value out of all lanes by a commutative `op`, always in the same order; it is in every lane of the result.
template <int Block = kLanes, class V, class Op>
EXEUNT_INLINE V across(V v, Op op) {
  if constexpr (Block > 1)
    return across<Block / 2>(op(v, swap_halves<Block>(v, std::make_integer_sequence<int, kLanes>())), op);
  return v;
}

// v[i][j] -> v[j][i]
template <int Block = kLanes, class V>
EXEUNT_INLINE void transpose(V* v) {
  if constexpr (Block > 1) {
    for (int start = 0; start < kLanes; start += Block)
      for (int i = start; i < start + Block / 2; ++i) {
        const V low = take_halves<Block, 0>(v[i], v[i + Block / 2]),
                high = take_halves<Block, 1>(v[i], v[i + Block / 2]);
        v[i] = low;
        v[i + Block / 2] = high;
      }
    transpose<Block / 2>(v);
  }
}

// e^x for x in [-88, 88], 0 at -88; from -87 on relative error below 2^-23: x = n ln2 + r with |r| <= ln2 / 2, then a
// polynomial in r.
EXEUNT_INLINE Vec exp(Vec x) {
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / ln2) in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + round_magic;
  const Vec n = shifted - round_magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.3814528939e-3f);
  p = p * r + 8.3687501028e-3f;
  p = p * r + 4.1668392718e-2f;
  p = p * r + 1.6666519642e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IVec exponent = (bits<IVec>(shifted) - 0x4b400000 + 127) << 23;
  return p * bits<Vec>(exponent);
}

// log of a positive normal number, relative error below 2^-22: x = m 2^n with m in [sqrt(1/2), sqrt(2)).
EXEUNT_INLINE Vec log(Vec x) {
  const IVec shifted = bits<IVec>(x) - 0x3f3504f3;
  const Vec n = __builtin_convertvector(shifted >> 23, Vec);
  const Vec m = bits<Vec>((shifted & 0x007fffff) + 0x3f3504f3);
  const Vec f = m - 1.0f, square = f * f;
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (square * f * p - 0.5f * square + n * -2.12194440e-4f) + n * 0.693359375f;
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
