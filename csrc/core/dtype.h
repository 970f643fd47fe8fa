#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace exeunt {

// Element types as they cross the binding. The Python side (ops/_backend.py) sends the same numbers. int8 is a weight
// only, with one float32 scale a row (see PackedHead), and so is float8_e4m3 (see Fp8Head).
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, float8_e4m3 = 4 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

EXEUNT_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
EXEUNT_HOST_DEVICE static inline float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even, NaN kept: what torch does when it narrows.
EXEUNT_HOST_DEVICE static inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

EXEUNT_HOST_DEVICE static inline Float16 to_float16(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or beyond
  uint32_t half;
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value, in units of 2^-24, in the low bits
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

EXEUNT_HOST_DEVICE static inline float to_float(float value) { return value; }
EXEUNT_HOST_DEVICE static inline float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
EXEUNT_HOST_DEVICE static inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | rest << 13);
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));  // exact, subnormals too
}

EXEUNT_HOST_DEVICE static inline float value_at(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bfloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return to_float(static_cast<const Float16*>(data)[i]);
}

EXEUNT_HOST_DEVICE static inline void store_at(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::float32)
    static_cast<float*>(data)[i] = value;
  else if (dtype == DType::bfloat16)
    static_cast<BFloat16*>(data)[i] = to_bfloat16(value);
  else
    static_cast<Float16*>(data)[i] = to_float16(value);
}

// What is left of a value once it has that dtype; int8 weights take the value as it is.
EXEUNT_HOST_DEVICE static inline float rounded_to(DType dtype, float value) {
  if (dtype == DType::bfloat16) return to_float(to_bfloat16(value));
  if (dtype == DType::float16) return to_float(to_float16(value));
  return value;
}

EXEUNT_HOST_DEVICE static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::int8 || dtype == DType::float8_e4m3 ? 1 : 2;
}

// use(T*) with the element type that the dtype names. Static, so that objects of an instruction set may call it.
template <class Use>
static inline void typed(const void* data, DType dtype, Use use) {
  if (dtype == DType::float32)
    use(static_cast<const float*>(data));
  else if (dtype == DType::bfloat16)
    use(static_cast<const BFloat16*>(data));
  else
    use(static_cast<const Float16*>(data));
}

}  // namespace exeunt
