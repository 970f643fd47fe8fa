// The streaming product: a few hidden rows times a weight that is read once, one tile of 16 weight rows at a time.
//
//   weight tile      16 rows x lines of 64 bytes, read as they lie or packed (WeightArg)
//   unit             four bytes of a weight row: one float32, two halves, four int8
//   block of D       some lines of a tile at a time are turned, 16 rows x 16 units -> 16 units x 16 rows, and kept in
//                    L1 as what the products want: from then on lanes are weight rows
//   hidden rows      packed once, in groups of R rows whose numbers for one unit lie side by side
//   registers        R rows x 16 columns of sums: each load of a unit serves R rows, each number of a hidden row is
//                    spread over the lanes as it is read
//   memory           beside the first group's products, lines of the weight rows are fetched ahead, one row in turn:
//                    prefetches that come in a burst fill the core's line buffers, and then memory waits
//   result           z[16] of each hidden row, handed to the epilogue while it is in L1
//
//   kind             unit is kept as                     number of a hidden row     sums
//   Float32          it is                               float                      float
//   Bfloat16         its even element, then its odd one  float                      float     (no bfloat16 instruction)
//   Bfloat16Pairs    it is                               two bfloat16               float     vdpbf16ps
//   Half             two floats, lanes side by side      two floats                 float     of even and of odd D
//   Int8             four floats, one after the other    float                      float     (no int8 instruction)
//   Int8Planes       it is                               four of an int8 plane      int32     vpdpbusd
//
// Bits: every (row, weight row) product is a sum over blocks of D of sums in its order, whatever R is and wherever the
// weight lies, so a row's result depends neither on its neighbours nor on the thread.
// Hazard: the rows of a short tile's end are not the weight's (product.h): the epilogue masks their products. A last
// group may be larger than the rows that are left: the others are zeros.
#include "cpu/product.h"

#include <limits>
#include <type_traits>

#include "cpu/vec.h"
#if defined(EXEUNT_AMX)
#include "cpu/tiles.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int64_t kUnits = 16;  // of a line
constexpr int kSumRegisters = kLanes == 16 ? 16 : 8;
constexpr int64_t kAhead = 512;  // bytes that hidden rows are fetched ahead from L2
// Lines that a tile's rows are fetched ahead, first into L2 and then into L1. Either step alone leaves memory waiting:
// a core has few places for what it waits for, and each line takes one of them until it is where it was to go.
constexpr int64_t kFar = 8, kNear = 4;
constexpr int64_t kBlockBytes = 32;  // of a hidden row's numbers, per unit and line, that a block of D brings into L1

// ---- hidden rows as two int8 planes ---------------------------------------------------------------------------------

// Integer products are exact, so a row is split rather than rounded: q = round(x / scale), |q| <= 127 * 128, is
// 128 * high + low, both int8, and the planes are packed as two rows. Weights are stored + 128, because the
// instructions want unsigned by signed: join_planes() takes 128 * sum(plane) off again.

// The scale of a row, whose sums its parts will add to. A row that is not finite is flagged: all its products are NaN.
EXEUNT_INLINE RowScale plane_scale(const float* row, int64_t width) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t d = 0; d < width; ++d) {
    const float magnitude = row[d] < 0.0f ? -row[d] : row[d];
    finite = finite && magnitude < std::numeric_limits<float>::infinity();  // NaN compares false
    largest = magnitude > largest ? magnitude : largest;
  }
  return {finite ? largest / (127 * 128) : std::numeric_limits<float>::quiet_NaN(), 0, 0};
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
EXEUNT_INLINE void join_planes(float* z, const RowScale& s, const Tile& tile) {
  for (int i = 0; i < kTile; ++i) {
    int32_t high, low;
    __builtin_memcpy(&high, z + i, sizeof high);
    __builtin_memcpy(&low, z + kTile + i, sizeof low);
    const float q = static_cast<float>(high - 128 * s.sum_high) * 128.0f + static_cast<float>(low - 128 * s.sum_low);
    z[i] = q * s.scale * tile.scale[i];
  }
}

// ---- kinds ----------------------------------------------------------------------------------------------------------

// kPlanes    packed rows per hidden row
// kSteps     products with a unit, one after the other, each with kStepBytes of a hidden row
// kSums      registers of weights of a step, and of sums, over a tile's 16 columns
// keep       a unit of kLanes columns -> what its steps will read, kSums registers apart
// spread     a row's numbers for a step, over all lanes
// put        a hidden row's numbers, step after step `stride` bytes apart, up to the end of the last line
// join       sums -> the products of 16 columns
// finish     scales them

template <int PerStep>
struct FloatKind {
  using Sum = Vec;
  static constexpr int kPlanes = 1, kStepBytes = 4 * PerStep, kSums = kTile * PerStep / kLanes;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) { sum += w * x; }
  EXEUNT_INLINE void finish(float*, const RowScale&, const Tile&) {}
  EXEUNT_INLINE Vec spread(const char* p) {
    if constexpr (PerStep == 2) {
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
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t steps, char* const* out, int64_t stride, RowScale&) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = 0; i < PerStep; ++i) {
        const float value = s * PerStep + i < width ? row[s * PerStep + i] : 0.0f;
        __builtin_memcpy(out[0] + s * stride + i * 4, &value, sizeof value);
      }
  }
  EXEUNT_INLINE void join(const Sum (&sum)[kSums], float* z) {
    alignas(64) float sums[kSums * kLanes];
    for (int i = 0; i < kSums; ++i) store(sums + i * kLanes, sum[i]);
    for (int c = 0; c < kTile; ++c) z[c] = PerStep == 2 ? sums[2 * c] + sums[2 * c + 1] : sums[c];
  }
};

struct Float32 : FloatKind<1> {
  static constexpr int kSteps = 1;
  EXEUNT_INLINE void keep(UVec unit, Vec* to) { to[0] = bits<Vec>(unit); }
};

struct Half : FloatKind<2> {
  static constexpr int kSteps = 1;
  EXEUNT_INLINE void keep(UVec unit, Vec* to) {
    Float16 halves[2 * kLanes];
    __builtin_memcpy(halves, &unit, sizeof unit);
    for (int i = 0; i < 2; ++i) to[i] = load(halves + i * kLanes);
  }
};

struct Bfloat16 : FloatKind<1> {  // the upper half of a float
  static constexpr int kSteps = 2;
  EXEUNT_INLINE void keep(UVec unit, Vec* to) {
    to[0] = bits<Vec>(unit << 16);
    to[kSums] = bits<Vec>(unit & 0xffff0000u);
  }
};

struct Int8 : FloatKind<1> {
  static constexpr int kSteps = 4;
  EXEUNT_INLINE void keep(UVec unit, Vec* to) {
    for (int i = 0; i < kSteps; ++i)
      to[i * kSums] = __builtin_convertvector(bits<IVec>(unit >> (8 * i) & 0xffu) - 128, Vec);
  }
  EXEUNT_INLINE void finish(float* z, const RowScale&, const Tile& tile) {
    for (int i = 0; i < kTile; ++i) z[i] *= tile.scale[i];
  }
};

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
// Units that an instruction multiplies as they are.
template <class SumOf>
struct UnitKind {
  using Sum = SumOf;
  static constexpr int kSteps = 1, kStepBytes = 4, kSums = 1;
  EXEUNT_INLINE void keep(UVec unit, Vec* to) { to[0] = bits<Vec>(unit); }
  EXEUNT_INLINE Vec spread(const char* p) { return FloatKind<1>::spread(p); }
  EXEUNT_INLINE void join(const Sum (&sum)[1], float* z) { __builtin_memcpy(z, sum, sizeof sum); }
};
#endif

#if defined(__AVX512BF16__)
// Two products and a float32 sum in each lane. The row was rounded to bfloat16 before.
struct Bfloat16Pairs : UnitKind<Vec> {
  static constexpr int kPlanes = 1;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
  EXEUNT_INLINE void finish(float*, const RowScale&, const Tile&) {}
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t steps, char* const* out, int64_t stride, RowScale&) {
    for (int64_t s = 0; s < steps; ++s) {
      BFloat16 pair[2] = {};
      for (int64_t d = 2 * s; d < 2 * s + 2 && d < width; ++d) pair[d % 2] = to_bfloat16(row[d]);
      __builtin_memcpy(out[0] + s * stride, pair, sizeof pair);
    }
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8Planes : UnitKind<IVec> {
  static constexpr int kPlanes = 2;
  EXEUNT_INLINE void add(Sum& sum, Vec w, Vec x) {
    sum = (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
  EXEUNT_INLINE void put(const float* row, int64_t width, int64_t steps, char* const* out, int64_t stride,
                         RowScale& s) {
    s = plane_scale(row, width);
    for (int64_t step = 0; step < steps; ++step) {
      int8_t high[4] = {}, low[4] = {};
      const int64_t left = width - 4 * step;
      if (left > 0) split_planes(row + 4 * step, left < 4 ? left : 4, s, high, low);
      __builtin_memcpy(out[0] + step * stride, high, sizeof high);
      __builtin_memcpy(out[1] + step * stride, low, sizeof low);
    }
  }
  EXEUNT_INLINE void finish(float* z, const RowScale& s, const Tile& tile) { join_planes(z, s, tile); }
};
#endif

// ---- the product of a tile with hidden rows, lanes along its 16 weight rows -----------------------------------------

// Where line l of a tile begins, or of the next one where this one is over.
EXEUNT_INLINE const char* line_of(const Tile& tile, int64_t l) {
  return l < tile.lines ? tile.data + l * tile.line_stride : tile.next + (l - tile.lines) * tile.line_stride;
}

// One line of a tile: [16 rows][16 units] -> [16 units][16 rows], as K keeps it. Not inlined: it needs all registers.
template <class K>
[[gnu::noinline]] static void turn_line(const char* from, int64_t row_stride, Vec* to) {
  constexpr int kUnit = K::kSteps * K::kSums, kVecs = kTile / kLanes;
  for (int rows = 0; rows < kVecs; ++rows)
    for (int units = 0; units < kVecs; ++units) {
      UVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(v + i, from + (rows * kLanes + i) * row_stride + units * kLanes * 4, sizeof v[i]);
      transpose(v);
      for (int i = 0; i < kLanes; ++i) K::keep(v[i], to + (units * kLanes + i) * kUnit + rows * (K::kSums / kVecs));
    }
}

template <class K>
struct VectorProduct {
  static constexpr int64_t kRows = kMaxRows / K::kPlanes;
  static void begin() {}
  static void end() {}

  EXEUNT_INLINE int64_t rows_bytes(int64_t rows, int64_t lines) {
    const int64_t all = rows * K::kPlanes, whole = all / kMost * kMost;
    return (whole + (whole < all ? group_of(all - whole) : 0)) * row_bytes(lines);
  }

  EXEUNT_INLINE void pack_row(const float* row, int64_t width, int64_t lines, int64_t n, PackedRows x) {
    const int64_t all = x.rows * K::kPlanes, steps = lines * kUnits * K::kSteps;
    const int64_t first = n * K::kPlanes / kMost * kMost, size = group_of(all - first), stride = size * K::kStepBytes;
    char* group = x.data + first * row_bytes(lines);
    char* out[K::kPlanes];  // planes of a row are of one group
    for (int64_t i = 0; i < K::kPlanes; ++i) out[i] = group + (n * K::kPlanes + i - first) * K::kStepBytes;
    K::put(row, width, steps, out, stride, x.scale[n]);
    if (n + 1 == x.rows)
      for (int64_t i = all - first; i < size; ++i)
        for (int64_t s = 0; s < steps; ++s) __builtin_memset(group + s * stride + i * K::kStepBytes, 0, K::kStepBytes);
  }

  static void run(const Tile& tile, PackedRows x, int64_t first, int64_t rows, Epilogue epilogue) {
    const int64_t all = rows * K::kPlanes;
    const char* data = x.data + first * K::kPlanes * row_bytes(tile.lines);
    Vec side[kBlockLines * kLineVecs];
    typename K::Sum sums[kMaxRows][K::kSums];
    for (int64_t begin = 0; begin < tile.lines; begin += kBlockLines) {
      const int64_t lines = begin + kBlockLines < tile.lines ? kBlockLines : tile.lines - begin;
      for (int64_t done = 0; done < all;) {
        with_group(all - done, [&](auto size) __attribute__((always_inline)) {
          constexpr int R = decltype(size)::value;
          const char* numbers = data + done * row_bytes(tile.lines) + begin * R * row_bytes(1);
          add_rows<R>(tile, begin, lines, done == 0, side, numbers, sums + done);
          done += R;
        });
      }
    }
    alignas(64) float z[K::kPlanes * kTile];
    for (int64_t r = 0; r < rows; ++r) {
      for (int plane = 0; plane < K::kPlanes; ++plane) K::join(sums[r * K::kPlanes + plane], z + plane * kTile);
      K::finish(z, x.scale[first + r], tile);
      epilogue.call(epilogue.self, r, z);
    }
  }

 private:
  static constexpr int kMost = kSumRegisters / K::kSums;  // rows of a group
  static constexpr int64_t kBlockLines = kBlockBytes / (K::kSteps * K::kStepBytes);
  static constexpr int64_t kLineVecs = kUnits * K::kSteps * K::kSums;

  // Of a packed row.
  EXEUNT_INLINE int64_t row_bytes(int64_t lines) { return lines * kUnits * K::kSteps * K::kStepBytes; }

  // f(rows of the next group), when so many are left: a few rows take as long as the next power of two of them.
  template <int R = kMost, class F>
  EXEUNT_INLINE void with_group(int64_t left, F&& f) {
    if constexpr (R > 1)
      if (R / 2 >= left) return with_group<R / 2>(left, f);
    f(std::integral_constant<int, R>());
  }
  EXEUNT_INLINE int64_t group_of(int64_t left) {
    int64_t size = 0;
    with_group(left, [&](auto rows) { size = rows(); });
    return size;
  }

  // A block of the tile with the rows of a group. The first group turns it, a line at a time, beside its own products.
  template <int R>
  EXEUNT_INLINE void add_rows(const Tile& tile, int64_t begin, int64_t lines, bool turns, Vec* side, const char* x,
                              typename K::Sum (*sums)[K::kSums]) {
    typename K::Sum sum[R][K::kSums] = {};
    for (int64_t l = 0; l < lines; ++l, side += kLineVecs) {
      const char *far = line_of(tile, begin + l + kFar), *near = line_of(tile, begin + l + kNear);
      if (turns) turn_line<K>(tile.data + (begin + l) * tile.line_stride, tile.row_stride, side);
      const Vec* w = side;
      for (int64_t u = 0; u < kUnits; ++u, far += tile.row_stride, near += tile.row_stride) {
        if (turns) {
          __builtin_prefetch(far, 0, 2);
          __builtin_prefetch(near, 0, 3);
        }
        for (int step = 0; step < K::kSteps; ++step, x += R * K::kStepBytes, w += K::kSums) {
          if constexpr (R * K::kStepBytes >= kLine) __builtin_prefetch(x + kAhead, 0, 3);
          for (int r = 0; r < R; ++r) {
            const Vec number = K::spread(x + r * K::kStepBytes);
            for (int i = 0; i < K::kSums; ++i) K::add(sum[r][i], w[i], number);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < K::kSums; ++i) sums[r][i] = begin ? sums[r][i] + sum[r][i] : sum[r][i];
  }
};

#if defined(EXEUNT_AMX)
#include "cpu/product_amx.inc"
#endif

// f(product) with the product that this ISA has for weights of that dtype.
template <class F>
EXEUNT_INLINE auto with_product(DType weights, F&& f) {
  switch (weights) {
    case DType::bfloat16:
#if defined(EXEUNT_AMX)
      return f(TileProduct<Bfloat16Tiles>());
#elif defined(__AVX512BF16__)
      return f(VectorProduct<Bfloat16Pairs>());
#else
      return f(VectorProduct<Bfloat16>());
#endif
    case DType::int8:
#if defined(EXEUNT_AMX)
      return f(TileProduct<Int8Tiles>());
#elif defined(__AVX512VNNI__)
      return f(VectorProduct<Int8Planes>());
#else
      return f(VectorProduct<Int8>());
#endif
    case DType::float16:
      return f(VectorProduct<Half>());
    default:
      return f(VectorProduct<Float32>());
  }
}

}  // namespace

int64_t rows_bytes(DType weights, int64_t rows, int64_t width) {
  return with_product(weights, [&](auto product) { return product.rows_bytes(rows, lines_of(weights, width)); });
}

void pack_row(DType weights, const float* row, int64_t width, int64_t n, PackedRows x) {
  with_product(weights, [&](auto product) { product.pack_row(row, width, lines_of(weights, width), n, x); });
}

int64_t product_rows(DType weights) {
  return with_product(weights, [](auto product) { return product.kRows; });
}

void product_begin(DType weights) {
  with_product(weights, [](auto product) { product.begin(); });
}

void product_end(DType weights) {
  with_product(weights, [](auto product) { product.end(); });
}

void product(DType weights, const Tile& tile, PackedRows x, int64_t first, int64_t rows, Epilogue epilogue) {
  with_product(weights, [&](auto product) { product.run(tile, x, first, rows, epilogue); });
}

}  // namespace exeunt::cpu::EXEUNT_ISA
