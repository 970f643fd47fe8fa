// kv_fill under emulation, without Python; as exit_stats_test.cpp.
#include "cuda/kv_fill.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "random_values.h"

using namespace exeunt;

namespace {

struct Case {
  int64_t rows, width, heads, size, rotary;
  Norm norm, key_norm;
  bool interleaved;
  int64_t gap;  // elements between rows of the weights
};

constexpr int64_t kLayers = 3, kBatch = 3;
constexpr float kUntouched = -64.0f;

// What a row's keys or values of a layer and head are, in double from the rounded normalised row on.
template <class T>
std::vector<double> projected(const Case& c, const std::vector<double>& x, const T* weight, const T* bias,
                              int64_t row_elements) {
  std::vector<double> z(c.size);
  for (int64_t d = 0; d < c.size; ++d) {
    z[d] = to_float(bias[d]);
    for (int64_t i = 0; i < c.width; ++i) z[d] += x[i] * to_float(weight[d * row_elements + i]);
  }
  return z;
}

void normalise(std::vector<double>& z, Norm norm) {
  double mean = 0.0, power = 0.0;
  if (norm == Norm::none) return;
  if (norm == Norm::layer)
    for (double v : z) mean += v / static_cast<double>(z.size());
  for (double v : z) power += (v - mean) * (v - mean) / static_cast<double>(z.size());
  for (double& v : z) v = (v - mean) / std::sqrt(power + 1e-6);
}

template <class T>
void matches_a_plain_loop(DType dtype, const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 1009 + c.size * 31 + c.width));
  const int64_t stride = c.width + c.gap, slots = c.rows / kBatch + 1;
  const float spread = 1.0f / std::sqrt(static_cast<float>(c.width));
  const std::vector<float> hidden = random_values<float>(c.rows * c.width, 1.0f, random);
  const std::vector<float> tables = random_values<float>(2 * c.rows * c.rotary, 1.0f, random);
  std::vector<std::vector<T>> held;  // each ends where its last element does
  const auto made = [&](int64_t count, float scale) {
    held.push_back(random_values<T>(count, scale, random));
    return static_cast<const T*>(held.back().data());
  };
  std::vector<KvLayer> layers(kLayers);
  for (KvLayer& l : layers) {
    const int64_t rows = c.heads * c.size, bytes = stride * element_bytes(dtype);
    l = {made(c.width, 1.0f), nullptr, made((rows - 1) * stride + c.width, spread),
         c.size * bytes,      bytes,   made((rows - 1) * stride + c.width, spread),
         c.size * bytes,      bytes,   made(rows, 0.1f),
         made(rows, 0.1f),    c.size,  c.size,
         made(c.size, 1.0f),  0};
    if (c.norm != Norm::rms) l.norm_bias = made(c.width, 0.1f);
    if (c.norm == Norm::none) l.norm_weight = nullptr;  // bias alone
  }
  // A cache per layer, keys and values [B, Hkv, S, Dh], in memory that goes on by a slot before it and behind it by a
  // row and by a slot each: what is written there was not checked.
  const int64_t head = (slots + 1) * c.size, row = c.heads * head, cells = c.size + (kBatch + 1) * row;
  std::vector<std::vector<T>> cache(2 * kLayers, random_values<T>(cells, 0.0f, random));
  std::vector<KvPlace> places;
  for (auto& tensor : cache)
    for (T& cell : tensor) store_at(&cell, dtype, 0, kUntouched);
  for (int64_t l = 0; l < kLayers; ++l)
    places.push_back(
        {cache[2 * l].data() + c.size, cache[2 * l + 1].data() + c.size, row, head, c.size, row, head, c.size});
  const std::vector<int64_t> capacities(kLayers, slots);
  std::vector<int64_t> from(c.rows), rows(c.rows), at(c.rows);
  for (int64_t n = 0; n < c.rows; ++n) {
    from[n] = (n * 7 + 1) % (kLayers + 1);
    rows[n] = n % kBatch;
    at[n] = n % 5 == 3 ? -1 : n / kBatch;
  }
  if (c.rows > 5) from[4] = -1, rows[5] = kBatch, at[1] = slots;  // outside: left out
  const KvRotary rotary{tables.data(), tables.data() + c.rows * c.rotary};
  KvFillParams p{};
  p.hidden = hidden.data();
  p.hidden_stride = c.width;
  p.rows = c.rows;
  p.width = c.width;
  p.heads = c.heads;
  p.head_size = c.size;
  p.rotary = c.rotary;
  p.from_layer = from.data();
  p.batch_rows = rows.data();
  p.slots = at.data();
  p.dtype = dtype;
  p.norm = c.norm;
  p.key_norm = c.key_norm;
  p.eps = p.key_eps = 1e-6f;
  p.shift = 1.0f;
  p.interleaved = c.interleaved;
  p.layers = layers.data();
  p.places = places.data();
  p.tables = c.rotary ? &rotary : nullptr;
  p.one_table = true;
  p.until = kLayers;
  p.batch = kBatch;
  p.capacities = capacities.data();
  std::vector<uint4> space(cuda::kv_fill_workspace(dtype, c.rows, c.width, kLayers) / 16 + 1, {~0u, ~0u, ~0u, ~0u});
  p.workspace = space.data();
  const std::string where = "kv_fill n=" + std::to_string(c.rows) + " d=" + std::to_string(c.width) +
                            " dh=" + std::to_string(c.size) + " dtype=" + std::to_string(static_cast<int>(dtype)) +
                            " schedule=" + std::to_string(emu::schedule);
  try {
    cuda::kv_fill(p, 0, nullptr);
  } catch (const std::exception& e) {
    return expect(false, where + ": " + e.what());
  }
  std::vector<std::vector<double>> want(2 * kLayers, std::vector<double>(cells, kUntouched));
  for (int64_t n = 0; n < c.rows; ++n) {
    if (at[n] < 0 || at[n] >= slots || rows[n] >= kBatch || from[n] < 0) continue;
    std::vector<double> standard(hidden.begin() + n * c.width, hidden.begin() + (n + 1) * c.width);
    normalise(standard, c.norm);
    for (int64_t l = from[n]; l < kLayers; ++l) {
      std::vector<double> x = standard;
      for (int64_t i = 0; i < c.width; ++i) {
        if (layers[l].norm_weight) x[i] *= 1.0 + value_at(layers[l].norm_weight, dtype, i);
        if (layers[l].norm_bias) x[i] += value_at(layers[l].norm_bias, dtype, i);
        x[i] = rounded_to(dtype, static_cast<float>(x[i]));
      }
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t first = h * c.size, to = c.size + rows[n] * row + h * head + at[n] * c.size;
        const auto part = [&](const void* weight, const void* bias) {
          return projected(c, x, static_cast<const T*>(weight) + first * stride, static_cast<const T*>(bias) + first,
                           stride);
        };
        std::vector<double> key = part(layers[l].key, layers[l].key_bias);
        const std::vector<double> value = part(layers[l].value, layers[l].value_bias);
        normalise(key, c.key_norm);
        for (int64_t d = 0; d < c.size && c.key_norm != Norm::none; ++d)
          key[d] *= 1.0 + value_at(layers[l].key_norm, dtype, d);
        std::vector<double> turned = key;
        for (int64_t d = 0; d < c.rotary; ++d) {
          const int64_t half = c.rotary / 2;
          const bool second = c.interleaved ? d % 2 : d >= half;
          const int64_t partner = c.interleaved ? d ^ 1 : second ? d - half : d + half;
          turned[d] = key[d] * tables[n * c.rotary + d] +
                      (second ? key[partner] : -key[partner]) * tables[(c.rows + n) * c.rotary + d];
        }
        for (int64_t d = 0; d < c.size; ++d) want[2 * l][to + d] = turned[d], want[2 * l + 1][to + d] = value[d];
      }
    }
  }
  const double close = dtype == DType::float32 ? 1e-5 : dtype == DType::bfloat16 ? 6e-3 : 1e-3;
  for (int64_t t = 0; t < 2 * kLayers; ++t) {
    bool right = true;
    for (int64_t i = 0; i < cells; ++i) {
      const double got = to_float(cache[t][i]);
      right = right && std::fabs(got - want[t][i]) <= close * (1.0 + std::fabs(want[t][i])) &&
              (got == kUntouched) == (want[t][i] == kUntouched);
    }
    expect(right, where + (t % 2 ? ": values" : ": keys") + " of layer " + std::to_string(t / 2));
  }
}

}  // namespace

int main() {
  for (unsigned schedule : {0u, 1u}) {
    emu::schedule = schedule;
    matches_a_plain_loop<BFloat16>(DType::bfloat16, {7, 328, 1, 128, 64, Norm::rms, Norm::rms, false, 0});
    matches_a_plain_loop<Float16>(DType::float16, {18, 72, 3, 24, 24, Norm::layer, Norm::none, true, 0});
    matches_a_plain_loop<float>(DType::float32, {3, 40, 1, 160, 100, Norm::rms, Norm::layer, false, 0});
    matches_a_plain_loop<BFloat16>(DType::bfloat16, {4, 33, 5, 7, 0, Norm::none, Norm::rms, false, 1});
    matches_a_plain_loop<float>(DType::float32, {66, 16, 2, 64, 32, Norm::rms, Norm::layer, false, 0});
  }
  return ended();
}
