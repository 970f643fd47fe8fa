// The streaming product: a few hidden rows times a weight that is read once, in tiles of 16 weight rows. What is done
// with the products is the caller's epilogue. Implemented in product.cpp, which draws the tiling.
//
//   product(stream, begin, end, x, first, rows, epilogue);      // epilogue.begin() and epilogue.row() for every group
//                                                               // of tiles of [begin, end)
#pragma once
#include "cpu/kernels.h"

namespace exeunt::cpu::EXEUNT_ISA {

constexpr int kTile = 16;
constexpr int64_t kLine = 64;
constexpr int kMaxRows = 64;  // hidden rows (or planes of them) that one call may bring
constexpr int kGroup = 4;     // tiles whose products an epilogue meets together

// Products of a group, z[tile][hidden row][weight row]; what lies beyond a call's rows is scratch.
constexpr int kProductRows = kMaxRows + 16;
using Products = float (*)[kProductRows][kTile];

// A weight whose rows, or those that the list `columns` names, are read in their order.
struct Stream {
  const WeightArg& weight;
  int64_t width;
  const int64_t* columns;
  char* panel;       // scratch of panel_bytes(), where tiles cannot be read as they lie
  const char* next;  // what will be read after the last row; null for the rows that follow it
};

// Weight that is read next. An epilogue that takes long fetches some of it, or memory would wait for its end.
struct Ahead {
  const char* data;
  int64_t row_stride, line_stride;
  // A share of it, four lines for each hidden row.
  inline __attribute__((always_inline)) void fetch(int64_t r) const {
    const char* from = data + r / 4 * line_stride + r % 4 * 4 * row_stride;
    for (int i = 0; i < 4; ++i) __builtin_prefetch(from + i * row_stride, 0, 2);
  }
};

// Products of weight rows [at, at + count), at most kGroup tiles of them: z[t][r] holds those of tile t and hidden row
// first + r. Beyond `count` lies what has no meaning.
struct Group {
  int64_t at;
  int count;
  Products z;
  inline __attribute__((always_inline)) int tiles() const { return (count + kTile - 1) / kTile; }
};

// What is done with the products of each group, in their order: begin() once, which may change them, then row() for
// each hidden row, null if begin() does all. Where tile registers multiply, rows are taken beside the products of the
// next group. Groups are the same whatever the rows are. Plain functions: inlined into each shape of the product they
// would be compiled a dozen times.
struct Epilogue {
  void (*begin)(void* self, const Group& group, const Ahead& ahead);
  void (*row)(void* self, const Group& group, int64_t r);
  void* self;
};

// Hidden rows that one call of product() may bring.
int64_t product_rows(const WeightArg& weight);

// Weight rows [begin, end) with hidden rows [first, first + rows) of x; `begin` is a multiple of 16.
void product(const Stream& stream, int64_t begin, int64_t end, PackedRows x, int64_t first, int64_t rows,
             Epilogue epilogue);

}  // namespace exeunt::cpu::EXEUNT_ISA
