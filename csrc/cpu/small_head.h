#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cpu {

int64_t small_head_workspace(const SmallHeadParams& p);
void small_head(const SmallHeadParams& p);
void saturation(const SaturationParams& p);

}  // namespace exeunt::cpu
