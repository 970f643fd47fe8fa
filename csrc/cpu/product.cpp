// The streaming product: a few hidden rows times a weight that is read once, one tile of 16 weight rows at a time.
//
//   weight tile      16 rows x lines of 64 bytes, read as they lie or packed (WeightArg); next tile fetched ahead
//   hidden rows      packed once in the form that the weight's dtype and the ISA want: a Kind below
//   block of D       some lines of a tile at a time meet all hidden rows, so that they are read from L1 but once from
//                    beyond; a wide tile as it lies is copied side by side first (its rows share sets of L1)
//   registers        R x C sums, R hidden rows by C weight rows, R * C = kSums; lanes run along D. One or two hidden
//                    rows wait for memory alone, which is fastest read in one stream: where the weight is not packed,
//                    as few of its rows at a time as keep the adders busy
//   result           z[16] of each hidden row, handed to the epilogue while it is in L1
//
//   kind             weight line -> registers        hidden row          sums
//   Float32          as they are                     float               float
//   Bfloat16         even / odd halves as floats     float, dealt out    float        (no bfloat16 instruction)
//   Bfloat16Pairs    as they are                     bfloat16            float        vdpbf16ps
//   Half             converted                       float               float
//   Int8             converted                       float               float        (no int8 instruction)
//   Int8Planes       as they are                     two int8 planes     int32        vpdpbusd
//
// Bits: every (row, weight row) product is one chain of multiply-adds over D and one tree over the lanes, whatever R
// and C are and wherever the weight lies, so a row's result depends neither on its neighbours nor on the thread.
// Hazard: the rows of a short tile's end are not the weight's (product.h): the epilogue masks their products.
#include "cpu/product.h"

#include <limits>
#include <type_traits>

#include "cpu/vec.h"
#if defined(EXEUNT_AMX)
#include "cpu/tiles.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kSums = kLanes == 16 ? 16 : 8;  // accumulators in registers; a multiple of kLanes
constexpr int kMaxGroup = 4;                  // hidden rows that share one load of the weight
// Measured, on 48 KB of L1: a block of D, with the hidden rows' part and the sums that wait, stays there.
constexpr int64_t kFewRows = 16, kFewLines = 8, kManyLines = 12;  // lines of a block, up to so many rows and beyond
// Streams in which the next tile is fetched. Measured: cores that have tile registers read fastest in eight, into L2;
// those without (Zen 5) in one.
#if defined(EXEUNT_AMX)
constexpr int64_t kStreams = 8;
#else
constexpr int64_t kStreams = 1;
#endif
constexpr int64_t kAhead = 12 * kTile * kLine;    // bytes that a packed weight is fetched ahead
constexpr int64_t kTileInL1 = 32, kCopyRows = 8;  // beyond so many lines, from so many rows on: copy

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

// kBytes     of a weight row that one step reads      Weight, Hidden  what load() and load_row() put in registers
// kRowBytes  of the packed hidden row for that step   Sum             accumulator
// kPlanes    packed rows per hidden row               kAdds           additions to a sum in one step

struct FloatKind {
  using Sum = Vec;
  static constexpr int kPlanes = 1, kAdds = 1;
  static constexpr int64_t kRowBytes = kLanes * 4;
  struct Weight {
    Vec v;
  };
  using Hidden = Weight;
  EXEUNT_INLINE void load_row(const char* p, Hidden& x) { __builtin_memcpy(&x, p, sizeof x); }
  EXEUNT_INLINE void keep(Hidden& x) { keep_in_register(x.v); }
  EXEUNT_INLINE void add(Sum& sum, const Weight& w, const Hidden& x) { sum += w.v * x.v; }
  EXEUNT_INLINE void finish(float*, const RowScale&, const Tile&) {}
  EXEUNT_INLINE void put(const float* row, int64_t width, char* out, int64_t, RowScale&) {
    __builtin_memcpy(out, row, static_cast<uint64_t>(width) * 4);
  }
};

struct Float32 : FloatKind {
  static constexpr int64_t kBytes = kLanes * 4;
  EXEUNT_INLINE void load(const char* p, Weight& w) { __builtin_memcpy(&w, p, sizeof w); }
};

struct Half : FloatKind {
  static constexpr int64_t kBytes = kLanes * 2;
  EXEUNT_INLINE void load(const char* p, Weight& w) { w.v = EXEUNT_ISA::load(reinterpret_cast<const Float16*>(p)); }
};

struct Int8 : FloatKind {
  static constexpr int64_t kBytes = kLanes;
  EXEUNT_INLINE void load(const char* p, Weight& w) {
    uint8_t __attribute__((vector_size(kLanes))) byte;
    __builtin_memcpy(&byte, p, sizeof byte);
    w.v = __builtin_convertvector(__builtin_convertvector(byte, IVec) - 128, Vec);
  }
  EXEUNT_INLINE void finish(float* z, const RowScale&, const Tile& tile) {
    for (int i = 0; i < kTile; ++i) z[i] *= tile.scale[i];
  }
};

// A register of bfloat16 split by parity takes a shift and a mask, where widening it in order takes three shuffles;
// the hidden row is dealt out to match: the even elements of each step, then the odd ones.
struct Bfloat16 : FloatKind {
  static constexpr int kAdds = 2;
  static constexpr int64_t kBytes = kLanes * 4, kRowBytes = kLanes * 8;
  struct Weight {
    Vec even, odd;
  };
  using Hidden = Weight;
  EXEUNT_INLINE void load_row(const char* p, Hidden& x) { __builtin_memcpy(&x, p, sizeof x); }
  EXEUNT_INLINE void keep(Hidden& x) {
    keep_in_register(x.even);
    keep_in_register(x.odd);
  }
  EXEUNT_INLINE void load(const char* p, Weight& w) {  // bfloat16 is the upper half of a float
    UVec pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    w.even = bits<Vec>(pairs << 16);
    w.odd = bits<Vec>(pairs & 0xffff0000u);
  }
  EXEUNT_INLINE void add(Sum& sum, const Weight& w, const Hidden& x) {
    sum += w.even * x.even;
    sum += w.odd * x.odd;
  }
  EXEUNT_INLINE void put(const float* row, int64_t width, char* out, int64_t, RowScale&) {
    float* x = reinterpret_cast<float*>(out);
    for (int64_t d = 0; d < width; ++d) {
      const int64_t step = d / (2 * kLanes), within = d % (2 * kLanes);
      x[step * 2 * kLanes + within % 2 * kLanes + within / 2] = row[d];
    }
  }
};

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
// Weights and hidden rows that an instruction takes as they lie, a line at a time.
template <class SumOf>
struct LineKind {
  using Sum = SumOf;
  static constexpr int kAdds = 1;
  static constexpr int64_t kBytes = kLine, kRowBytes = kLine;
  struct Weight {
    __m512i v;
  };
  using Hidden = Weight;
  EXEUNT_INLINE void load(const char* p, Weight& w) { __builtin_memcpy(&w, p, sizeof w); }
  EXEUNT_INLINE void load_row(const char* p, Hidden& x) { __builtin_memcpy(&x, p, sizeof x); }
  EXEUNT_INLINE void keep(Hidden& x) { keep_in_register(x.v); }
};
#endif

#if defined(__AVX512BF16__)
// Sixteen pairs a register: two products and a float32 sum in each lane. The row was rounded to bfloat16 before.
struct Bfloat16Pairs : LineKind<Vec> {
  static constexpr int kPlanes = 1;
  EXEUNT_INLINE void add(Sum& sum, const Weight& w, const Hidden& x) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w.v, (__m512bh)x.v);
  }
  EXEUNT_INLINE void finish(float*, const RowScale&, const Tile&) {}
  EXEUNT_INLINE void put(const float* row, int64_t width, char* out, int64_t, RowScale&) {
    for (int64_t d = 0; d < width; ++d) reinterpret_cast<BFloat16*>(out)[d] = to_bfloat16(row[d]);
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8Planes : LineKind<IVec> {
  static constexpr int kPlanes = 2;
  EXEUNT_INLINE void add(Sum& sum, const Weight& w, const Hidden& x) {
    sum = (IVec)_mm512_dpbusd_epi32((__m512i)sum, w.v, x.v);
  }
  EXEUNT_INLINE void put(const float* row, int64_t width, char* out, int64_t plane_stride, RowScale& s) {
    s = plane_scale(row, width);
    split_planes(row, width, s, reinterpret_cast<int8_t*>(out), reinterpret_cast<int8_t*>(out + plane_stride));
  }
  EXEUNT_INLINE void finish(float* z, const RowScale& s, const Tile& tile) { join_planes(z, s, tile); }
};
#endif

// ---- the product of a tile with hidden rows, lanes along D -----------------------------------------------------

// R x C sums over one line of C weight rows w_stride apart and R hidden rows x_stride apart.
template <class K, int R, int C>
EXEUNT_INLINE void add_line(const char* w, int64_t w_stride, const char* x, int64_t x_stride,
                            typename K::Sum (&sum)[R][C]) {
  for (int64_t s = 0; s < kLine / K::kBytes; ++s, w += K::kBytes, x += K::kRowBytes) {
    if constexpr (R < C) {
      typename K::Hidden hidden[R];
      for (int r = 0; r < R; ++r) K::load_row(x + r * x_stride, hidden[r]);
      for (int c = 0; c < C; ++c) {
        typename K::Weight weight;
        K::load(w + c * w_stride, weight);
        for (int r = 0; r < R; ++r) K::add(sum[r][c], weight, hidden[r]);
      }
    } else {
      typename K::Weight weight[C];
      for (int c = 0; c < C; ++c) K::load(w + c * w_stride, weight[c]);
      for (int r = 0; r < R; ++r) {
        typename K::Hidden hidden;
        K::load_row(x + r * x_stride, hidden);
        K::keep(hidden);  // or the compiler reads it again for each of the C products
        for (int c = 0; c < C; ++c) K::add(sum[r][c], weight[c], hidden);
      }
    }
  }
}

// Weight rows, read one after the other as they lie, that keep the adders busy for R hidden rows.
template <class K, int R>
constexpr int in_order() {
  constexpr int kMost = kSums / R, kBusy = static_cast<int>(kLine / K::kBytes) * K::kAdds;
  return R <= 2 && kBusy < kMost ? kBusy : kMost;
}

// What will be read later, a line of each of some streams in turn, a part of it in each of `shares` passes.
struct Fetch {
  const char* at;
  int64_t apart, end;  // of the streams, in bytes
  int shares, due = 0;
  int64_t stream = 0;
  template <int Lines>
  __attribute__((always_inline)) void step() {
    if (++due < shares) return;
    due = 0;
    for (int i = 0; i < Lines; ++i) {
      __builtin_prefetch(at + stream, 0, kStreams > 1 ? 2 : 3);
      stream += apart;
      if (stream == end) stream = 0, at += kLine;
    }
  }
};

// A block of D of a tile: `lines` lines of its rows, as they lie or copied side by side.
struct Block {
  const char* data;
  int64_t row_stride, line_stride, lines;
  bool first, last;
};

// Adds the products of R hidden rows with all rows of a block to the sums in `wait`, still spread over lanes, so the
// chain of each pair stays one. After the last block z[r][i] = row i of the tile . hidden row r.
template <class K, int R, int C>
EXEUNT_INLINE void add_block(const Block& block, const char* x, int64_t x_stride, Fetch& fetch,
                             typename K::Sum (*wait)[kTile], float (*z)[kTile]) {
  using Sum = typename K::Sum;
  constexpr int64_t kLineOfRow = kLine / K::kBytes * K::kRowBytes;
  for (int c = 0; c < kTile; c += C) {
    Sum sum[R][C] = {};
    if (!block.first)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < C; ++i) sum[r][i] = wait[r][c + i];
    const char* w = block.data + c * block.row_stride;
    for (int64_t l = 0; l < block.lines; ++l) {
      fetch.step<C>();
      add_line<K>(w + l * block.line_stride, block.row_stride, x + l * kLineOfRow, x_stride, sum);
    }
    if (R * C < kSums || !block.last) {
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < C; ++i) wait[r][c + i] = sum[r][i];
      continue;
    }
    alignas(64) float out[R][C];
    for (int i = 0; i < R * C / kLanes * kLanes; i += kLanes) {
      const Sum sums = sum_each(&sum[0][0] + i);
      __builtin_memcpy(&out[0][0] + i, &sums, sizeof sums);
    }
    for (int r = 0; r < R; ++r) __builtin_memcpy(z[r] + c, out[r], sizeof out[r]);
  }
  if (R * C < kSums && block.last)
    for (int i = 0; i < R * kTile; i += kLanes) {
      const Sum sums = sum_each(&wait[0][0] + i);
      __builtin_memcpy(&z[0][0] + i, &sums, sizeof sums);
    }
}

template <class K>
struct VectorProduct {
  static constexpr int64_t kRows = kMaxRows / K::kPlanes;
  static void begin() {}
  static void end() {}

  // An odd number of lines apart, so that the rows of a group do not share L1 sets.
  EXEUNT_INLINE int64_t stride(int64_t lines) {
    return (lines * (kLine / K::kBytes * K::kRowBytes / kLine) | 1) * kLine;
  }

  EXEUNT_INLINE int64_t rows_bytes(int64_t rows, int64_t lines) { return rows * K::kPlanes * stride(lines); }

  EXEUNT_INLINE void pack_row(const float* row, int64_t width, int64_t lines, int64_t n, PackedRows x) {
    char* out = x.data + rows_bytes(n, lines);
    __builtin_memset(out, 0, static_cast<uint64_t>(rows_bytes(1, lines)));
    K::put(row, width, out, stride(lines), x.scale[n]);
  }

  static void run(const Tile& tile, PackedRows x, int64_t first, int64_t rows, Epilogue epilogue) {
    constexpr int64_t kLineOfRow = kLine / K::kBytes * K::kRowBytes;
    const int64_t step = stride(tile.lines), total = rows * K::kPlanes;
    const char* data = x.data + first * K::kPlanes * step;
    const bool few = total <= 2, as_it_lies = tile.line_stride == kLine;
    const int64_t most = few ? tile.lines : total <= kFewRows ? kFewLines : kManyLines;
    const bool copy = as_it_lies && total >= kCopyRows && tile.lines > kTileInL1;
    // In one stream, what is read in the order of its addresses (packed, or for few rows) comes into L1; else the next
    // tile comes closer.
    const bool ordered = !as_it_lies || (few && tile.row_stride == tile.lines * kLine);
    const bool goes_on = tile.next == tile.data + tile.lines * kTile * kLine;
    const int64_t size = tile.lines * kTile * kLine, apart = size / kStreams;
    Fetch fetch{kStreams == 1 && ordered && goes_on ? tile.data + kAhead : tile.next, apart, size,
                static_cast<int>(total / kMaxGroup + total % kMaxGroup / 2 + total % 2)};
    alignas(64) typename K::Sum wait[kMaxRows][kTile];
    alignas(64) float z[kMaxRows][kTile];
    alignas(64) char side[kManyLines * kTile * kLine];
    for (int64_t begin = 0; begin < tile.lines; begin += most) {
      const int64_t lines = begin + most < tile.lines ? most : tile.lines - begin;
      Block block{tile.data + begin * tile.line_stride, tile.row_stride, tile.line_stride, lines, begin == 0,
                  begin + lines == tile.lines};
      if (copy) {
        for (int i = 0; i < kTile; ++i)
          for (int64_t l = 0; l < lines; ++l)
            __builtin_memcpy(side + (l * kTile + i) * kLine, block.data + i * tile.row_stride + l * kLine, kLine);
        block.data = side;
        block.row_stride = kLine;
        block.line_stride = kTile * kLine;
      }
      int64_t done = 0;
      const auto take = [&](auto size) __attribute__((always_inline)) {
        constexpr int R = decltype(size)::value;
        const auto go = [&](auto columns) __attribute__((always_inline)) {
          add_block<K, R, decltype(columns)::value>(block, data + done * step + begin * kLineOfRow, step, fetch,
                                                    wait + done, z + done);
        };
        if (few && as_it_lies)
          go(std::integral_constant<int, in_order<K, R>()>());
        else
          go(std::integral_constant<int, kSums / R>());
        done += R;
      };
      while (total - done >= kMaxGroup) take(std::integral_constant<int, kMaxGroup>());
      if (total - done >= 2) take(std::integral_constant<int, 2>());
      if (K::kPlanes == 1 && total > done) take(std::integral_constant<int, K::kPlanes>());
    }
    for (int64_t r = 0; r < rows; ++r) {
      K::finish(z[r * K::kPlanes], x.scale[first + r], tile);
      epilogue.call(epilogue.self, r, z[r * K::kPlanes]);
    }
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
