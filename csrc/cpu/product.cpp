// The streaming product: a few hidden rows times a weight that is read once, one tile of 16 weight rows at a time, or
// some of a packed weight. Here: tiles, and which product multiplies them: vector registers with lanes along weight
// rows (product_turned.inc) or along the width (product_lying.inc), tile registers (product_amx.inc), floats in parts
// (product_split.inc).
//
//   weight tile      16 rows x lines of 64 bytes, read as they lie or packed (WeightArg)
//   turned           [16 units][16 rows] a line instead of [16 rows][16 units]: for lanes along weight rows
//   unit             four bytes of a weight row: one float32, two halves, four int8
//   memory           beside products, later lines of the weight rows are fetched, one row in turn: prefetches that come
//                    in a burst fill the core's line buffers, and then memory waits
//   result           z[rows][16] of each tile, handed to the epilogue four tiles at a time while they are in L1: after
//                    them, or beside the products of the next four
//
// Bits: every product of a row and a weight row is a sum in an order that depends on D and on which product multiplies,
// so a row's result depends neither on its neighbours nor on the thread.
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
  Tile tile{data, next, w.row_stride, w.line_stride, lines, w.scale ? w.scale + at : nullptr, at, count};
  const bool packed = w.form != WeightForm::lies;
  if (!s.columns && (packed || (count == kTile && bytes % kLine == 0))) return tile;
  float* scale = reinterpret_cast<float*>(panel + lines * kTile * kLine);
  if (count < kTile) __builtin_memset(panel, 0, static_cast<uint64_t>(lines * kTile * kLine));
  for (int i = 0; i < count; ++i) {
    const int64_t v = s.columns ? s.columns[at + i] : at + i;
    const char* from = base + v / kTile * w.tile_stride;
    char* to = panel;
    for (int64_t l = 0; l < lines; ++l, from += w.line_stride, to += kTile * kLine) {
      if (w.form == WeightForm::turned) {
        for (int64_t u = 0; u < kUnits; ++u)
          __builtin_memcpy(to + u * kLine + i * kUnit, from + u * kLine + v % kTile * kUnit, kUnit);
      } else if (const int64_t left = packed ? kLine : bytes - l * kLine; left >= kLine) {
        __builtin_memcpy(to + i * kLine, from + v % kTile * w.row_stride, kLine);
      } else {
        __builtin_memset(to + i * kLine, 0, kLine);
        __builtin_memcpy(to + i * kLine, from + v % kTile * w.row_stride, static_cast<uint64_t>(left));
      }
    }
    if (w.scale) scale[i] = w.scale[v];
  }
  tile.data = panel;
  tile.row_stride = kLine;
  tile.line_stride = kTile * kLine;
  if (w.scale) tile.scale = scale;
  return tile;
}

// ---- what every product does ----------------------------------------------------------------------------------------

// Memory that a group of rows will be packed to, a few bytes of each line at a time: stores that miss wait one by one.
EXEUNT_INLINE void fetch_to_write(char* to, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(to + at, 1, 3);
}

// Where line l of a tile begins, or of the next one where this one is over.
EXEUNT_INLINE const char* line_of(const Tile& tile, int64_t l) {
  return l < tile.lines ? tile.data + l * tile.line_stride : tile.next + (l - tile.lines) * tile.line_stride;
}

// The group whose epilogue is under way.
class Pending {
 public:
  Pending(const Epilogue& epilogue, int64_t rows) : epilogue_(epilogue), rows_(epilogue.row ? rows : 0), row_(rows_) {}
  // Rows that the one before has left come first.
  void begin(const Group& group, const Ahead& ahead) {
    end(ahead);
    group_ = group;
    row_ = 0;
    epilogue_.begin(epilogue_.self, group_, ahead);
  }
  // One more of its rows, if there is one.
  inline __attribute__((always_inline)) void row() {
    if (row_ < rows_) epilogue_.row(epilogue_.self, group_, row_++);
  }
  void end(const Ahead& ahead) {
    while (row_ < rows_) {
      ahead.fetch(row_);
      row();
    }
  }

 private:
  const Epilogue& epilogue_;
  const int64_t rows_;
  int64_t row_;  // the next one
  Group group_{};
};

#include "cpu/product_lying.inc"
#include "cpu/product_turned.inc"
#if defined(EXEUNT_AMX)
#include "cpu/product_amx.inc"
#include "cpu/product_split.inc"
#endif

// How vector registers multiply a weight that is not turned. Lanes along its width save the turn, which with few hidden
// rows takes longer than the products, and cost the sums across lanes, which with many take longer than the turn would.
// Vectors of sixteen lanes turn lines fast enough, but for those of float16, which hold twice as many products.
template <class K>
constexpr bool lanes_along_width() {
  return kLanes < 16 || K::kChains == 2;
}

// f(product) with the product that this ISA has for weights of that dtype and form.
template <class F>
EXEUNT_INLINE auto with_product(DType weights, WeightForm form, F&& f) {
  const bool turned = form == WeightForm::turned;
  const auto vectors = [&](auto kind) __attribute__((always_inline)) {
    if (turned) return f(TurnedProduct<decltype(kind), true>());
    if constexpr (lanes_along_width<decltype(kind)>())
      return f(LyingProduct<decltype(kind)>());
    else
      return f(TurnedProduct<decltype(kind), false>());
  };
#if defined(EXEUNT_AMX)
  if (!turned && weights == DType::bfloat16) return f(TileProduct<Bfloat16Tiles>());
  if (!turned && weights == DType::int8) return f(TileProduct<Int8Tiles>());
  if (form == WeightForm::tiles && weights == DType::float32) return f(SplitProduct<Float32Parts>());
  if (form == WeightForm::tiles && weights == DType::float16) return f(SplitProduct<Float16Parts>());
#endif
  switch (weights) {
    case DType::bfloat16:
#if defined(__AVX512BF16__)
      return vectors(Bfloat16Pairs());
#else
      return vectors(Bfloat16());
#endif
    case DType::int8:
      return f(TurnedProduct<Int8Pairs, true>());
    case DType::float16:
      return vectors(Half());
    default:
      return vectors(Float32());
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
    alignas(64) float z[2][kGroup][kProductRows][kTile];  // the second if an epilogue is beside products
    const bool beside = product.beside(x.rows, together);
    product.begin(x.rows);
    Pending pending(epilogue, rows);
    Ahead ahead{};
    for (int64_t at = begin, group = 0; at < end; at += kGroup * kTile, ++group) {
      const int64_t group_end = end - at < kGroup * kTile ? end : at + kGroup * kTile;
      const Products to = z[beside ? group % 2 : 0];
      for (int64_t i = at; i < group_end;) {
        Tile tiles[kGroup];
        int count = 0;
        for (; count < together && i < group_end; ++count, i += kTile)
          tiles[count] = tile_of(stream, i, end, together, stream.panel);
        const int64_t fetched = product.run(tiles, count, x, first, rows, to + (tiles->at - at) / kTile, pending);
        ahead = {tiles->next + fetched * tiles->line_stride, tiles->row_stride, tiles->line_stride};
      }
      pending.begin({at, static_cast<int>(group_end - at), to}, ahead);
      if (!beside) pending.end(ahead);
    }
    pending.end(ahead);
    product.end();
  });
}

}  // namespace exeunt::cpu::EXEUNT_ISA
