// The streaming product: a few hidden rows times a weight that is read once, one tile of 16 weight rows at a time, or
// some of a packed weight (with tile registers: product_amx.inc; floats in parts: product_split.inc).
//
//   weight tile      16 rows x lines of 64 bytes, read as they lie or packed (WeightArg)
//   turned           [16 units][16 rows] a line instead of [16 rows][16 units]: how floats are packed for this product
//   unit             four bytes of a weight row: one float32, two halves, four int8
//   number           what a product multiplies, four bytes as well: a unit, or one float of those that it widens to
//                    (product_kinds.h)
//   block of D       128 numbers of each weight row: some lines of a tile at a time are copied into L1 as numbers
//   memory           beside products, later lines of the weight rows are fetched, one row in turn: prefetches that come
//                    in a burst fill the core's line buffers, and then memory waits
//   result           z[rows][16], handed to the epilogue while it is in L1
//
// Up to kFew hidden rows                                 More of them
//   lanes         16 weight rows: a line is turned,        hidden rows: packed kLanes side by side, number by number
//                 unless it was packed so                  (a turned line is turned back)
//   registers     R rows x 16 columns of sums; each load   W weight rows x H vectors of hidden rows; each load of a
//                 of a unit serves R rows                  vector serves W weight rows
//   spread        numbers of a hidden row                  numbers of a weight row
//   costs         the turn, as much as 8 rows' products    lanes that no row fills
//   tiles         two of a packed weight in turns, if      one
//                 their sums are few: memory gives more
//                 to two streams than to one
//
// Bits: every (row, weight row) product is a sum over blocks of D of sums in its order, whichever way lanes run and
// wherever the weight lies (floats in parts: product_split.inc), so a row's result depends neither on its neighbours
// nor on the thread.
//
// Hazard: the rows of a short tile's end are not the weight's: the epilogue masks their products. A last group may be
// larger than the rows that are left: the others are zeros.
#include "cpu/product.h"

#include <type_traits>

#include "cpu/product_kinds.h"
#include "cpu/rows.h"
#include "cpu/vec.h"
#if defined(EXEUNT_AMX)
#include "cpu/tiles.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int64_t kBlockNumbers = 128;
constexpr int kMostTiles = 4;  // of a packed weight that are taken together; vector registers take half as many
constexpr int kFew = kLanes == 16 ? 8 : 4;  // packed rows up to which lanes are weight rows
constexpr int kSumRegisters = kLanes == 16 ? 16 : 8;
// Lines that a tile's rows are fetched ahead where memory sets the time, first into L2 and then into L1. Either step
// alone leaves memory waiting: a core has few places for what it waits for, and each line takes one of them until it
// is where it was to go.
constexpr int64_t kFar = 8, kNear = 4;

// ---- weight tiles --------------------------------------------------------------------------------------------------

int64_t lines_of(DType weights, int64_t width) { return (width * element_bytes(weights) + kLine - 1) / kLine; }

// Sixteen rows of a weight, full lines only, and where the tile begins that will be read next in its place, whose first
// lines are fetched at the end of this one; it is taken to lie as this one does.
struct Tile {
  const char *data, *next;
  int64_t row_stride, line_stride;
  int64_t lines;
  bool turned;
  const float* scale;  // [16], int8 only
  int64_t at;          // its first row in the stream
  int count;
};

// Rows [at, at + count) of a stream that ends at `end` and is read `together` tiles at a time. They are read where they
// lie, or copied to `panel` first: from a list, or if the last line is short or the tile itself is. Zeros fill both:
// the epilogue does not use those products, but a multiply-add of whatever lay there (subnormal numbers, say) takes the
// processor fifty times as long. `panel` has room for the tile and sixteen scales. (A copy for tiles that many hidden
// rows read was slower.)
Tile tile_of(const Stream& s, int64_t at, int64_t end, int together, char* panel) {
  const WeightArg& w = s.weight;
  const int64_t bytes = s.width * element_bytes(w.dtype), lines = lines_of(w.dtype, s.width);
  const int count = static_cast<int>(end - at < kTile ? end - at : kTile);
  const char* base = static_cast<const char*>(w.data);
  const char* data = base + at / kTile * w.tile_stride;
  const int64_t after = at / kTile + together - (end + kTile - 1) / kTile;  // tiles from the end to the next one
  const char* next = after >= 0 && s.next ? s.next + after * w.tile_stride : data + together * w.tile_stride;
  const bool packed = w.form != WeightForm::lies, turned = w.form == WeightForm::turned;
  Tile tile{data, next, w.row_stride, w.line_stride, lines, turned, w.scale ? w.scale + at : nullptr, at, count};
  if (!s.columns && (packed || (count == kTile && bytes % kLine == 0))) return tile;
  float* scale = reinterpret_cast<float*>(panel + lines * kTile * kLine);
  for (int i = 0; i < count; ++i) {
    const int64_t v = s.columns ? s.columns[at + i] : at + i;
    const char* from = base + v / kTile * w.tile_stride + v % kTile * w.row_stride;
    char* to = panel + i * kLine;
    for (int64_t l = 0; l < lines; ++l, from += w.line_stride, to += kTile * kLine) {
      if (turned) {
        const char* unit = from - v % kTile * (w.row_stride - kUnit);
        for (int u = 0; u < kTile; ++u) __builtin_memcpy(to + u * kUnit, unit + u * kLine, kUnit);
      } else if (packed || bytes - l * kLine >= kLine) {
        __builtin_memcpy(to, from, kLine);
      } else {
        __builtin_memset(to, 0, kLine);
        __builtin_memcpy(to, from, static_cast<uint64_t>(bytes - l * kLine));
      }
    }
    if (w.scale) scale[i] = w.scale[v];
  }
  for (int64_t l = 0; count < kTile && l < lines; ++l)
    __builtin_memset(panel + (l * kTile + count) * kLine, 0, static_cast<uint64_t>((kTile - count) * kLine));
  tile.data = panel;
  tile.row_stride = kLine;
  tile.line_stride = kTile * kLine;
  tile.turned = false;
  if (w.scale) tile.scale = scale;
  return tile;
}

// ---- what every product does ----------------------------------------------------------------------------------------

// Memory that a group of rows will be packed to, a few bytes of each line at a time: stores that miss wait one by one.
EXEUNT_INLINE void fetch_to_write(char* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(to + at, 1, 3);
}

// Products to the epilogue; of the next tile so many lines have been fetched.
EXEUNT_INLINE void hand_on(const Tile& tile, float (*z)[kTile], Epilogue epilogue, int64_t fetched) {
  epilogue.call(epilogue.self, tile.at, tile.count, z,
                {tile.next + fetched * tile.line_stride, tile.row_stride, tile.line_stride});
}

// The same with products that have yet to be scaled, or those of planes one after the other.
template <class K>
EXEUNT_INLINE void hand_over(const Tile& tile, PackedRows x, int64_t first, int64_t rows, float (*z)[kTile],
                             Epilogue epilogue, int64_t fetched) {
  for (int64_t r = 0; r < rows; ++r) {
    K::finish(z[r * K::kPlanes], x.scale[first + r], tile.scale);
    if (K::kPlanes > 1) __builtin_memmove(z[r], z[r * K::kPlanes], sizeof z[r]);
  }
  hand_on(tile, z, epilogue, fetched);
}

// ---- the product in vector registers --------------------------------------------------------------------------------

// Where line l of a tile begins, or of the next one where this one is over.
EXEUNT_INLINE const char* line_of(const Tile& tile, int64_t l) {
  return l < tile.lines ? tile.data + l * tile.line_stride : tile.next + (l - tile.lines) * tile.line_stride;
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

// One line of a tile: [16 rows][16 units] -> [16 units][16 rows], or back. Not inlined: it needs all registers.
[[gnu::noinline]] static void turn_line(const char* from, int64_t row_stride, char* to) {
  for (int rows = 0; rows < kTile; rows += kLanes)
    for (int units = 0; units < kTile; units += kLanes) {
      UVec v[kLanes];
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(v + i, from + (rows + i) * row_stride + units * kUnit, sizeof v[i]);
      transpose(v);
      for (int i = 0; i < kLanes; ++i) __builtin_memcpy(to + (units + i) * kLine + rows * kUnit, v + i, sizeof v[i]);
    }
}

template <class K>
struct VectorProduct {
  using Sum = typename K::Sum;
  static constexpr int64_t kRows = kMaxRows / K::kPlanes;
  static void begin(int64_t) {}
  static void end() {}
  static int packed_tiles(int64_t rows) {
    return rows * K::kPlanes <= kFew && two_of(group_of(rows * K::kPlanes)) ? 2 : 1;
  }

  EXEUNT_INLINE int64_t rows_bytes(int64_t rows, int64_t lines) {
    const int64_t size = group_of(rows * K::kPlanes);
    return (rows * K::kPlanes + size - 1) / size * size * row_bytes(lines);
  }

  EXEUNT_INLINE void pack_row(const float* row, int64_t width, int64_t lines, int64_t n, PackedRows x) {
    const int64_t all = x.rows * K::kPlanes, numbers = lines * kLineNumbers, size = group_of(all);
    // Number by number, or where lanes are weight rows by kChains of them, the rows of a group lie side by side.
    const int64_t inner = all > kFew ? kNumber : K::kChains * kNumber, next = all > kFew ? size * kNumber : kNumber;
    const int64_t step = size * K::kChains * kNumber;
    char* out[K::kPlanes];  // planes of a row are of one group
    for (int64_t i = 0; i < K::kPlanes; ++i) {
      const int64_t at = n * K::kPlanes + i;
      out[i] = x.data + at / size * size * row_bytes(lines) + at % size * inner;
    }
    if (n * K::kPlanes % size == 0) fetch_to_write(out[0], size * row_bytes(lines));
    K::put(row, width, numbers, out, step, next, x.scale[n]);
    if (n + 1 == x.rows)
      for (int64_t i = all; i % size; ++i)
        for (int64_t s = 0; s < numbers; ++s) {
          char* group = x.data + i / size * size * row_bytes(lines) + i % size * inner;
          __builtin_memset(group + s / K::kChains * step + s % K::kChains * next, 0, kNumber);
        }
  }

  static void run(const Tile* tiles, int count, PackedRows x, int64_t first, int64_t rows, Epilogue epilogue) {
    alignas(64) float z[kMostTiles / 2][kMaxRows + kLanes][kTile];
    const int64_t all = rows * K::kPlanes;
    const char* data = x.data + first * K::kPlanes * row_bytes(tiles->lines);
    if (x.rows * K::kPlanes > kFew)
      many(*tiles, data, all, *z);
    else if (kFew == 8 && group_of(all) == 8)
      few_of<kFew>(tiles, count, data, z);
    else if (group_of(all) == 4)
      few_of<4>(tiles, count, data, z);
    else if (group_of(all) == 2)
      few_of<2>(tiles, count, data, z);
    else
      few_of<1>(tiles, count, data, z);
    for (int t = 0; t < count; ++t) hand_over<K>(tiles[t], x, first, rows, z[t], epilogue, kFar / count);
  }

 private:
  static constexpr int64_t kLineNumbers = kUnits * K::kNumbers, kBlockLines = kBlockNumbers / kLineNumbers;
  static constexpr int kMaxVecs = kMaxRows / kLanes;

  // Of a packed row.
  EXEUNT_INLINE int64_t row_bytes(int64_t lines) { return lines * kLineNumbers * kNumber; }

  // Packed rows that lie side by side, where there are so many: a few take as long as the next power of two of them.
  EXEUNT_INLINE int64_t group_of(int64_t all) {
    return all > kFew ? kLanes : all > 4 ? 8 : all > 2 ? 4 : all > 1 ? 2 : 1;
  }

  // Whether sums of R packed rows leave registers for a second tile's.
  static constexpr bool two_of(int64_t r) { return 2 * r * K::kSums <= kSumRegisters; }

  template <int R>
  EXEUNT_INLINE void few_of(const Tile* tiles, int count, const char* x, float (*z)[kMaxRows + kLanes][kTile]) {
    if constexpr (two_of(R)) {
      if (count == 2) return few<R, 2>(tiles, x, z);
    }
    few<R, 1>(tiles, x, z);
  }

  // R packed rows and T tiles in turns, lanes along a tile's 16 weight rows.
  template <int R, int T>
  EXEUNT_INLINE void few(const Tile* tiles, const char* x, float (*z)[kMaxRows + kLanes][kTile]) {
    constexpr int kSteps = K::kNumbers / K::kChains, kVecs = kTile / kLanes;
    alignas(64) char turned[kTile * kLine];
    Sum sums[T][R][K::kSums] = {};
    for (int64_t begin = 0; begin < tiles->lines; begin += kBlockLines) {
      Sum sum[T][R][K::kSums] = {};
      for (int64_t l = begin; l < begin + kBlockLines && l < tiles->lines; ++l, x += R * row_bytes(1)) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 2  // or the sums would be in memory
#endif
        for (int t = 0; t < T; ++t) {
          const Tile& tile = tiles[t];
          const char *far = line_of(tile, l + kFar / T), *near = line_of(tile, l + kNear / T), *number = x;
          const char* unit = tile.data + l * tile.line_stride;
          if (!tile.turned) {
            turn_line(unit, tile.row_stride, turned);
            unit = turned;
          }
          for (int64_t u = 0; u < kUnits; ++u, far += tile.row_stride, near += tile.row_stride, unit += kLine) {
            __builtin_prefetch(far, 0, 2);
            __builtin_prefetch(near, 0, 3);
            Vec w[kSteps * K::kSums];
            for (int v = 0; v < kVecs; ++v) {
              UVec columns;
              __builtin_memcpy(&columns, unit + v * kLanes * kUnit, sizeof columns);
              K::turned(columns, w + v * (K::kSums / kVecs));
            }
            for (int step = 0; step < kSteps; ++step)
              for (int r = 0; r < R; ++r, number += K::kChains * kNumber) {
                const Vec spreads = spread<K::kChains>(number);
                for (int i = 0; i < K::kSums; ++i) K::add(sum[t][r][i], w[step * K::kSums + i], spreads);
              }
          }
        }
      }
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < K::kSums; ++i) sums[t][r][i] = begin ? sums[t][r][i] + sum[t][r][i] : sum[t][r][i];
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) {
        alignas(64) float columns[K::kSums * kLanes];
        __builtin_memcpy(columns, sums[t][r], sizeof columns);
        for (int c = 0; c < kTile; ++c) z[t][r][c] = K::kChains == 2 ? columns[2 * c] + columns[2 * c + 1] : columns[c];
      }
  }

  // More packed rows, kLanes of them in a vector. A block of D of the tile goes through all of them, in passes.
  EXEUNT_INLINE void many(const Tile& tile, const char* x, int64_t all, float (*z)[kTile]) {
    alignas(64) float block[kTile][kBlockNumbers];
    Sum sums[kTile][kMaxVecs][K::kChains];
    const int64_t vecs = (all + kLanes - 1) / kLanes, vec_bytes = kLanes * row_bytes(tile.lines);
    const int64_t passes = vecs * kTile * K::kChains / kSumRegisters;
    for (int64_t begin = 0; begin < tile.lines; begin += kBlockLines) {
      const int64_t lines = tile.lines - begin < kBlockLines ? tile.lines - begin : kBlockLines;
      for (int64_t l = 0; l < lines; ++l) {
        alignas(64) char lying[kTile * kLine];
        const char* line = tile.data + (begin + l) * tile.line_stride;
        if (tile.turned) turn_line(line, kLine, lying);
        for (int w = 0; w < kTile; ++w)
          K::widen(tile.turned ? lying + w * kLine : line + w * tile.row_stride, block[w] + l * kLineNumbers);
      }
      int64_t pass = 0;
      const auto add = [&](auto h, int64_t vec) __attribute__((always_inline)) {
        constexpr int H = decltype(h)::value, W = kSumRegisters / K::kChains / H;
        const char* from = x + vec * vec_bytes + begin * kLanes * row_bytes(1);
        for (int w = 0; w < kTile; w += W, ++pass)
          add_block<W, H>(tile, begin, lines, block + w, from, vec_bytes, pass, passes, sums + w, vec);
      };
      int64_t vec = 0;
      for (; vec + 2 <= vecs; vec += 2) add(std::integral_constant<int, 2>(), vec);
      if (vec < vecs) add(std::integral_constant<int, 1>(), vec);
    }
    for (int64_t vec = 0; vec < vecs; ++vec)
      for (int w = 0; w < kTile; w += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const Sum(&sum)[K::kChains] = sums[w + i][vec];
          v[i] = bits<Vec>(sum[0]);
          if constexpr (K::kChains == 2) v[i] = sum[0] + sum[1];
        }
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(z[vec * kLanes + i] + w, v[i]);
      }
  }

  // W weight rows times H vectors of hidden rows, over a block of D. Passes share out the lines of the next block that
  // are fetched.
  template <int W, int H>
  EXEUNT_INLINE void add_block(const Tile& tile, int64_t begin, int64_t lines, const float (*block)[kBlockNumbers],
                               const char* x, int64_t vec_bytes, int64_t pass, int64_t passes,
                               Sum (*sums)[kMaxVecs][K::kChains], int64_t vec) {
    Sum sum[W][H][K::kChains] = {};
    const char* numbers = reinterpret_cast<const char*>(block);
    int64_t mine = pass;
    for (int64_t l = 0; l < lines; ++l, x += kLanes * row_bytes(1), numbers += row_bytes(1)) {
      if (l == mine) {
        mine += passes;
        add_line<W, H, true>(line_of(tile, begin + lines + l), tile.row_stride, numbers, x, vec_bytes, sum);
      } else {
        add_line<W, H, false>(nullptr, 0, numbers, x, vec_bytes, sum);
      }
    }
    for (int w = 0; w < W; ++w)
      for (int h = 0; h < H; ++h)
        for (int c = 0; c < K::kChains; ++c) {
          Sum& all = sums[w][vec + h][c];
          all = begin ? all + sum[w][h][c] : sum[w][h][c];
        }
  }

  template <int W, int H, bool Fetch>
  EXEUNT_INLINE void add_line(const char* next, int64_t row_stride, const char* numbers, const char* x,
                              int64_t vec_bytes, Sum (&sum)[W][H][K::kChains]) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
#endif
    for (int64_t u = 0; u < kUnits; ++u) {
      if constexpr (Fetch) {
        __builtin_prefetch(next, 0, 3);
        next += row_stride;
      }
      for (int n = 0; n < K::kNumbers; ++n, x += kLanes * kNumber, numbers += kNumber) {
        Vec hidden[H];
        for (int h = 0; h < H; ++h) __builtin_memcpy(hidden + h, x + h * vec_bytes, sizeof hidden[h]);
        for (int w = 0; w < W; ++w) {
          const Vec number = spread<1>(numbers + w * (kBlockNumbers * kNumber));
          for (int h = 0; h < H; ++h) K::add(sum[w][h][n % K::kChains], number, hidden[h]);
        }
      }
    }
  }
};

#if defined(EXEUNT_AMX)
#include "cpu/product_amx.inc"
#include "cpu/product_split.inc"
#endif

// f(product) with the product that this ISA has for weights of that dtype and form.
template <class F>
EXEUNT_INLINE auto with_product(DType weights, [[maybe_unused]] WeightForm form, F&& f) {
#if defined(EXEUNT_AMX)
  if (form == WeightForm::tiles && weights == DType::float32) return f(SplitProduct<Float32Parts>());
  if (form == WeightForm::tiles && weights == DType::float16) return f(SplitProduct<Float16Parts>());
#endif
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

int64_t rows_bytes(DType weights, WeightForm form, int64_t rows, int64_t width) {
  return with_product(weights, form, [&](auto product) { return product.rows_bytes(rows, lines_of(weights, width)); });
}

void pack_row(DType weights, WeightForm form, const float* row, int64_t width, int64_t n, PackedRows x) {
  with_product(weights, form, [&](auto product) { product.pack_row(row, width, lines_of(weights, width), n, x); });
}

int64_t product_rows(const WeightArg& weight) {
  return with_product(weight.dtype, weight.form, [](auto product) { return product.kRows; });
}

void product(const Stream& stream, int64_t begin, int64_t end, PackedRows x, int64_t first, int64_t rows,
             Epilogue epilogue) {
  const WeightArg& weight = stream.weight;
  with_product(weight.dtype, weight.form, [&](auto product) {
    const bool packed = weight.form != WeightForm::lies && !stream.columns;  // the panel has room for one tile
    const int together = packed ? product.packed_tiles(x.rows) : 1;
    product.begin(x.rows);
    for (int64_t at = begin; at < end;) {
      Tile tiles[kMostTiles];
      int count = 0;
      for (; count < together && at < end; ++count, at += kTile)
        tiles[count] = tile_of(stream, at, end, together, stream.panel);
      product.run(tiles, count, x, first, rows, epilogue);
    }
    product.end();
  });
}

}  // namespace exeunt::cpu::EXEUNT_ISA
