#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

// Bytes; pooler is 0 without one.
int64_t small_head_workspace(int64_t width, int64_t pooler, int64_t rows, int threads);

// Rows that leave; -1 if a score lies too near to the threshold to be told from it.
int64_t small_head(const SmallHeadParams& p);
void saturation(const SaturationParams& p);

}  // namespace exeunt::cpu
