// The streaming product: a few hidden rows times a weight that is read once, one tile of 16 weight rows at a time. What
// is done with the products is the caller's epilogue. Implemented in product.cpp, which draws the tiling.
//
//   Tile tile = tile_of(weight, width, first weight row, how many, ...);
//   product(weight.dtype, tile, x, first, rows, epilogue);      // epilogue(r, z[16]) for each hidden row first + r
#pragma once
#include "cpu/kernels.h"

namespace exeunt::cpu::EXEUNT_ISA {

constexpr int kTile = 16;
constexpr int64_t kLine = 64;
constexpr int kMaxRows = 64;  // hidden rows (or planes of them) that one call may bring

static inline int64_t lines_of(DType weights, int64_t width) {
  return (width * element_bytes(weights) + kLine - 1) / kLine;
}

// Sixteen rows of a weight, full lines only, and where the tile begins that will be read next, whose first lines are
// fetched at the end of this one; it is taken to lie as this one does.
struct Tile {
  const char *data, *next;
  int64_t row_stride, line_stride;
  int64_t lines;
  const float* scale;  // [16], int8 only
};

// Rows [vocab, vocab + count) of a weight, or of the list `columns` of its rows. They are read where they lie, or
// copied to `panel` first: from a list, or if the last line is short or the tile itself is. Zeros fill both: the
// epilogue does not use those products, but a multiply-add of whatever lay there (subnormal numbers, say) takes the
// processor fifty times as long. `panel` has room for the tile and sixteen scales. (A copy for tiles that many hidden
// rows read was slower.)
static inline Tile tile_of(const WeightArg& w, int64_t width, int64_t vocab, int count, const int64_t* columns,
                           char* panel) {
  const int64_t bytes = width * element_bytes(w.dtype), lines = lines_of(w.dtype, width);
  const char* base = static_cast<const char*>(w.data);
  const char* data = base + vocab / kTile * w.tile_stride;
  Tile tile{data, data + w.tile_stride, w.row_stride, w.line_stride, lines, w.scale ? w.scale + vocab : nullptr};
  if (!columns && (w.packed || (count == kTile && bytes % kLine == 0))) return tile;
  float* scale = reinterpret_cast<float*>(panel + lines * kTile * kLine);
  for (int i = 0; i < count; ++i) {
    const int64_t v = columns ? columns[vocab + i] : vocab + i;
    const char* from = base + v / kTile * w.tile_stride + v % kTile * w.row_stride;
    char* to = panel + i * kLine;
    for (int64_t l = 0; l < lines; ++l, from += w.line_stride, to += kTile * kLine) {
      if (w.packed || bytes - l * kLine >= kLine) {
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
  if (w.scale) tile.scale = scale;
  return tile;
}

// Called with the 16 products of hidden row first + r. A plain function: inlined into each shape of the product it
// would be compiled a dozen times, and it runs once for 16 D multiply-adds.
struct Epilogue {
  void (*call)(const void* self, int64_t r, const float* z);
  const void* self;
};

template <class F>
static inline Epilogue epilogue_of(const F& f) {
  return {[](const void* self, int64_t r, const float* z) { (*static_cast<const F*>(self))(r, z); }, &f};
}

// Hidden rows that one call of product() may bring.
int64_t product_rows(DType weights);

// A thread's products happen between these two (AMX shapes its registers).
void product_begin(DType weights);
void product_end(DType weights);

// epilogue(r, z) for hidden rows first + r, r < rows: their products with the tile's 16 rows.
void product(DType weights, const Tile& tile, PackedRows x, int64_t first, int64_t rows, Epilogue epilogue);

}  // namespace exeunt::cpu::EXEUNT_ISA
