// What hosts and kernels both do with rows. Static, so that objects of an instruction set may call it.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace exeunt::cpu {

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Scratch for a tile of a weight that is copied before it is read, with its scales (product.h).
static inline int64_t panel_bytes(DType dtype, int64_t width) {
  return 16 * round_up(width * element_bytes(dtype), 64) + 64;
}

}  // namespace exeunt::cpu
