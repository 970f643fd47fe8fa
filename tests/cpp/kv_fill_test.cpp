// kv_fill against a plain loop in double: norms, biases and rotary embeddings of all kinds, heads and widths that are
// no whole tiles or lines, each form of the weights, rows that left at different layers, on the instruction set that is
// selected. Every array is exactly as long as it must be, so that a sanitizer sees what is read or written beside it;
// what no row owes must stay as it was, between strides too.
#include "cpu/kv_fill.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "expect.h"
#include "inputs.h"

using namespace exeunt;

namespace {

constexpr int64_t kLayers = 3;
constexpr char kUntouched = 0x5a;
constexpr float kEps = 1e-5f, kKeyEps = 1e-6f;

enum Option {
  kWeightless = 1,    // no weights of the norm
  kBiased = 2,        // keys and values are
  kPerHead = 4,       // the key norm has weights for each head
  kFused = 8,         // weights and biases are parts of larger ones: room between rows and heads
  kWide = 16,         // hidden is float32, whatever the weights are
  kInterleaved = 32,  // rotary pairs are neighbours
  kByLayer = 64,      // rotary tables for each layer, none for the second
};

struct Case {
  const char* name;
  int64_t heads, size, width;
  Norm norm, key_norm;
  float shift;
  int64_t rotary;  // 0: none
  DType tables;
  int64_t first, until;  // row 0 left at layer `first`
  int options;

  bool has(Option option) const { return options & option; }
  bool rotates(int64_t layer) const { return rotary && !(has(kByLayer) && layer == 1); }
  int64_t weight_row() const { return width + (has(kFused) ? 3 : 0); }
  int64_t weight_head() const { return size * weight_row() * (has(kFused) ? 3 : 1); }
  int64_t vector_head() const { return size * (has(kFused) ? 3 : 1); }
  int64_t key_norm_head() const { return has(kPerHead) ? vector_head() : 0; }
};

// The parameters of a layer: [0] of keys, [1] of values.
struct Layer {
  std::vector<char> norm_weight, norm_bias, key_norm, weight[2], bias[2];

  Layer(const Case& c, DType dtype, std::mt19937& rng) {
    const int64_t heads = (c.heads - 1) * c.vector_head() + c.size;
    if (!c.has(kWeightless)) norm_weight = random_values(c.width, dtype, rng, 0.2, 1.0 - c.shift);
    if (c.norm == Norm::layer) norm_bias = random_values(c.width, dtype, rng, 0.1);
    if (c.key_norm != Norm::none)
      key_norm = random_values(c.has(kPerHead) ? heads : c.size, dtype, rng, 0.2, 1.0 - c.shift);
    for (auto& w : weight) w = random_values(c.heads * c.weight_head(), dtype, rng, 1.0 / std::sqrt(c.width));
    for (auto& b : bias) b = random_values(c.has(kBiased) ? heads : 0, dtype, rng, 0.3);
  }

  // With weights of that form, which go to `copy`.
  KvLayer in(WeightForm form, const Case& c, int64_t bytes, std::vector<char> (&copy)[2]) const {
    const bool lies = form == WeightForm::lies;
    const int64_t row = lies ? c.weight_row() * bytes : (c.width * bytes + 63) / 64 * 1024;
    const int64_t head = lies ? c.weight_head() * bytes : (c.size + 15) / 16 * row, vector = c.vector_head();
    for (int which : {0, 1})
      copy[which] =
          in_form(form, weight[which].data(), bytes, c.size, c.width, c.weight_row(), c.heads, c.weight_head());
    const char *key = copy[0].data(), *value = copy[1].data(), *key_bias = bias[0].data(), *value_bias = bias[1].data();
    return {
        norm_weight.data(), norm_bias.data(), key, head, row, value, head, row, key_bias, value_bias, vector, vector,
        key_norm.data(),    c.key_norm_head()};
  }
};

// A number, and the magnitudes that were added up to it: what its rounding errors are relative to.
struct Number {
  double value = 0.0, size = 0.0;
};

// Returns what it has multiplied each by.
double standardise(std::vector<double>& x, Norm kind, double eps) {
  if (kind == Norm::none) return 1.0;
  double mean = 0.0, power = 0.0;
  for (double v : x) mean += kind == Norm::layer ? v / static_cast<double>(x.size()) : 0.0;
  for (double v : x) power += (v - mean) * (v - mean) / static_cast<double>(x.size());
  for (double& v : x) v = (v - mean) / std::sqrt(power + eps);
  return 1.0 / std::sqrt(power + eps);
}

// A row as the projections meet it.
std::vector<double> normalised(const Case& c, const Layer& layer, DType dtype, const void* hidden, DType hidden_dtype,
                               int64_t at) {
  std::vector<double> x;
  for (int64_t d = 0; d < c.width; ++d) x.push_back(value_at(hidden, hidden_dtype, at + d));
  standardise(x, c.norm, kEps);
  for (int64_t d = 0; d < c.width; ++d) {
    if (!layer.norm_weight.empty()) x[d] *= static_cast<double>(value_at(layer.norm_weight.data(), dtype, d)) + c.shift;
    if (!layer.norm_bias.empty()) x[d] += value_at(layer.norm_bias.data(), dtype, d);
    x[d] = rounded_to(dtype, static_cast<float>(x[d]));
  }
  return x;
}

std::vector<Number> projected(const Case& c, const Layer& layer, DType dtype, int which, int64_t head,
                              const std::vector<double>& x) {
  std::vector<Number> z(static_cast<size_t>(c.size));
  for (int64_t d = 0; d < c.size; ++d) {
    if (c.has(kBiased)) z[d].value = value_at(layer.bias[which].data(), dtype, head * c.vector_head() + d);
    z[d].size = std::fabs(z[d].value);
    const int64_t at = head * c.weight_head() + d * c.weight_row();
    for (int64_t i = 0; i < c.width; ++i) {
      const double product = x[i] * value_at(layer.weight[which].data(), dtype, at + i);
      z[d].value += product;
      z[d].size += std::fabs(product);
    }
  }
  return z;
}

void key_normalise(const Case& c, const Layer& layer, DType dtype, int64_t head, std::vector<Number>& z) {
  std::vector<double> values;
  double largest = 0.0;
  for (const Number& n : z) values.push_back(n.value), largest = std::max(largest, n.size);
  const double rstd = standardise(values, c.key_norm, kKeyEps);
  for (int64_t d = 0; d < c.size; ++d) {
    const double weight = value_at(layer.key_norm.data(), dtype, head * c.key_norm_head() + d) + double{c.shift};
    // An error of one element moves the mean and the power, and so all of them.
    z[d] = {values[d] * weight, std::fabs(weight) * (largest * rstd + 1.0) * (2.0 + std::fabs(values[d]))};
  }
}

void rotate(const Case& c, const std::vector<char> (&table)[2], int64_t row, std::vector<Number>& z) {
  const std::vector<Number> from = z;
  for (int64_t d = 0; d < c.rotary; ++d) {
    const bool second = c.has(kInterleaved) ? d % 2 : d >= c.rotary / 2;
    const Number other = from[d + (second ? -1 : 1) * (c.has(kInterleaved) ? 1 : c.rotary / 2)];
    const double cos = value_at(table[0].data(), c.tables, row * c.rotary + d);
    const double sin = value_at(table[1].data(), c.tables, row * c.rotary + d);
    z[d].value = from[d].value * cos + (second ? 1.0 : -1.0) * other.value * sin;
    z[d].size = from[d].size * std::fabs(cos) + other.size * std::fabs(sin);
  }
}

// Half the distance to the next number, relative and, among float16's subnormal ones, absolute; and what sums in
// float32 lose: sixteen roundings of them, as tile registers leave out parts of that size.
bool close(DType dtype, double got, Number want) {
  const double half = dtype == DType::float32 ? 0x1p-24 : dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
  const double least = dtype == DType::float16 ? 0x1p-25 : 0.0;
  return std::fabs(got - want.value) <= half * std::fabs(want.value) + least + 0x1p-20 * want.size;
}

// Where keys (values) lie: the slots of a head side by side, or the heads of a slot, with room between all of them.
struct Strides {
  int64_t row, head, slot;
  Strides(const Case& c, int64_t slots, bool keys) {
    head = keys ? slots * (c.size + 1) + 2 : c.size + 2;
    slot = keys ? c.size + 1 : c.heads * head + 1;
    row = (keys ? c.heads * head : slots * slot) + 5;
  }
  int64_t at(int64_t b, int64_t h, int64_t s) const { return b * row + h * head + s * slot; }
};

// What a row owes a layer: a head's keys and its values after those of the head before.
struct Owed {
  int64_t layer, row;
  std::vector<Number> numbers;
};

// `strange`, which is not finite, goes into a hidden row, unless it is 0.
void matches_a_plain_loop(const Case& c, DType dtype, int64_t n, float strange = 0.0f) {
  std::mt19937 rng(static_cast<unsigned>(c.size * 1000003 + c.width * 1009 + n));
  const int64_t bytes = element_bytes(dtype), batch = std::clamp<int64_t>(n, 1, 4), slots = n / batch + 1;
  const int64_t strange_row = strange == 0.0f ? -1 : n / 2, stride = c.width + 5;
  const DType hidden_dtype = c.has(kWide) ? DType::float32 : dtype;
  std::vector<char> hidden = random_values(n ? (n - 1) * stride + c.width : 0, hidden_dtype, rng, 2.0, 0.3);
  if (strange_row >= 0) store_at(hidden.data(), hidden_dtype, strange_row * stride + c.width - 1, strange);
  std::vector<int64_t> from_layer, batch_rows, slot_list;
  for (int64_t i = 0; i < n; ++i) {
    from_layer.push_back(i == strange_row ? 0 : (i * 3 + c.first) % (kLayers + 1));
    batch_rows.push_back(i % batch);
    slot_list.push_back(i % 8 == 5 ? -1 : slots - 1 - i / batch);  // padding, or from the cache's last slot on
  }
  const int64_t capacities[kLayers] = {slots, slots, slots};
  const cpu::KvRows rows =
      cpu::kv_rows({from_layer.data(), batch_rows.data(), slot_list.data(), n, kLayers, c.until, batch, capacities});

  std::vector<Layer> layers;
  std::vector<char> tables[kLayers][2];
  KvRotary rotary[kLayers]{};
  std::vector<Owed> owed;
  for (int64_t l = 0; l < kLayers; ++l) {
    const Layer& layer = layers.emplace_back(c, dtype, rng);
    for (auto& table : tables[l]) table = random_values(n * c.rotary, c.tables, rng);
    if (c.rotates(l)) rotary[l] = {tables[l][0].data(), tables[l][1].data()};
    for (int64_t i = 0; i < n && l < c.until; ++i) {
      if (from_layer[i] > l || slot_list[i] < 0) continue;
      const std::vector<double> row = normalised(c, layer, dtype, hidden.data(), hidden_dtype, i * stride);
      auto& numbers = owed.emplace_back(Owed{l, i, {}}).numbers;
      for (int64_t h = 0; h < c.heads; ++h)
        for (int which : {0, 1}) {
          std::vector<Number> z = projected(c, layer, dtype, which, h, row);
          if (which == 0 && c.key_norm != Norm::none) key_normalise(c, layer, dtype, h, z);
          if (which == 0 && c.rotates(l)) rotate(c, tables[c.has(kByLayer) ? l : 0], i, z);
          numbers.insert(numbers.end(), z.begin(), z.end());
        }
    }
  }

  KvFillParams p{};
  p.hidden = hidden.data(), p.hidden_dtype = hidden_dtype, p.hidden_stride = stride;
  p.rows = static_cast<int64_t>(rows.source.size());
  p.width = c.width, p.heads = c.heads, p.head_size = c.size, p.rotary = c.rotary;
  p.source = rows.source.data(), p.from_layer = rows.from_layer.data();
  p.batch_rows = rows.batch_rows.data(), p.slots = rows.slots.data();
  p.dtype = dtype, p.interleaved = c.has(kInterleaved), p.until = c.until;
  p.norm = c.norm, p.eps = kEps, p.key_norm = c.key_norm, p.key_eps = kKeyEps, p.shift = c.shift;
  p.tables = c.rotary ? rotary : nullptr, p.one_table = !c.has(kByLayer), p.tables_dtype = c.tables;
  const Strides strides[2] = {{c, slots, true}, {c, slots, false}};
  std::array<std::vector<char>, 2> untouched;
  for (int which : {0, 1}) {
    const int64_t length = strides[which].at(batch - 1, c.heads - 1, slots - 1) + c.size;
    untouched[which].assign(static_cast<size_t>(length * bytes), kUntouched);
  }

  for (WeightForm form : {WeightForm::lies, WeightForm::tiles, WeightForm::turned}) {
    const std::string where = std::string(cpu::selected_isa().name) + " kv_fill, " + c.name + ", dtype " +
                              std::to_string(static_cast<int>(dtype)) + ", form " +
                              std::to_string(static_cast<int>(form)) + ", rows " + std::to_string(n);
    std::vector<char> weights[kLayers][2];
    KvLayer table[kLayers];
    for (int64_t l = 0; l < kLayers; ++l) table[l] = layers[l].in(form, c, bytes, weights[l]);
    std::array<std::array<std::vector<char>, 2>, kLayers> caches, alone;
    p.form = form;
    p.layers = table;
    for (int threads : {1, 2}) {
      KvPlace places[kLayers];
      for (int64_t l = 0; l < kLayers; ++l) {
        caches[l] = untouched;
        const auto& [k, v] = strides;
        places[l] = {caches[l][0].data(), caches[l][1].data(), k.row, k.head, k.slot, v.row, v.head, v.slot};
      }
      const auto workspace = memory(cpu::kv_fill_workspace(dtype, form, p.rows, c.width, c.size, threads));
      p.places = places;
      p.workspace = workspace.get();
      p.threads = threads;
      cpu::kv_fill(p);
      if (threads == 1) alone = caches;
      expect(alone == caches, where + ": bits depend on the number of threads");
    }
    for (const auto& [layer, row, numbers] : owed) {
      bool ok = true;
      auto want = numbers.begin();
      for (int64_t h = 0; h < c.heads; ++h)
        for (int which : {0, 1}) {
          char* at = caches[layer][which].data() + strides[which].at(batch_rows[row], h, slot_list[row]) * bytes;
          for (int64_t d = 0; d < c.size; ++d, ++want) {
            const double got = value_at(at, dtype, d);
            ok &= row == strange_row ? !std::isfinite(got) : close(dtype, got, *want);
          }
          std::fill_n(at, c.size * bytes, kUntouched);
        }
      expect(ok, where + ": layer " + std::to_string(layer) + ", row " + std::to_string(row));
    }
    for (const auto& cache : caches) expect(cache == untouched, where + ": written where nothing is owed");
  }
}

}  // namespace

void kv_fill_tests() {
  const Norm none = Norm::none, rms = Norm::rms, layer = Norm::layer;
  const DType f32 = DType::float32, bf16 = DType::bfloat16, f16 = DType::float16;
  const Case cases[] = {
      {"whole lines", 2, 16, 64, rms, none, 0.0f, 16, f32, 0, 3, 0},
      {"fused", 2, 64, 32, layer, none, 0.0f, 32, bf16, 0, 2, kWeightless | kBiased | kFused | kByLayer},
      {"bare", 3, 5, 77, none, none, 0.0f, 4, f32, 1, 3, kWeightless | kBiased | kInterleaved},
      {"key norm", 1, 80, 33, rms, rms, 1.0f, 80, f16, 0, 3, kWide},
      {"head norms", 2, 17, 130, layer, layer, 0.0f, 16, f32, 3, 3, kPerHead | kFused | kInterleaved | kByLayer},
      {"smallest", 4, 1, 1, rms, none, 0.0f, 0, f32, 0, 3, 0},
      {"long rows", 1, 16, 1030, rms, none, 0.0f, 2, f32, 2, 3, kWeightless},
  };
  for (const Case& c : cases)
    for (DType dtype : {f32, bf16, f16}) {
      for (int64_t n : {0, 1, 5, 17, 33, 70}) matches_a_plain_loop(c, dtype, n);
      for (float strange : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
        matches_a_plain_loop(c, dtype, 17, strange);
    }
}
