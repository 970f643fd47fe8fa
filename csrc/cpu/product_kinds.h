// How the streaming product multiplies weights of each dtype, where vector registers do it; and hidden rows as two int8
// planes, which tile registers share.
//
//   kind             numbers of a unit                     of a hidden row          sums
//   Float32          it is                                 float                    float
//   Bfloat16         its two elements, widened             float                    float     (no bfloat16 instruction)
//   Bfloat16Pairs    it is                                 two bfloat16             float     vdpbf16ps
//   Half             its two elements, widened             float                    float, of even and of odd D
//   Int8             its four elements, widened            float                    float     (no int8 instruction)
//   Int8Planes       it is                                 four of an int8 plane    int32     vpdpbusd
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

// ---- hidden rows as two int8 planes ---------------------------------------------------------------------------------

// Integer products are exact, so a row is split rather than rounded: q = round(x / scale), |q| <= 127 * 128, is
// 128 * high + low, both int8, and the planes are packed as two rows. Weights are stored + 128, because the
// instructions want unsigned by signed: join_planes() takes 128 * sum(plane) off again.

// The scale of a row, whose sums its parts will add to. A row that is not finite is flagged: all its products are NaN.
EXEUNT_INLINE RowScale plane_scale(const float* row, int64_t width) {
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
  return {any(strange) ? std::numeric_limits<float>::quiet_NaN() : most / (127 * 128), 0, 0};
}

// The planes of `count` elements of a row, zeros where it has no scale.
EXEUNT_INLINE void split_planes(const float* row, int64_t count, RowScale& s, int8_t* high_plane, int8_t* low_plane) {
  constexpr float kLeast = 1e-30f / (127 * 128);
  if (!(s.scale >= kLeast)) {
    __builtin_memset(high_plane, 0, static_cast<uint64_t>(count));
    __builtin_memset(low_plane, 0, static_cast<uint64_t>(count));
    return;
  }
  int32_t sum_high = 0, sum_low = 0;
  for (int64_t d = 0; d < count; ++d) {
    const float q = row[d] / s.scale;
    const int rounded = static_cast<int>(q < 0.0f ? q - 0.5f : q + 0.5f);
    const int high = (rounded + 64 + (128 << 8)) / 128 - 256, low = rounded - 128 * high;  // low in [-64, 63]
    high_plane[d] = static_cast<int8_t>(high);
    low_plane[d] = static_cast<int8_t>(low);
    sum_high += high;
    sum_low += low;
  }
  s.sum_high += sum_high;
  s.sum_low += sum_low;
}

// z[0..15] and z[16..31] hold the integer sums of a row's planes; z[0..15] becomes their product.
EXEUNT_INLINE void join_planes(float* z, const RowScale& s, const float* weight_scale) {
  for (int i = 0; i < kTile; ++i) {
    int32_t high, low;
    __builtin_memcpy(&high, z + i, sizeof high);
    __builtin_memcpy(&low, z + kTile + i, sizeof low);
    const float q = static_cast<float>(high - 128 * s.sum_high) * 128.0f + static_cast<float>(low - 128 * s.sum_low);
    z[i] = q * s.scale * weight_scale[i];
  }
}

// ---- kinds ----------------------------------------------------------------------------------------------------------

// kPlanes    packed rows per hidden row
// kNumbers   of a unit
// kChains    sums that the numbers of a product go to in turns
// kSums      registers of sums over a tile's 16 columns
// add        a register of sums += weights times hidden numbers
// add_spread the same with kChains hidden numbers that lie in memory, spread over the lanes
// numbers    kLanes numbers of a weight row as it lies
// turned     a unit of kLanes columns -> kSums registers for each kChains of its numbers, kSums apart
// put        a hidden row's numbers up to the end of the last line: number n goes to n / kChains * step +
//            n % kChains * next
// finish     scales the products of 16 columns

template <int Numbers, int Chains>
struct FloatKind {
  using Sum = Vec;
  static constexpr int kPlanes = 1, kNumbers = Numbers, kChains = Chains, kSums = kTile * Chains / kLanes;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) { sum += w * x; }
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) { sum += w * spread<Chains>(number); }
  EXEUNT_INLINE void finish(float*, const RowScale&, const float*) {}
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* const* out, int64_t step, int64_t next,
                         RowScale&) {
    for (int64_t n = 0; n < numbers; n += Chains)
      for (int64_t i = 0; i < Chains; ++i) {
        const float value = n + i < width ? row[n + i] : 0.0f;
        __builtin_memcpy(out[0] + n / Chains * step + i * next, &value, sizeof value);
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

struct Int8 : FloatKind<4, 1> {
  EXEUNT_INLINE Vec numbers(const char* p) {
    uint8_t __attribute__((vector_size(kLanes))) bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, IVec) - 128, Vec);
  }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) {
    for (int i = 0; i < kNumbers; ++i)
      to[i * kSums] = __builtin_convertvector(bits<IVec>(unit >> (8 * i) & 0xffu) - 128, Vec);
  }
  EXEUNT_INLINE void finish(float* z, const RowScale&, const float* weight_scale) {
    for (int i = 0; i < kTile; ++i) z[i] *= weight_scale[i];
  }
};

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
// Units that an instruction multiplies as they are.
template <class SumOf>
struct UnitKind {
  using Sum = SumOf;
  static constexpr int kNumbers = 1, kChains = 1, kSums = 1;
  EXEUNT_INLINE Sum numbers(const char* p) { return vector_at<Sum>(p); }
  EXEUNT_INLINE void turned(UVec unit, Vec* to) { to[0] = bits<Vec>(unit); }
  // The numbers of a line, `step` bytes apart.
  EXEUNT_INLINE void scatter(const void* line, char* to, int64_t step) {
    for (int64_t u = 0; u < kUnits; ++u)
      __builtin_memcpy(to + u * step, static_cast<const char*>(line) + u * kUnit, kUnit);
  }
};
#endif

#if defined(__AVX512BF16__)
// Two products and a float32 sum in each lane. The row was rounded to bfloat16 before.
struct Bfloat16Pairs : UnitKind<Vec> {
  static constexpr int kPlanes = 1;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
  // Spread by the instruction itself, which GCC does not know: an instruction of its own takes a third as long again.
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) {
    asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const float*>(number)), "v"(w));
  }
  EXEUNT_INLINE void finish(float*, const RowScale&, const float*) {}
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* const* out, int64_t step, int64_t,
                         RowScale&) {
    for (int64_t n = 0; n < numbers; n += kUnits) {  // a line at a time: the rounding is vectorised
      BFloat16 line[2 * kUnits] = {};
      const int64_t left = width - 2 * n, count = left < 2 * kUnits ? left : 2 * kUnits;
      for (int64_t d = 0; d < count; ++d) line[d] = to_bfloat16(row[2 * n + d]);
      scatter(line, out[0] + n * step, step);
    }
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8Planes : UnitKind<IVec> {
  static constexpr int kPlanes = 2;
  EXEUNT_INLINE void add(Sum& sum, IVec w, IVec x) {
    sum = (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
  EXEUNT_INLINE void add_spread(Sum& sum, Vec w, const char* number) {
    asm("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(sum) : "m"(*reinterpret_cast<const float*>(number)), "v"(w));
  }
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t numbers, char* const* out, int64_t step, int64_t,
                         RowScale& s) {
    s = plane_scale(row, width);
    for (int64_t n = 0; n < numbers; n += kUnits) {
      int8_t high[4 * kUnits] = {}, low[4 * kUnits] = {};
      const int64_t left = width - 4 * n, count = left < 4 * kUnits ? left : 4 * kUnits;
      split_planes(row + 4 * n, count, s, high, low);
      scatter(high, out[0] + n * step, step);
      scatter(low, out[1] + n * step, step);
    }
  }
  EXEUNT_INLINE void finish(float* z, const RowScale& s, const float* weight_scale) { join_planes(z, s, weight_scale); }
};
#endif

}  // namespace
}  // namespace exeunt::cpu::EXEUNT_ISA
