#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

// Bytes of workspace for M rows: packed rows, the partials of each row and chunk, and a tile per thread; bounded in V.
int64_t exit_stats_workspace(DType head, WeightForm form, int64_t rows, int64_t vocab, int64_t width, int32_t topk,
                             bool draws, int32_t threads);

void exit_stats(const ExitStatsParams& p);

}  // namespace exeunt::cpu
