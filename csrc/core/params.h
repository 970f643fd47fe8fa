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
//   lies     row_stride apart, lines of a row side by side (line_stride 64); the last line may be short
//   tiles    [V / 16][lines][16][64]: the tile's rows of one line side by side (row_stride 64, line_stride 1024);
//            D is padded to full lines and V to full tiles
//   turned   the same, with units of 4 bytes of the rows side by side, [V / 16][lines][16 units][16 rows]: for vector
//            registers, whose lanes are the rows, where tile registers take rows as they are
enum class WeightForm : int32_t { lies = 0, tiles = 1, turned = 2 };

struct WeightArg {
  const void* data;
  DType dtype;
  WeightForm form;
  int64_t tile_stride, row_stride, line_stride;
  const float* scale;  // [V], int8 and float8_e4m3 only
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

// What a check of few classes compares with its threshold, as confidence.py has it.
enum class Measure : int32_t { none = 0, max_prob, margin, logit_margin, neg_entropy, neg_normalized_entropy };

// mean over tokens -> norm -> optional pooler -> head, all logits out: heads of a few classes, and probes.
struct SmallHeadParams {
  const void* hidden;  // [N, S, D]
  DType hidden_dtype;
  int64_t hidden_stride, rows, width;
  int64_t tokens, token_stride;  // S
  const uint8_t* mask;           // [N, S], not 0 where a token counts, or nullptr: all do
  int64_t mask_stride;
  NormArg norm;
  bool pooled;
  LayerArg pooler, head;  // pooler [P, D] if pooled, head [V, P or D]
  float* out;             // [N, V]

  int64_t* argmax;  // [N] each: statistics of the logits, or all nullptr
  float *top1, *top2, *sumexp, *weighted;

  Measure measure;  // none: nothing is decided
  float threshold;
  uint8_t* leave;  // [N] 1 where a row's score exceeds it

  void* workspace;  // small_head_workspace() bytes, 64-byte aligned
  int32_t threads;
};

// What kv_fill needs of one layer: addresses of the model's own parameters, all of one dtype, with unit stride along
// the last dimension; 0 where there is none. Strides of projections are in bytes, of vectors in elements. A row of the
// table that ops/kv_stack.py writes, so only 64-bit fields.
struct KvLayer {
  const void *norm_weight, *norm_bias;  // [D]
  const void* key;                      // [Hkv, Dh, D]; strides in bytes
  int64_t key_head, key_row;            // packed: from a tile of rows to the next
  const void* value;                    // [Hkv, Dh, D]
  int64_t value_head, value_row;
  const void *key_bias, *value_bias;  // [Hkv, Dh]
  int64_t key_bias_head, value_bias_head;
  const void* key_norm;  // [Hkv, Dh], or [Dh] with head stride 0
  int64_t key_norm_head;
};

// Where a layer's keys and values go, [B, Hkv, S, Dh] with strides in elements. A row of the table that
// ops/kv_stack.py writes.
struct KvPlace {
  void *keys, *values;
  int64_t key_row, key_head, key_slot, value_row, value_head, value_slot;
};

// Rotary tables [N, R] of a layer, or null.
struct KvRotary {
  const void *cos, *sin;
};

// Rows are sorted by from_layer: those that a layer serves come first. On CUDA they come as they are, and all but
// `tables` is device memory.
struct KvFillParams {
  const void* hidden;  // [*, D], dtype hidden_dtype, row stride hidden_stride elements
  DType hidden_dtype;
  int64_t hidden_stride;
  int64_t rows, width, heads, head_size, rotary;            // N, D, Hkv, Dh, R
  const int64_t *source, *from_layer, *batch_rows, *slots;  // [N]: row of hidden, first layer, place in the cache

  DType dtype;  // of the parameters, of keys and values
  Norm norm;
  float eps;
  Norm key_norm;
  float key_eps;
  float shift;  // added to norm weights (Gemma: 1)
  bool interleaved;
  WeightForm form;  // of the projections, each head for itself; on CPU, elsewhere they lie

  const KvLayer* layers;   // [until]
  const KvPlace* places;   // [until]
  const KvRotary* tables;  // [until], or one for all layers, or null: none at all
  bool one_table;
  DType tables_dtype;
  int64_t until;

  int64_t batch;  // of the cache, and [until] its slots by layer: what rows on a device are held to
  const int64_t* capacities;

  void* workspace;  // kv_fill_workspace() bytes, 64-byte aligned
  int32_t threads;
};

// Keys or values of a cache [B, Hkv, S, D], or [P, Hkv, page, D] with pages; strides in elements, unit along D.
struct CacheArg {
  const void* data;
  int64_t row, head, slot;
};

struct RaggedAttentionParams {
  const void* q;  // [T, Hq, Dh]
  int64_t q_token, q_head;
  CacheArg keys, values;
  DType dtype;                                        // of q, keys, values and out
  int64_t tokens, heads, kv_heads, size, value_size;  // T, Hq, Hkv, Dh, Dv
  int64_t rows_held, slots;                           // B and S, or P and the keys of a page
  int64_t entries, live;                              // R, and how many of them are active (CPU)
  const void* count;  // the latter as it lies where the kernel runs: one integer, or null for all of them
  bool count_64;
  const int64_t *q_indptr, *rows, *kv_len;  // [R + 1], [R], [R]
  const int64_t *kv_start, *positions;      // [R], [T], or null
  bool causal;
  int64_t window;        // 0: none
  float softcap, scale;  // softcap 0: none
  const float* alibi;    // [Hq] or null
  const void* bias;      // [T, Hq, bias_keys], or bias_keys -1: none
  DType bias_dtype;
  int64_t bias_token, bias_head, bias_key, bias_keys;
  const int32_t* pages;                                    // [page_rows, page_columns], or page_columns -1: none
  int64_t page_rows, page_columns, page_row, page_column;  // the last two: strides
  void* out;                                               // [T, Hq, Dv]
  void* workspace;                                         // ragged_attention_workspace() bytes, 64-byte aligned
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
