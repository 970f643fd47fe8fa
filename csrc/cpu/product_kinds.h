// How the streaming product multiplies weights of each dtype where vector registers do it; and hidden rows as integers,
// which int8 weights meet there and in tile registers.
//
//   kind             numbers of a unit                     of a hidden row          sums
//   Float32          it is                                 float                    float
//   Bfloat16         its two elements, widened             float                    float     (no bfloat16 instruction)
//   Bfloat16Pairs    it is                                 two bfloat16             float     vdpbf16ps
//   Half             its two elements, widened             float                    float, of even and of odd D
//   Int8Pairs        its even and its odd elements         two of 16 bits           int32     vpmaddwd, vpdpwssd
#pragma once
#include <limits>

#include "cpu/product.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int64_t kUnit = 4, kUnits = 16;  // bytes of a unit, units of a line
constexpr int64_t kNumber = 4;             // bytes of a number

// ---- numbers -------------------------------------------------------------------------------------------------------

// What lies there, lane by lane.
template <class V>
EXEUNT_INLINE V vector_at(const char* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// `Count` numbers of a hidden or weight row, over all lanes.
template <int Count>
EXEUNT_INLINE Vec spread(const char* p) {
  if constexpr (Count == 2) {
    int64_t pair;
    int64_t __attribute__((vector_size(kLanes * 4))) pairs = {};
    __builtin_memcpy(&pair, p, sizeof pair);
    return bits<Vec>(pairs + pair);
  } else {
    float value;
    __builtin_memcpy(&value, p, sizeof value);
    return splat(value);
  }
}

// ---- hidden rows as integers ----------------------------------------------------------------------------------------

// Int8 weights meet q = round(x / scale) with |q| <= 127 * 128, so that theirs is the rounding that shows. Integer
// products are exact.

// The scale of a row. One that is not finite is flagged: all its products are NaN.
EXEUNT_INLINE float integer_scale(const float* row, int64_t width) {
  Vec largest{};
  IVec strange{};
  const auto see = [&](Vec v) __attribute__((always_inline)) {
    const Vec magnitude = v < 0.0f ? -v : v;
    strange |= ~(magnitude < std::numeric_limits<float>::infinity());  // NaN compares false
    largest = max(magnitude, largest);
  };
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) see(load(row + d));
  for (; d < width; ++d) see(splat(row[d]));
  const float most = across(largest, [](Vec a, Vec b) { return max(a, b); })[0];
  return any(strange) ? std::numeric_limits<float>::quiet_NaN() : most / (127 * 128);
}

// `count` elements of a row as integers, zeros where it has no scale.
EXEUNT_INLINE void to_integers(const float* row, int64_t count, float scale, int32_t* q) {
  constexpr float kLeast = 1e-30f / (127 * 128);
  if (!(scale >= kLeast)) {
    __builtin_memset(q, 0, static_cast<uint64_t>(count) * sizeof *q);
    return;
  }
  for (int64_t d = 0; d < count; ++d) {
    const float exact = row[d] / scale;
    q[d] = static_cast<int32_t>(exact < 0.0f ? exact - 0.5f : exact + 0.5f);
  }
}

// ---- kinds ----------------------------------------------------------------------------------------------------------

// kNumbers   of a unit
// kChains    sums that the numbers of a product go to in turns
// kSums      registers of sums over a tile's 16 columns
// Sum        one of them, over a block of kBlock numbers; total() of it is added to those of other blocks
// add_spread a register of sums += weights times kChains hidden numbers that lie in memory, spread over the lanes
// turned     a unit of kLanes columns -> kSums registers for each kChains of its numbers, kSums apart
// put        a hidden row's numbers up to the end of the last line: number n goes to n / kChains * step +
//            n % kChains * next
// finish     scales the products of 16 columns
// numbers, add (of those that a weight's row as it lies may have)
//            kLanes numbers of it; a register of sums += weights times hidden numbers

// What sums of floats have in common.
struct FloatSums {
  using Sum = Vec;
  static constexpr int kBlock = 128;
  EXEUNT_INLINE Vec total(Sum sum) { return sum; }
  EXEUNT_INLINE void finish(float*, float, const float*) {}
};

template <int Numbers, int Chains>
struct FloatKind : FloatSums {
  static constexpr int kNumbers = Numbers, kChains = Chains, kSums = kTile * Chains / kLanes;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) { sum += w * x; }
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) { sum += w * spread<Chains>(number); }
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* out, int64_t step, int64_t next,
                         float&) {
    for (int64_t n = 0; n < numbers; n += Chains)
      for (int64_t i = 0; i < Chains; ++i) {
        const float value = n + i < width ? row[n + i] : 0.0f;
        __builtin_memcpy(out + n / Chains * step + i * next, &value, sizeof value);
      }
  }
};

struct Float32 : FloatKind<1, 1> {
  EXEUNT_INLINE Vec numbers(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) { to[0] = bits<Vec>(unit); }
};

struct Half : FloatKind<2, 2> {
  EXEUNT_INLINE Vec numbers(const char* p) { return load(reinterpret_cast<const Float16*>(p)); }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) {  // even and odd elements of a column side by side
    Float16 halves[2 * kLanes];
    __builtin_memcpy(halves, &unit, sizeof unit);
    for (int i = 0; i < 2; ++i) to[i] = load(halves + i * kLanes);
  }
};

struct Bfloat16 : FloatKind<2, 1> {  // the upper half of a float
  EXEUNT_INLINE Vec numbers(const char* p) { return load(reinterpret_cast<const BFloat16*>(p)); }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) {
    to[0] = bits<Vec>(unit << 16);
    to[kSums] = bits<Vec>(unit & 0xffff0000u);
  }
};

#if defined(__AVX512BF16__)
// Two products and a float32 sum in each lane. The row was rounded to bfloat16 before.
struct Bfloat16Pairs : FloatSums {
  static constexpr int kNumbers = 1, kChains = 1, kSums = 1;
  // Spread by the instruction itself, which GCC does not know: an instruction of its own takes a third as long again.
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) {
    asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const float*>(number)), "v"(w));
  }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) { to[0] = bits<Vec>(unit); }
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* out, int64_t step, int64_t, float&) {
    for (int64_t n = 0; n < numbers; n += kUnits) {  // a line at a time: the rounding is vectorised
      BFloat16 line[2 * kUnits] = {};
      const int64_t left = width - 2 * n, count = left < 2 * kUnits ? left : 2 * kUnits;
      for (int64_t d = 0; d < count; ++d) line[d] = to_bfloat16(row[2 * n + d]);
      for (int64_t u = 0; u < kUnits; ++u) __builtin_memcpy(out + (n + u) * step, line + 2 * u, kUnit);
    }
  }
};
#endif

// Two products and an int32 sum in each lane, which holds that of a block: 256 * 2 * 127 * 127 * 128 < 2^31. Only
// packed.
struct Int8Pairs {
  using Sum = IVec;
  static constexpr int kNumbers = 2, kChains = 1, kSums = kTile / kLanes, kBlock = 256;
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) {
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const float*>(number)), "v"(w));
#else
    sum += product_of_pairs(bits<IVec>(w), bits<IVec>(spread<1>(number)));
#if defined(__x86_64__) && !defined(__AVX512F__)
    asm volatile("" : "+x"(sum));  // one after the other: GCC would have more products at a time than registers
#endif
#endif
  }
  EXEUNT_INLINE Vec total(Sum sum) { return __builtin_convertvector(sum, Vec); }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) {
    using Halves = int16_t __attribute__((vector_size(sizeof unit)));
    const Halves both = bits<Halves>(unit);
    to[0] = bits<Vec>(both << 8 >> 8);
    to[kSums] = bits<Vec>(both >> 8);
  }
  EXEUNT_INLINE void finish(float* z, float scale, const float* weight_scale) {
    for (int i = 0; i < kTile; ++i) z[i] = z[i] * scale * weight_scale[i];
  }
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* out, int64_t step, int64_t,
                         float& scale) {
    scale = integer_scale(row, width);
    for (int64_t n = 0; n < numbers; n += 2 * kUnits) {
      int32_t q[4 * kUnits] = {};
      const int64_t left = width - 2 * n;
      to_integers(row + 2 * n, left < 4 * kUnits ? left : 4 * kUnits, scale, q);
      for (int64_t i = 0; i < 2 * kUnits; ++i) {
        const int64_t first = i / 2 * 4 + i % 2;
        const int16_t pair[2] = {static_cast<int16_t>(q[first]), static_cast<int16_t>(q[first + 2])};
        __builtin_memcpy(out + (n + i) * step, pair, kNumber);
      }
    }
  }
};

}  // namespace
}  // namespace exeunt::cpu::EXEUNT_ISA
