#pragma once
#include <cstdint>

namespace exeunt {

// Element types as they cross the binding. The Python side (ops/_backend.py) sends the same numbers.
enum class DType : int32_t { float32 = 0, bfloat16 = 1 };

struct BFloat16 {
  uint16_t bits;
};

// Round to nearest even, NaN kept: what torch does when it narrows.
static inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

static inline float to_float(float value) { return value; }

}  // namespace exeunt
