// ragged_attention against a plain loop in double, on memory exactly as long as it may read: left padding, windows,
// pages, tails of Dh, Dv, keys and tiles, entries that are not active, keys split over threads.
#include "cpu/ragged_attention.h"

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "expect.h"
#include "inputs.h"

using namespace exeunt;

namespace {

struct Case {
  int64_t heads, kv_heads, size, value_size, page;  // page 0: none
  int64_t window;                                   // 0: none; -1: bidirectional
  std::vector<int64_t> lengths, starts, queries;
};

void matches_a_plain_loop(const Case& c, DType dtype, const std::string& where) {
  std::mt19937 rng(static_cast<unsigned>(c.size * 1009 + c.page));
  const int64_t entries = static_cast<int64_t>(c.lengths.size());
  int64_t room = 0;
  for (int64_t length : c.lengths) room = std::max(room, length);
  const int64_t columns = c.page ? (room + c.page - 1) / c.page : 1, slots = c.page ? c.page : room;
  const int64_t held = entries * columns;
  std::vector<int32_t> pages;
  for (int64_t i = 0; i < held; ++i) pages.push_back(static_cast<int32_t>(held - 1 - i));
  std::vector<int64_t> bounds{0}, rows;
  for (int64_t r = 0; r < entries; ++r) bounds.push_back(bounds.back() + c.queries[r]), rows.push_back(entries - 1 - r);
  const int64_t tokens = bounds.back(), group = c.heads / c.kv_heads;
  const auto q = random_values(tokens * c.heads * c.size, dtype, rng);
  const auto k = random_values(held * c.kv_heads * slots * c.size, dtype, rng);
  const auto v = random_values(held * c.kv_heads * slots * c.value_size, dtype, rng);
  std::vector<char> out(static_cast<size_t>(tokens * c.heads * c.value_size * element_bytes(dtype))), first;

  RaggedAttentionParams p{};
  p.q = q.data();
  p.q_token = c.heads * c.size;
  p.q_head = c.size;
  p.keys = {k.data(), c.kv_heads * slots * c.size, slots * c.size, c.size};
  p.values = {v.data(), c.kv_heads * slots * c.value_size, slots * c.value_size, c.value_size};
  p.dtype = dtype;
  p.tokens = tokens;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.size = c.size;
  p.value_size = c.value_size;
  p.rows_held = held;
  p.slots = slots;
  p.entries = entries;
  p.live = entries;
  p.q_indptr = bounds.data();
  p.rows = rows.data();
  p.kv_len = c.lengths.data();
  p.kv_start = c.starts.data();
  p.causal = c.window >= 0;
  p.window = c.window > 0 ? c.window : 0;
  p.scale = 0.5f;
  p.bias_keys = p.page_columns = -1;
  if (c.page)
    p.pages = pages.data(), p.page_rows = entries, p.page_columns = columns, p.page_row = columns, p.page_column = 1;
  p.out = out.data();
  for (int threads : {1, 3}) {
    p.threads = threads;
    const auto workspace =
        memory(cpu::ragged_attention_workspace(tokens, c.heads, slots * columns, c.size, c.value_size, threads));
    p.workspace = workspace.get();
    cpu::ragged_attention(p, cpu::ragged_attention_plan(p));
    if (threads == 1) first = out;
    expect(first == out, where + ": bits depend on the number of threads");
  }

  const double tolerance = dtype == DType::float32 ? 1e-5 : 2e-2;
  for (int64_t r = 0; r < entries; ++r)
    for (int64_t i = 0; i < c.queries[r]; ++i)
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t token = bounds[r] + i, position = c.lengths[r] - c.queries[r] + i;
        const auto place = [&](int64_t key, int64_t size) {
          const int64_t row = c.page ? pages[rows[r] * columns + key / c.page] : rows[r];
          return ((row * c.kv_heads + h / group) * slots + (c.page ? key % c.page : key)) * size;
        };
        std::vector<double> sum(static_cast<size_t>(c.value_size));
        double total = 0.0;
        for (int64_t key = c.starts[r]; key < c.lengths[r]; ++key) {
          if (p.causal && (key > position || (p.window && position - key >= p.window))) continue;
          double score = 0.0;
          for (int64_t d = 0; d < c.size; ++d)
            score += static_cast<double>(value_at(q.data(), dtype, (token * c.heads + h) * c.size + d)) *
                     static_cast<double>(value_at(k.data(), dtype, place(key, c.size) + d));
          const double weight = std::exp(0.5 * score);
          total += weight;
          for (int64_t d = 0; d < c.value_size; ++d)
            sum[d] += weight * static_cast<double>(value_at(v.data(), dtype, place(key, c.value_size) + d));
        }
        for (int64_t d = 0; d < c.value_size; ++d) {
          const double want = total > 0.0 ? sum[d] / total : 0.0;
          const double got = value_at(out.data(), dtype, (token * c.heads + h) * c.value_size + d);
          expect(std::fabs(got - want) <= tolerance * (1.0 + std::fabs(want)), where + ": value");
        }
      }
}

void refuses_what_is_not_there() {
  const int64_t bounds[2] = {0, 1}, rows[1] = {2}, lengths[1] = {1};
  RaggedAttentionParams p{};
  p.tokens = p.heads = p.kv_heads = p.size = p.value_size = p.slots = p.entries = p.live = 1;
  p.rows_held = 2;
  p.bias_keys = p.page_columns = -1;
  p.q_indptr = bounds;
  p.rows = rows;
  p.kv_len = lengths;
  try {
    cpu::ragged_attention_plan(p);
    expect(false, "a row outside of the cache is refused");
  } catch (const std::invalid_argument& e) {
    expect(std::string(e.what()) == "ragged_attention: rows must lie in 0..1, got 2 at 0", e.what());
  }
}

}  // namespace

void ragged_attention_tests() {
  const Case cases[] = {
      {4, 2, 64, 64, 0, 0, {70, 1, 530, 64}, {3, 0, 13, 63}, {1, 1, 2, 1}},
      {3, 3, 5, 7, 0, 20, {90, 33}, {0, 32}, {3, 40}},
      {6, 1, 40, 24, 16, 0, {65, 16, 0}, {17, 15, 0}, {9, 1, 2}},
      {2, 1, 33, 80, 7, -1, {70, 12}, {0, 4}, {20, 12}},
      {8, 2, 16, 16, 100, 600, {1100, 7}, {0, 0}, {2, 0}},
  };
  for (const Case& c : cases)
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      matches_a_plain_loop(c, dtype,
                           std::string(cpu::selected_isa().name) + " ragged_attention, Dh " + std::to_string(c.size) +
                               ", dtype " + std::to_string(static_cast<int>(dtype)));
  refuses_what_is_not_there();
}
