// The functions that exist once per ISA, each in that ISA's namespace.
#pragma once
#include <cstdint>

#include "core/exit_stats.h"
#include "core/params.h"

namespace exeunt::cpu {

// Partial statistics of vocabulary rows [begin, end) for the live rows of `p`.
//   x         [rows, x_stride] normalised hidden rows, float32, in lane order, 64-byte aligned, zero beyond D
//   out_rows  the row of logits_out that each of them writes
//   partials  [rows, partial_stride], this chunk's column
struct ExitStatsChunkArgs {
  const ExitStatsParams* p;
  const float* x;
  int64_t x_stride;
  const int64_t* out_rows;
  int64_t rows;
  int64_t begin, end;
  ExitStats* partials;
  int64_t partial_stride;
};
using ExitStatsChunk = void (*)(const ExitStatsChunkArgs&);

#define EXEUNT_DECLARE_KERNELS(isa)                      \
  namespace isa {                                        \
  void exit_stats_chunk(const ExitStatsChunkArgs& args); \
  }
EXEUNT_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
EXEUNT_DECLARE_KERNELS(avx2)
EXEUNT_DECLARE_KERNELS(avx512)
#endif
#undef EXEUNT_DECLARE_KERNELS

}  // namespace exeunt::cpu
