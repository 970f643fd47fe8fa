// The functions that exist once per ISA, each in that ISA's namespace.
#pragma once
#include <cstdint>

#include "core/candidates.h"
#include "core/exit_stats.h"
#include "core/params.h"
#include "cpu/ragged_tile.h"

namespace exeunt::cpu {

// Whether this processor fetches what comes next of a single stream better than instructions tell it to (isa.cpp).
bool follows_streams();

// Hidden rows in the form that a weight's product wants: rows_bytes() of memory, 64-byte aligned.
struct PackedRows {
  char* data;
  float* scale;  // one a row: of those packed as integers (int8 heads, product_kinds.h)
  int64_t rows;  // all of them: it tells how they lie
};

// Partial statistics of vocabulary rows [begin, end), which are one chunk or several, for some of the live rows of `p`.
//   chunk     vocabulary rows of each, but of the last one of all
//   rows      [first_row, end_row) of x
//   x         the packed rows, or
//   plain     the rows [x.rows, width] as they are, where each vocabulary row is multiplied for itself
//   out_rows  the row of logits_out that each of them writes
//   panel     scratch for a tile, 64-byte aligned (tile_of() in product.h)
//   partials  [rows, partial_stride] from the first chunk's column on; so are
//   topk      [rows, partial_stride, p->topk], and
//   drawn     [rows, partial_stride]
struct ExitStatsChunksArgs {
  const ExitStatsParams* p;
  PackedRows x;
  const float* plain;
  const int64_t* out_rows;
  int64_t begin, end, chunk, first_row, end_row;
  char* panel;
  ExitStats* partials;
  Candidate *topk, *drawn;
  int64_t partial_stride;
};

// wide[0..width) = the row that begins at element `at` of hidden, without its mean (layer) and divided by its size.
// Statistics are taken in double: D is short beside the product, and squares of large hidden values cannot overflow.
using Standardise = void (*)(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps,
                             double* wide);
// x[0..width) = the norm of that row, standardised in double, its weight and bias applied in float32, rounded once to
// the dtype of the weight that it will meet, as the model's own norm would hand it over.
using Normalise = void (*)(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm,
                           DType weight, float* x);
// rows_bytes  bytes of packed rows for `rows` rows of `width` elements against weights of that dtype and form
// pack_row    packs row n of x.rows, of `width` floats
using RowsBytes = int64_t (*)(DType weights, WeightForm form, int64_t rows, int64_t width);
using PackRow = void (*)(DType weights, WeightForm form, const float* row, int64_t width, int64_t n, PackedRows x);
// out[rows, outputs] = activation(x W^T + b), its columns [begin, end); x [rows, inputs], its rows x_stride elements
// apart
struct LinearArgs {
  const LayerArg* layer;
  const float* x;
  int64_t x_stride, rows;
  float* out;
  int64_t begin, end;
};
using LinearRows = void (*)(const LinearArgs&);
using ExitStatsChunks = void (*)(const ExitStatsChunksArgs&);

// The keys or the values of one head of one layer.
struct KvHeadArgs {
  const KvFillParams* p;
  const KvLayer* layer;
  const KvPlace* place;
  KvRotary rotary;
  int64_t head;
  bool keys;
  PackedRows x;
  const char* next;  // what will be read after this head
  char* panel;       // as in ExitStatsChunksArgs
  float* out;        // scratch [64, kv_head_stride]
};
// kv_fill_pack  row n of the layer's input: the standardised row times weight, plus bias, rounded, packed
// kv_fill_head  product, bias, norm, rotary embedding, and into the cache
using KvFillPack = void (*)(const KvFillParams& p, const KvLayer& layer, const double* standard, float* row, int64_t n,
                            PackedRows x);
using KvFillHead = void (*)(const KvHeadArgs&);

// ragged_attention_task   one task; scratch: RaggedScratch. Its result goes to `partial`, or to out where that is null
// ragged_attention_merge  the results of a tile's chunks, in order, to out
using RaggedAttentionTask = void (*)(const RaggedAttentionParams& p, const RaggedTask& task, float* scratch,
                                     float* partial);
using RaggedAttentionMerge = void (*)(const RaggedAttentionParams& p, const RaggedTask& tile, int64_t chunks,
                                      float* partials);

#define EXEUNT_DECLARE_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                     \
  void standardise(const void* hidden, DType dtype, int64_t at, int64_t width, Norm kind, float eps, double* wide);   \
  void normalise(const void* hidden, DType dtype, int64_t at, int64_t width, const NormArg& norm, DType weight,       \
                 float* x);                                                                                           \
  int64_t rows_bytes(DType weights, WeightForm form, int64_t rows, int64_t width);                                    \
  void pack_row(DType weights, WeightForm form, const float* row, int64_t width, int64_t n, PackedRows x);            \
  void exit_stats_chunks(const ExitStatsChunksArgs& args);                                                            \
  void linear_rows(const LinearArgs& args);                                                                           \
  void kv_fill_pack(const KvFillParams& p, const KvLayer& layer, const double* standard, float* row, int64_t n,       \
                    PackedRows x);                                                                                    \
  void kv_fill_head(const KvHeadArgs& args);                                                                          \
  void ragged_attention_task(const RaggedAttentionParams& p, const RaggedTask& task, float* scratch, float* partial); \
  void ragged_attention_merge(const RaggedAttentionParams& p, const RaggedTask& tile, int64_t chunks,                 \
                              float* partials);                                                                       \
  }
EXEUNT_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
EXEUNT_DECLARE_KERNELS(avx2)
EXEUNT_DECLARE_KERNELS(avx512)
EXEUNT_DECLARE_KERNELS(avx512_vnni)
EXEUNT_DECLARE_KERNELS(avx512_bf16)
EXEUNT_DECLARE_KERNELS(amx)
#endif
#undef EXEUNT_DECLARE_KERNELS

}  // namespace exeunt::cpu
