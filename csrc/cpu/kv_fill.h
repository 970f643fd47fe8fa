#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

// Bytes for `rows` rows that are filled in at up to `layers` layers.
int64_t kv_fill_workspace(DType dtype, int64_t rows, int64_t width, int64_t layers, int64_t head_size, int32_t threads);
void kv_fill(const KvFillParams& p);

}  // namespace exeunt::cpu
