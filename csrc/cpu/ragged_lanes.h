// The products of ragged_attention in vector registers, on keys and values as the cache has them.
//
//   scores   two vectors and half a register of keys at a time: 16 sums with lanes along Dh, then added up side by side
//   values   sums[4 vectors][4 registers of Dv] += weight (broadcast) * value, key by key
//
// What has not the type of the products, or a tail, is copied first, a block at a time.
#pragma once
#include <type_traits>

#include "cpu/ragged_block.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

// What meets in the scores.
struct Floats {
  using Element = float;
  static constexpr int kPer = 1;  // elements in a lane
  EXEUNT_INLINE void add(Vec& sum, const float* q, const float* key) { sum += load(q) * load(key); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = BFloat16;
  static constexpr int kPer = 2;
  EXEUNT_INLINE void add(Vec& sum, const BFloat16* q, const BFloat16* key) {
    const auto pairs = [](const BFloat16* at) { return (__m512bh)load(reinterpret_cast<const float*>(at)); };
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, pairs(q), pairs(key));
  }
};
#endif

// to[width] = from[size], and zero beyond
template <class To, class From>
static void lay_out(const From* from, int64_t size, To* to, int64_t width) {
  int64_t c = 0;
  if constexpr (std::is_same_v<To, From>) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(size) * sizeof(To));
    c = size;
  } else {
    for (; c + kLanes <= size; c += kLanes) store(to + c, load(from + c));
    for (; c < size; ++c) to[c] = to_float(from[c]);
  }
  __builtin_memset(to + c, 0, static_cast<uint64_t>(width - c) * sizeof(To));
}

// rows[count] of `size` elements as To and without a tail: where they lie, or in `room`.
template <class To, class From>
EXEUNT_INLINE void rows_of(const From* const* rows, int64_t count, int64_t size, int64_t width, To* room,
                           const To** out) {
  for (int64_t j = 0; j < count; ++j) {
    if constexpr (std::is_same_v<To, From>)
      if (size == width) {
        out[j] = rows[j];
        continue;
      }
    lay_out(rows[j], size, room + j * width, width);
    out[j] = room + j * width;
  }
}

template <class K, class T>
class Lanes {
 public:
  using Value = T;

  Lanes(const RaggedAttentionParams& params, const RaggedScratch& s, float* memory, int64_t count)
      : p(params),
        vectors(count),
        depth(padded(p.size, kLanes * K::kPer)),
        width(padded(p.value_size, kLanes)),
        queries(reinterpret_cast<Element*>(memory + s.queries)),
        keys(reinterpret_cast<Element*>(memory + s.keys)),
        values(memory + s.values) {}

  // Steps of the work on a block, each of which fetches some of the next.
  int64_t steps() const {
    return (vectors + 1) / 2 * (kBlockKeys / kKeys) +
           (vectors + kRows - 1) / kRows * ((width + kAcross - 1) / kAcross) * kSteps;
  }

  static constexpr int64_t kRow = Block<T>::kKeys;         // floats of a vector's scores, and then of its weights
  static int64_t column(int64_t d, int64_t) { return d; }  // of a result so wide, where element d of the values is
  bool doubts(const float*, int64_t) { return false; }

  void query(int64_t i, const T* q) { lay_out(q, p.size, queries + i * depth, depth); }

  void score(const Block<T>& now, Block<T>& next, float* scores) {
    const Element* key[kBlockKeys];
    rows_of(now.key, padded(now.count, kLanes), p.size, depth, keys, key);
    for (int64_t j = 0; j < now.count; j += kKeys)
      for (int64_t i = 0; i < vectors; i += 2) {
        const bool two = i + 1 < vectors;
        const Element *a = queries + i * depth, *b = two ? a + depth : a;
        Vec sum[2 * kKeys] = {};
        for (int64_t d = 0; d < depth; d += kLanes * K::kPer)
          for (int l = 0; l < kKeys; ++l) {
            K::add(sum[l], a + d, key[j + l] + d);
            K::add(sum[kKeys + l], b + d, key[j + l] + d);
          }
        const Vec all = sum_each(sum);
        float* to = scores + i * kBlockKeys + j;
        __builtin_memcpy(to, &all, sizeof all / 2);
        if (two)
          __builtin_memcpy(to + kBlockKeys, reinterpret_cast<const char*>(&all) + sizeof all / 2, sizeof all / 2);
        next.fetch();
      }
  }

  // Weights lie where scores were.
  EXEUNT_INLINE Vec put(float* scores, int v, Vec weight) {
    store(scores + v * kLanes, weight);
    return weight;
  }

  // result[vectors][to_row] (+)= weights values
  void mix(const Block<T>& now, Block<T>& next, const float* weights, float* result, int64_t to_row, bool fresh) {
    const float* value[kBlockKeys];
    rows_of(now.value, now.count, p.value_size, width, values, value);
    for (int64_t i = 0; i < vectors; i += kRows)
      for (int64_t c = 0; c < width; c += kAcross) {
        const Sums sums{value, now.count, c, weights + i * kBlockKeys, result + i * to_row + c, to_row, fresh};
        const int64_t rows = vectors - i < kRows ? vectors - i : kRows, columns = (width - c) / kLanes;
        choose<kRows>(rows, [&](auto r) {
          choose<kColumns>(columns < kColumns ? columns : kColumns, [&](auto v) { add<r(), v()>(sums, next); });
        });
      }
  }

 private:
  using Element = typename K::Element;
  static constexpr int64_t kBlockKeys = kRow;
  static constexpr int64_t kKeys = kLanes / 2;                      // of a step of the scores
  static constexpr int kRows = 4, kColumns = kLanes == 16 ? 4 : 2;  // of the registers of sums
  static constexpr int64_t kAcross = kColumns * kLanes, kSteps = 8;
  const RaggedAttentionParams& p;
  const int64_t vectors, depth, width;
  Element *queries, *keys;  // the latter and values: rows that had to be copied
  float* values;

  struct Sums {
    const float* const* value;
    int64_t count, column;
    const float* weights;
    float* to;
    int64_t to_row;
    bool fresh;
  };

  template <int R, int C>
  static inline __attribute__((always_inline)) void add(const Sums& s, Block<T>& next) {
    Vec sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) sum[r][v] = s.fresh ? Vec{} : load(s.to + r * s.to_row + v * kLanes);
    for (int64_t j = 0; j < s.count;) {
      const int64_t end = j + kBlockKeys / kSteps < s.count ? j + kBlockKeys / kSteps : s.count;
      for (; j < end; ++j) {
        Vec value[C];
        for (int v = 0; v < C; ++v) value[v] = load(s.value[j] + s.column + v * kLanes);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < C; ++v) sum[r][v] += s.weights[r * kBlockKeys + j] * value[v];
      }
      next.fetch();
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) store(s.to + r * s.to_row + v * kLanes, sum[r][v]);
  }

  // f(value) with a number that is known when this is compiled, 1 to N.
  template <int N, class F>
  EXEUNT_INLINE void choose(int64_t value, F f) {
    if constexpr (N > 1)
      if (value < N) return choose<N - 1>(value, f);
    f(std::integral_constant<int, N>());
  }
};

}  // namespace
}  // namespace exeunt::cpu::EXEUNT_ISA
