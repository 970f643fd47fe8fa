#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

// Bytes of workspace for M rows: normalised rows and one partial per row and chunk; bounded in V.
int64_t exit_stats_workspace(int64_t rows, int64_t vocab, int64_t width);

void exit_stats(const ExitStatsParams& p);

}  // namespace exeunt::cpu
