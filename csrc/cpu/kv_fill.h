#pragma once
#include <cstdint>
#include <vector>

#include "core/params.h"

namespace exeunt::cpu {

// The rows of a call, [count] each as Python has them: where they left, and their places in a cache of `batch` rows
// and, by layer, `slots` slots. A negative slot is padding.
struct KvRowsArg {
  const int64_t *from_layer, *batch_rows, *slots;
  int64_t count, layers, until, batch;
  const int64_t* capacities;  // [layers]
};

// Those that owe something below `until`, sorted by first layer: what KvFillParams points to.
struct KvRows {
  std::vector<int64_t> source, from_layer, batch_rows, slots;
};

// Throws std::invalid_argument, one sentence, for a layer or a place outside, and for a place named twice.
KvRows kv_rows(const KvRowsArg& arg);

// Bytes for up to `rows` rows.
int64_t kv_fill_workspace(DType dtype, WeightForm form, int64_t rows, int64_t width, int64_t head_size,
                          int32_t threads);
void kv_fill(const KvFillParams& p);

}  // namespace exeunt::cpu
