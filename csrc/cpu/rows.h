// What hosts and kernels both do with rows. Static, so that objects of an instruction set may call it.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Scratch for a tile of a weight that is copied before it is read, with its scales (product.h).
static inline int64_t panel_bytes(DType dtype, int64_t width) {
  return 16 * round_up(width * element_bytes(dtype), 64) + 64;
}

// Sum of f(d) over [0, width) in eight interleaved parts, so that additions overlap; always in the same order.
template <class F>
static inline double sum_of(int64_t width, F f) {
  double part[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    for (int i = 0; i < 8; ++i) part[i] += f(d + i);
  for (int i = 0; d < width; ++d, ++i) part[i] += f(d);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

}  // namespace exeunt::cpu
