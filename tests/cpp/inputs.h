// What the C++ tests make their inputs with: arrays exactly as long as they must be, so that a sanitizer sees any read
// past them.
#pragma once
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "core/params.h"

// Normal numbers of that dtype.
inline std::vector<char> random_values(int64_t count, exeunt::DType dtype, std::mt19937& rng, double spread = 1.0,
                                       double mean = 0.0) {
  std::vector<char> out(static_cast<size_t>(count * exeunt::element_bytes(dtype)));
  std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(spread));
  for (int64_t i = 0; i < count; ++i) exeunt::store_at(out.data(), dtype, i, normal(rng));
  return out;
}

// A workspace, 64-byte aligned.
inline std::unique_ptr<void, void (*)(void*)> memory(int64_t bytes) {
  return {std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), &std::free};
}

// A weight [heads, v, d] of elements of so many bytes, its rows `stride` of them apart and its heads `head`, in the
// order of that form (WeightArg), each head for itself.
inline std::vector<char> in_form(exeunt::WeightForm form, const void* weight, int64_t element, int64_t v, int64_t d,
                                 int64_t stride, int64_t heads = 1, int64_t head = 0) {
  const char* from = static_cast<const char*>(weight);
  if (form == exeunt::WeightForm::lies) return {from, from + ((heads - 1) * head + (v - 1) * stride + d) * element};
  const int64_t lines = (d * element + 63) / 64, tiles = (v + 15) / 16;
  std::vector<char> packed(static_cast<size_t>(heads * tiles * lines * 1024));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t j = 0; j < v; ++j)
      for (int64_t i = 0; i < d * element; ++i) {
        const int64_t line = (h * tiles + j / 16) * lines + i / 64, row = j % 16, within = i % 64;
        const int64_t at =
            form == exeunt::WeightForm::tiles ? row * 64 + within : within / 4 * 64 + row * 4 + within % 4;
        packed[static_cast<size_t>(line * 1024 + at)] = from[(h * head + j * stride) * element + i];
      }
  return packed;
}
