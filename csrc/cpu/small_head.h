#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

// Rows that leave; -1 if a score lies too near to the threshold to be told from it.
int64_t small_head(const SmallHeadParams& p);
void saturation(const SaturationParams& p);

}  // namespace exeunt::cpu
