// Tile registers (AMX): their configuration, and what compilers don't know of their intrinsics.
//
// GCC's intrinsics are bare assembly: that of the configuration names the first 8 of its 64 bytes as its input, those
// of loads name no memory. So stores to what they read may be dropped or come too late: `tiles_see_memory` stands
// between stores of a function and its tile loads, that of a configuration among them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec.h"
#if defined(EXEUNT_AMX_EMULATED)
#include "amx_emulated.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {

// Eight tiles of up to 16 rows of up to 64 bytes, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

EXEUNT_INLINE void tiles_see_memory() { asm volatile("" ::: "memory"); }
// What was stored before (a configuration, packed rows) is seen by what the tiles load.
EXEUNT_INLINE void tiles_begin(const TileConfig& config) {
  tiles_see_memory();
  _tile_loadconfig(&config);
}
EXEUNT_INLINE void tiles_end() { _tile_release(); }

}  // namespace exeunt::cpu::EXEUNT_ISA
