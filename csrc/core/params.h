// One plain parameter struct per op, filled in one place: the binding.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace exeunt {

enum class Norm : int32_t { none = 0, rms = 1, layer = 2 };

// A vector parameter of any supported dtype; data == nullptr means "not given".
struct VectorArg {
  const void* data;
  DType dtype;
  int64_t stride;  // elements
};

// A weight [V, D] that the streaming product reads, by tiles of 16 rows and lines of 64 bytes. Strides are in bytes.
//
//   as it lies   row_stride apart, lines of a row side by side (line_stride 64); the last line may be short
//   packed       [V / 16][lines][16][64]: the tile's rows of one line side by side (row_stride 64, line_stride 1024);
//                D is padded to full lines and V to full tiles
struct WeightArg {
  const void* data;
  DType dtype;
  bool packed;
  int64_t tile_stride, row_stride, line_stride;
  const float* scale;  // [V], int8 only
};

enum class Activation : int32_t { none = 0, tanh = 1, relu = 2, sigmoid = 3 };

struct NormArg {
  Norm kind;
  VectorArg weight, bias;  // [D]
  float eps;
};

// activation(x W^T + b), W [outputs, inputs]
struct LayerArg {
  WeightArg weight;
  VectorArg bias;
  int64_t outputs, inputs;
  Activation activation;
};

struct ExitStatsParams {
  const void* hidden;  // [N, D], dtype hidden_dtype, row stride hidden_stride elements
  DType hidden_dtype;
  int64_t hidden_stride;
  WeightArg head;
  int64_t rows, vocab, width;      // M rows to check, V (or as many columns as are listed), D
  int64_t hidden_rows, head_rows;  // N and the head's own V: what indices on a device are held to

  const void* row_list;  // [M] indices into hidden (and logits_out), or nullptr for 0..M-1
  bool row_list_64;      // int64 or int32, as torch has them
  const void* count;     // one integer: how many of the M rows are live, or nullptr for all
  bool count_64;

  VectorArg head_bias;  // [V]
  NormArg norm;
  float scale, softcap, temperature;  // softcap 0: none

  void* logits_out;  // [N, V], raw product W x + b, or nullptr
  DType logits_dtype;
  int64_t logits_stride;

  bool entropy;            // whether `weighted` is wanted
  const int64_t* columns;  // [V] the head's rows that count as the vocabulary, or nullptr for its first V
  const int64_t* target;   // [M] vocabulary positions whose logits target_out [M] receives, or nullptr
  float* target_out;
  int32_t topk;  // 0..8; topk_logits, topk_ids [M, topk]
  float* topk_logits;
  int64_t* topk_ids;
  const int64_t* seeds;  // [M] one a row: draw `sample` [M] from its softmax, or nullptr
  int64_t* sample;

  int64_t* argmax;  // [M] each
  float *top1, *top2, *sumexp, *weighted;

  void* workspace;  // exit_stats_workspace() bytes, 64-byte aligned
  int32_t threads;
};

// norm -> optional pooler -> head, all logits out: heads of a few classes, and probes.
struct SmallHeadParams {
  const void* hidden;  // [N, D]
  DType hidden_dtype;
  int64_t hidden_stride, rows, width;
  NormArg norm;
  bool pooled;
  LayerArg pooler, head;  // pooler [P, D] if pooled, head [V, P or D]
  float* out;             // [N, V]
  void* workspace;        // small_head_workspace() bytes, 64-byte aligned
  int32_t threads;
};

// Cosine of a[n] and b[n], both [N, D].
struct SaturationParams {
  const void *a, *b;
  DType a_dtype, b_dtype;
  int64_t a_stride, b_stride, rows, width;
  float* out;  // [N]
};

}  // namespace exeunt
