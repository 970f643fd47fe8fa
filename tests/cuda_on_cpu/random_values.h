// Inputs of the tests of kernels without Python.
#pragma once
#include <random>
#include <type_traits>
#include <vector>

#include "core/dtype.h"

namespace exeunt {

template <class T>
inline std::vector<T> random_values(int64_t count, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) {
    const float v = scale * normal(random);
    if constexpr (sizeof(T) == 4)
      value = v;
    else if constexpr (std::is_same_v<T, BFloat16>)
      value = to_bfloat16(v);
    else
      value = to_float16(v);
  }
  return values;
}

}  // namespace exeunt
