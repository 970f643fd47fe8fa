// ragged_attention under emulation, without Python; as exit_stats_test.cpp. Each case runs twice on one workspace, with
// other lengths, rows and counts in the same lists the second time, as a captured graph is replayed.
#include "cuda/ragged_attention.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "random_values.h"

using namespace exeunt;

namespace {

struct Lists {
  std::vector<int64_t> q_indptr, rows, kv_len, kv_start;
  int64_t count;
};

struct Case {
  const char* name;
  int64_t group, kv_heads, size, value_size, gap;  // gap: elements between keys, and between queries
  int64_t window, page;                            // 0: none
  bool bias, alibi;
  Lists lists[2];  // of as many entries and queries
};

constexpr int64_t kHeld = 4;  // rows of the cache

template <class T>
void matches_a_plain_loop(DType dtype, const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.size * 1009 + c.value_size * 31 + c.group));
  const int64_t heads = c.group * c.kv_heads, tokens = c.lists[0].q_indptr.back();
  const int64_t entries = static_cast<int64_t>(c.lists[0].rows.size());
  int64_t room = 0;
  for (const Lists& lists : c.lists)
    for (int64_t length : lists.kv_len) room = std::max(room, length);
  // Arrays end with the last key of the last row, or with the last page's: what lies beyond is nobody's.
  const int64_t columns = c.page ? (room + c.page - 1) / c.page : -1, slots = c.page ? c.page : room;
  const int64_t held = c.page ? kHeld * columns : kHeld;
  const auto cache = [&](int64_t size) -> CacheArg {
    return {nullptr, c.kv_heads * slots * (size + c.gap), slots * (size + c.gap), size + c.gap};
  };
  CacheArg keys = cache(c.size), values = cache(c.value_size);
  const std::vector<T> k = random_values<T>(held * keys.row - c.gap, 1.0f, random);
  const std::vector<T> v = random_values<T>(held * values.row - c.gap, 1.0f, random);
  const std::vector<T> q = random_values<T>(tokens * heads * (c.size + c.gap), 1.0f, random);
  const std::vector<float> bias = random_values<float>(c.bias ? tokens * heads * room : 0, 1.0f, random);
  const std::vector<float> alibi = random_values<float>(c.alibi ? heads : 0, 0.1f, random);
  std::vector<int32_t> pages(c.page ? held : 0);
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  std::shuffle(pages.begin(), pages.end(), random);
  keys.data = k.data();
  values.data = v.data();

  Lists now = c.lists[0];  // whose addresses stay
  std::vector<T> out(tokens * heads * c.value_size);
  RaggedAttentionParams p{};
  p.q = q.data();
  p.q_head = c.size + c.gap;
  p.q_token = heads * p.q_head;
  p.keys = keys;
  p.values = values;
  p.dtype = dtype;
  p.tokens = tokens;
  p.heads = heads;
  p.kv_heads = c.kv_heads;
  p.size = c.size;
  p.value_size = c.value_size;
  p.rows_held = held;
  p.slots = slots;
  p.entries = entries;
  p.count = &now.count;
  p.count_64 = true;
  p.q_indptr = now.q_indptr.data();
  p.rows = now.rows.data();
  p.kv_len = now.kv_len.data();
  p.kv_start = now.kv_start.data();
  p.causal = true;
  p.window = c.window;
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.size));
  p.alibi = c.alibi ? alibi.data() : nullptr;
  p.bias = c.bias ? bias.data() : nullptr;
  p.bias_keys = c.bias ? room : -1;
  p.bias_key = 1;
  p.bias_head = room;
  p.bias_token = heads * room;
  p.pages = pages.data();
  p.page_rows = kHeld;
  p.page_columns = columns;
  p.page_row = columns;
  p.page_column = 1;
  p.out = out.data();
  const int64_t bytes = cuda::ragged_attention_workspace(tokens, heads, c.kv_heads, entries, room, c.value_size);
  std::vector<uint4> workspace(bytes / 16, {~0u, ~0u, ~0u, ~0u});  // a multiple of 64 bytes
  p.workspace = workspace.data();
  const double tolerance = dtype == DType::float32 ? 1e-5 : dtype == DType::float16 ? 3e-3 : 2e-2;

  for (int replay = 0; replay < 2; ++replay) {
    const Lists& lists = c.lists[replay];
    std::copy(lists.q_indptr.begin(), lists.q_indptr.end(), now.q_indptr.begin());
    std::copy(lists.rows.begin(), lists.rows.end(), now.rows.begin());
    std::copy(lists.kv_len.begin(), lists.kv_len.end(), now.kv_len.begin());
    std::copy(lists.kv_start.begin(), lists.kv_start.end(), now.kv_start.begin());
    now.count = lists.count;
    const std::string where = std::string(c.name) + ", replay " + std::to_string(replay) +
                              ", dtype=" + std::to_string(static_cast<int>(dtype)) +
                              " schedule=" + std::to_string(emu::schedule);
    out.assign(out.size(), T{});
    std::fill(reinterpret_cast<char*>(out.data()), reinterpret_cast<char*>(out.data() + out.size()), char{0x7f});
    try {
      cuda::ragged_attention(p, 0, nullptr);
    } catch (const std::exception& e) {
      return expect(false, where + ": " + e.what());
    }
    for (int64_t r = 0; r < entries; ++r)
      for (int64_t token = now.q_indptr[r]; token < now.q_indptr[r + 1]; ++token)
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t position = now.kv_len[r] - now.q_indptr[r + 1] + token;
          const auto element = [&](const std::vector<T>& of, const CacheArg& at, int64_t key, int64_t d) {
            const int64_t row = c.page ? pages[now.rows[r] * columns + key / c.page] : now.rows[r];
            const int64_t slot = c.page ? key % c.page : key;
            return static_cast<double>(to_float(of[row * at.row + head / c.group * at.head + slot * at.slot + d]));
          };
          std::vector<double> want(c.value_size, 0.0);
          double top = -1e300, sum = 0.0;
          std::vector<std::pair<int64_t, double>> seen;
          for (int64_t key = now.kv_start[r]; key <= position && r < now.count; ++key) {
            if (c.window && position - key >= c.window) continue;
            double z = 0.0;
            for (int64_t d = 0; d < c.size; ++d)
              z += static_cast<double>(to_float(q[token * p.q_token + head * p.q_head + d])) * element(k, keys, key, d);
            z *= p.scale;
            if (c.alibi) z += static_cast<double>(alibi[head]) * static_cast<double>(key - position);
            if (c.bias) z += bias[token * p.bias_token + head * room + key];
            seen.emplace_back(key, z);
            top = std::max(top, z);
          }
          for (const auto& [key, z] : seen) {
            sum += std::exp(z - top);
            for (int64_t d = 0; d < c.value_size; ++d) want[d] += std::exp(z - top) * element(v, values, key, d);
          }
          bool close = true;
          for (int64_t d = 0; d < c.value_size; ++d) {
            const double exact = seen.empty() ? 0.0 : want[d] / sum;
            const double got = to_float(out[(token * heads + head) * c.value_size + d]);
            close = close && std::fabs(got - exact) <= tolerance * (1.0 + std::fabs(exact));
          }
          expect(close, where + ": entry " + std::to_string(r) + ", query " + std::to_string(token) + ", head " +
                            std::to_string(head));
        }
  }
}

// Lists that name what is not there flag their entries, and nothing is read.
void flags_what_is_not_there() {
  const std::vector<float> cache(2 * 8 * 4, 1.0f), q(4 * 4, 1.0f);
  std::vector<float> out(4 * 4);
  int32_t pages[] = {0, 1};
  const auto run = [&](std::vector<int64_t> q_indptr, std::vector<int64_t> rows, std::vector<int64_t> kv_len,
                       std::vector<int64_t> kv_start, bool paged, const std::string& flagged) {
    RaggedAttentionParams p{};
    p.q = q.data();
    p.q_token = p.q_head = p.size = p.value_size = 4;
    p.keys = p.values = {cache.data(), 32, 32, 4};
    p.tokens = 4;
    p.heads = p.kv_heads = 1;
    p.rows_held = 2;
    p.slots = 8;
    p.entries = static_cast<int64_t>(rows.size());
    p.q_indptr = q_indptr.data();
    p.rows = rows.data();
    p.kv_len = kv_len.data();
    p.kv_start = kv_start.data();
    p.scale = 1.0f;
    p.bias_keys = -1;
    p.pages = pages;
    p.page_rows = 2;
    p.page_columns = paged ? 1 : -1;
    p.page_row = p.page_column = 1;
    p.out = out.data();
    out.assign(16, -7.0f);
    std::vector<uint4> workspace(cuda::ragged_attention_workspace(4, 1, 1, p.entries, 8, 4) / 16, {~0u, ~0u, ~0u, ~0u});
    p.workspace = workspace.data();
    cuda::ragged_attention(p, 0, nullptr);
    std::string got;
    for (int token = 0; token < 4; ++token)
      got += std::isnan(out[4 * token]) ? 'x' : std::fabs(out[4 * token] - 1.0f) < 1e-6f ? '1' : '?';
    expect(got == flagged, "lists that name what is not there: " + got + ", expected " + flagged);
  };
  run({0, 1, 2, 3, 4}, {0, 1, 0, 1}, {8, 3, 1, 5}, {0, 0, 0, 0}, false, "1111");
  run({0, 1, 2, 3, 4}, {0, 2, -1, 1}, {8, 3, 1, 5}, {0, 0, 0, 0}, false, "1xx1");
  run({0, 1, 2, 3, 4}, {0, 1, 0, 1}, {9, 3, -1, 5}, {0, 4, 0, -1}, false, "xxxx");
  run({0, 1, 3, 2, 4}, {0, 1, 0, 1}, {8, 3, 1, 5}, {0, 0, 0, 0}, false, "xxxx");
  run({0, 1, 2, 3, 5}, {0, 1, 0, 1}, {8, 3, 1, 5}, {0, 0, 0, 0}, false, "xxxx");
  run({0, 2, 4}, {0, 1}, {8, 3}, {0, 0}, true, "1111");
  for (int32_t bad : {2, -1, 1 << 30}) {
    pages[1] = bad;
    run({0, 2, 4}, {0, 1}, {8, 3}, {0, 0}, true, "11xx");
  }
}

}  // namespace

int main() {
  const Case decode = {
      "decode",
      4,
      2,
      64,
      64,
      0,
      0,
      0,
      false,
      false,
      {{{0, 1, 2, 3}, {2, 0, 3}, {300, 64, 5}, {0, 0, 1}, 3}, {{0, 1, 2, 3}, {0, 3, 1}, {33, 520, 257}, {2, 0, 0}, 2}}};
  const Case queries = {"queries",
                        3,
                        1,
                        40,
                        24,
                        0,
                        50,
                        16,
                        false,
                        false,
                        {{{0, 7, 8}, {1, 3}, {300, 70}, {5, 33}, 2}, {{0, 2, 8}, {0, 2}, {40, 289}, {0, 17}, 2}}};
  const Case tiles = {"tiles",
                      5,
                      1,
                      32,
                      32,
                      1,
                      0,
                      7,
                      false,
                      true,
                      {{{0, 14, 15}, {0, 1}, {530, 9}, {3, 0}, 2}, {{0, 1, 15}, {1, 0}, {10, 90}, {0, 60}, 2}}};
  const Case wide = {"wide",
                     2,
                     1,
                     196,
                     256,
                     12,
                     0,
                     0,
                     true,
                     false,
                     {{{0, 1, 1, 3}, {1, 0, 3}, {70, 0, 280}, {0, 0, 9}, 3},
                      {{0, 0, 2, 3}, {1, 2, 3}, {70, 270, 30}, {0, 200, 0}, 2}}};
  const Case middle = {"middle",
                       8,
                       1,
                       128,
                       96,
                       0,
                       0,
                       64,
                       false,
                       false,
                       {{{0, 1, 5}, {1, 0}, {65, 129}, {0, 64}, 2}, {{0, 4, 5}, {3, 2}, {128, 1}, {0, 0}, 1}}};
  for (unsigned schedule : {0u, 1u}) {
    emu::schedule = schedule;
    matches_a_plain_loop<BFloat16>(DType::bfloat16, decode);
    matches_a_plain_loop<Float16>(DType::float16, queries);
    matches_a_plain_loop<BFloat16>(DType::bfloat16, tiles);
    matches_a_plain_loop<Float16>(DType::float16, wide);
    matches_a_plain_loop<BFloat16>(DType::bfloat16, middle);
    matches_a_plain_loop<float>(DType::float32, queries);
    matches_a_plain_loop<float>(DType::float32, decode);
    flags_what_is_not_there();
  }
  matches_a_plain_loop<float>(DType::float32, middle);
  matches_a_plain_loop<float>(DType::float32, wide);
  return ended();
}
