// ragged_attention, one task: a tile of query vectors that share a key head, over some chunks of one row's keys.
//
//   queries   [vectors][Dh]      packed once
//   for each block of 64 keys of a chunk:
//     keys      [Dh][64]         transposed while they are read                       } of the cache, in whatever order
//     scores    = queries . keys        -> scale, softcap, alibi, bias, visible range }  it lies
//     weights   = e^(scores - maximum)  -> what was summed before shrinks where the maximum rose
//     values    [64][Dv]         as they lie where they are float32 without pages, packed otherwise
//     result   += weights . values
//   chunks are merged in their order; the whole is divided by its sum and rounded once
//
// Both products are one routine, sums[R][C] of registers += a[R] (broadcast) * b[C], depth by depth:
//
//   Floats   an element is a float                                 multiply-add
//   Pairs    an element is two bfloat16 (of Dh, or of two keys)    vdpbf16ps; from 9 vectors on in tile registers (AMX)
//
// Bits: every sum is one chain over its depth whatever else is in registers, blocks and chunks are counted from
// kv_start; so a vector's result depends neither on its neighbours, nor on the padding, nor on who merges the chunks.
// Hazard: keys outside of the row's range are never read, not even as a factor of zero.
#include "cpu/kernels.h"
#include "cpu/vec.h"
#if defined(EXEUNT_AMX)
#include "cpu/tiles.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kRowsAtOnce = 4, kColumnsAtOnce = kLanes == 16 ? 4 : 2;  // of the products' registers
constexpr int kBlockVecs = kBlockKeys / kLanes;
constexpr float kLowest = -__builtin_inff();

// e^x for x <= 0: zero from where float32 has no normal number left. NaN stays NaN.
EXEUNT_INLINE Vec weight_of(Vec x) { return x < -87.0f ? Vec{} : exp(x); }
EXEUNT_INLINE float weight_of(float x) { return weight_of(splat(x))[0]; }

// ---- products -------------------------------------------------------------------------------------------------------

struct Floats {
  using Element = float;
  static constexpr int kPer = 1;  // values in an element
  EXEUNT_INLINE void add(Vec& sum, float a, Vec b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint32_t;
  static constexpr int kPer = 2;
  EXEUNT_INLINE void add(Vec& sum, uint32_t a, Vec b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
};
#endif

// c[rows][cols] (+)= a[rows][depth] b[depth][cols]
template <class K>
struct Product {
  using Element = typename K::Element;
  const Element *a, *b;
  float* c;
  int64_t a_row, b_row, c_row, rows, columns, depth;
  bool fresh;  // c has no value yet

  template <int R, int C>
  EXEUNT_INLINE void registers(const Product& p, int64_t row, int64_t column) {
    const Element* a = p.a + row * p.a_row;
    const Element* b = p.b + column;
    float* c = p.c + row * p.c_row + column;
    Vec sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) sum[r][v] = p.fresh ? Vec{} : load(c + r * p.c_row + v * kLanes);
    for (int64_t d = 0; d < p.depth; ++d) {
      Vec of_b[C];
      for (int v = 0; v < C; ++v) of_b[v] = load(reinterpret_cast<const float*>(b + d * p.b_row + v * kLanes));
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < C; ++v) K::add(sum[r][v], a[r * p.a_row + d], of_b[v]);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < C; ++v) store(c + r * p.c_row + v * kLanes, sum[r][v]);
  }

  template <int C>
  EXEUNT_INLINE void all_rows(const Product& p, int64_t column) {
    int64_t row = 0;
    for (; row + kRowsAtOnce <= p.rows; row += kRowsAtOnce) registers<kRowsAtOnce, C>(p, row, column);
    if (p.rows - row == 3) registers<3, C>(p, row, column);
    if (p.rows - row == 2) registers<2, C>(p, row, column);
    if (p.rows - row == 1) registers<1, C>(p, row, column);
  }

  static void run(const Product& p) {
    int64_t column = 0;
    for (; column + kColumnsAtOnce * kLanes <= p.columns; column += kColumnsAtOnce * kLanes)
      all_rows<kColumnsAtOnce>(p, column);
    if constexpr (kColumnsAtOnce == 4)
      if (p.columns - column > kLanes) {
        all_rows<2>(p, column);
        column += 2 * kLanes;
      }
    if (p.columns > column) all_rows<1>(p, column);
  }
};

#if defined(EXEUNT_AMX)
#include "cpu/ragged_attention_amx.inc"
#endif

// ---- packing --------------------------------------------------------------------------------------------------------

// kLanes elements; some(): only those of `left` values, and zero beyond. A value of its own reaches memory for the
// latter, so that it is kept apart from what nearly all of a cache is read by.
template <class T>
EXEUNT_INLINE Vec elements(Floats, const T* p) {
  return load(p);
}
#if defined(__AVX512BF16__)
EXEUNT_INLINE Vec elements(Pairs, const BFloat16* p) { return load(reinterpret_cast<const float*>(p)); }
#endif
template <class K, class T>
[[gnu::noinline]] static Vec some(K kind, const T* p, int64_t left) {
  T copy[kLanes * K::kPer] = {};
  constexpr int64_t kAll = kLanes * K::kPer;
  __builtin_memcpy(copy, p, static_cast<uint64_t>(left < 0 ? 0 : left < kAll ? left : kAll) * sizeof(T));
  return elements(kind, copy);
}

// ---- the task -------------------------------------------------------------------------------------------------------

struct Result {  // of some vectors, not yet divided by its sums
  float *maximum, *sum, *values;
  EXEUNT_INLINE Result at(float* p, int64_t vectors) { return {p, p + vectors, p + 2 * vectors}; }
};

// whole = whole and then part
EXEUNT_INLINE void absorb(const Result& whole, const Result& part, int64_t vectors, int64_t width, bool first) {
  if (first) {
    __builtin_memcpy(whole.maximum, part.maximum, sizeof(float) * static_cast<uint64_t>(vectors * (2 + width)));
    return;
  }
  for (int64_t i = 0; i < vectors; ++i) {
    const float a = whole.maximum[i], b = part.maximum[i];
    const float top = a > b ? a : b, base = top == kLowest ? 0.0f : top;
    const float old_scale = weight_of(a - base), new_scale = weight_of(b - base);
    whole.maximum[i] = top;
    whole.sum[i] = whole.sum[i] * old_scale + part.sum[i] * new_scale;
    for (int64_t d = i * width; d < (i + 1) * width; d += kLanes)
      store(whole.values + d, load(whole.values + d) * old_scale + load(part.values + d) * new_scale);
  }
}

EXEUNT_INLINE void finish(const RaggedAttentionParams& p, const RaggedTask& task, const Result& whole, bool empty) {
  const int64_t group = p.heads / p.kv_heads, width = padded(p.value_size, 16);
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t vector = task.first + i;
    const int64_t token = p.q_indptr[task.entry] + vector / group, head = task.head * group + vector % group;
    const int64_t to = (token * p.heads + head) * p.value_size;
    const bool blind = empty || whole.sum[i] == 0.0f;  // it saw no key
    for (int64_t d = 0; d < p.value_size; ++d)
      store_at(p.out, p.dtype, to + d, blind ? 0.0f : whole.values[i * width + d] / whole.sum[i]);
  }
}

template <class K, class T>
class Tile {
 public:
  Tile(const RaggedAttentionParams& params, const RaggedTask& of, float* memory)
      : p(params),
        task(of),
        scratch(p.size, p.value_size),
        group(p.heads / p.kv_heads),
        width(padded(p.value_size, 16)),
        depth(padded((p.size + K::kPer - 1) / K::kPer, K::kPer == 2 ? 16 : 1)),
        start(p.kv_start ? p.kv_start[of.entry] : 0),
        queries(reinterpret_cast<Element*>(memory + scratch.queries)),
        keys(reinterpret_cast<Element*>(memory + scratch.keys)),
        values(reinterpret_cast<Element*>(memory + scratch.values)),
        scores(memory + scratch.scores),
        weights(K::kPer == 2 ? reinterpret_cast<Element*>(memory + scratch.weights)
                             : reinterpret_cast<Element*>(scores)),
        chunk(Result::at(memory + scratch.chunk, of.count)),
        whole(Result::at(memory + scratch.whole, of.count)) {}

  void run(float* partial) {
    bool first = true;
    if (task.begin < task.end) {
      pack_queries();
      for (int64_t at = start + (task.begin - start) / kChunkKeys * kChunkKeys; at < task.end; at += kChunkKeys) {
        const int64_t end = at + kChunkKeys < task.end ? at + kChunkKeys : task.end;
        of_chunk(task.begin > at ? at + (task.begin - at) / kBlockKeys * kBlockKeys : at, end);
        absorb(partial ? Result::at(partial, task.count) : whole, chunk, task.count, width, first);
        first = false;
      }
    }
    if (!partial) finish(p, task, whole, first);
  }

 private:
  using Element = typename K::Element;
  const RaggedAttentionParams& p;
  const RaggedTask& task;
  const RaggedScratch scratch;
  const int64_t group, width, depth, start;
  Element *queries, *keys, *values;
  float* scores;
  Element* weights;
  const Result chunk, whole;
  const T *key_of[kBlockKeys], *value_of[kBlockKeys];
  int64_t from[kTileVectors], until[kTileVectors];  // the keys that a vector sees
  int64_t position[kTileVectors];
  float slope[kTileVectors];
  int64_t bias_at[kTileVectors];  // element of the bias of key 0

  int64_t rows_of(int64_t count) { return K::kPer == 2 ? padded(count, 16) : count; }

  void pack_queries() {
    const int64_t len = p.kv_len[task.entry], first_token = p.q_indptr[task.entry];
    const int64_t queries_of_entry = p.q_indptr[task.entry + 1] - first_token;
    for (int64_t i = 0; i < task.count; ++i) {
      const int64_t query = (task.first + i) / group, token = first_token + query;
      const int64_t head = task.head * group + (task.first + i) % group;
      position[i] = p.positions ? p.positions[token] : len - queries_of_entry + query;
      until[i] = p.causal && position[i] + 1 < len ? position[i] + 1 : len;
      from[i] = p.window && position[i] - p.window + 1 > start ? position[i] - p.window + 1 : start;
      slope[i] = p.alibi ? p.alibi[head] : 0.0f;
      bias_at[i] = token * p.bias_token + head * p.bias_head;
      const T* q = static_cast<const T*>(p.q) + token * p.q_token + head * p.q_head;
      for (int64_t d = 0; d < depth; d += kLanes) {
        const Vec v = some(K{}, q + d * K::kPer, p.size - d * K::kPer);
        const int64_t room = depth - d < kLanes ? depth - d : kLanes;
        __builtin_memcpy(queries + i * scratch.depth + d, &v, sizeof(float) * static_cast<uint64_t>(room));
      }
    }
    for (int64_t i = task.count; i < rows_of(task.count); ++i)  // vectors that only fill a tile
      __builtin_memset(queries + i * scratch.depth, 0, sizeof(float) * static_cast<uint64_t>(depth));
  }

  // Keys [at, end) one after another; weights and values of a chunk begin anew.
  void of_chunk(int64_t at, int64_t end) {
    for (int64_t i = 0; i < task.count; ++i) chunk.maximum[i] = kLowest, chunk.sum[i] = 0.0f;
    for (bool fresh = true; at < end; at += kBlockKeys, fresh = false) {
      const int64_t count = end - at < kBlockKeys ? end - at : kBlockKeys;
      find(at, count);
      pack_keys(count);
      Product<K> score{queries, keys, scores, scratch.depth, kBlockKeys, kBlockKeys, task.count, padded(count, kLanes),
                       depth,   true};
      multiply(score);
      for (int64_t i = 0; i < task.count; ++i) weigh(i, at, count, fresh);
      Product<K> mix{weights,
                     values,
                     chunk.values,
                     kBlockKeys / K::kPer,
                     scratch.width,
                     width,
                     task.count,
                     padded(p.value_size, kLanes),
                     (count + K::kPer - 1) / K::kPer,
                     fresh};
      pack_values(count, mix);
      multiply(mix);
    }
  }

  void multiply(const Product<K>& product) {
#if defined(EXEUNT_AMX)
    if constexpr (K::kPer == 2)
      if (product.rows > 8) return tiles(product);
#endif
    Product<K>::run(product);
  }

  // Addresses of the block's keys and values.
  void find(int64_t at, int64_t count) {
    const int64_t row = p.rows[task.entry];
    const T* k = static_cast<const T*>(p.keys.data) + task.head * p.keys.head;
    const T* v = static_cast<const T*>(p.values.data) + task.head * p.values.head;
    for (int64_t j = 0; j < count;) {
      int64_t held = row, slot = at + j, run = count - j;
      if (p.pages) {
        held = p.pages[row * p.page_row + slot / p.slots * p.page_column];
        slot %= p.slots;
        if (p.slots - slot < run) run = p.slots - slot;
      }
      const T* key = k + held * p.keys.row + slot * p.keys.slot;
      const T* value = v + held * p.values.row + slot * p.values.slot;
      for (int64_t i = 0; i < run; ++i)
        key_of[j + i] = key + i * p.keys.slot, value_of[j + i] = value + i * p.values.slot;
      j += run;
    }
  }

  // keys[d][j], zero beyond Dh and, up to a full register, beyond the last key.
  void pack_keys(int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes)
      for (int64_t d = 0; d < depth; d += kLanes) {
        if (j + kLanes <= count && (d + kLanes) * K::kPer <= p.size)
          turn<true>(j, d, count);
        else
          turn<false>(j, d, count);
      }
  }
  template <bool Whole>
  inline __attribute__((always_inline)) void turn(int64_t j, int64_t d, int64_t count) {
    const int64_t ahead = kBlockKeys * p.keys.slot + d * K::kPer;  // of the next block, unless a page ends before
    Vec v[kLanes];
    for (int i = 0; i < kLanes; ++i)
      if constexpr (Whole) {
        __builtin_prefetch(key_of[j + i] + ahead, 0, 2);
        v[i] = elements(K{}, key_of[j + i] + d * K::kPer);
      } else {
        v[i] = j + i < count ? some(K{}, key_of[j + i] + d * K::kPer, p.size - d * K::kPer) : Vec{};
      }
    transpose(v);
    for (int i = 0; i < kLanes; ++i)
      if (Whole || d + i < depth) store(reinterpret_cast<float*>(keys + (d + i) * kBlockKeys + j), v[i]);
  }

  // values[j][c]; pairs hold keys j and j + 1, and are zero beyond the last key up to a full tile.
  void pack_values(int64_t count, Product<K>& mix) {
    const int64_t ahead = kBlockKeys * p.values.slot, line = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < p.value_size; c += line) __builtin_prefetch(value_of[j] + c + ahead, 0, 2);
    constexpr int64_t kAll = kLanes * K::kPer;
    const int64_t whole = p.value_size / kAll * kAll;
    if constexpr (K::kPer == 1) {
      if constexpr (sizeof(T) == sizeof(float))
        if (!p.pages && whole == p.value_size) {
          mix.b = reinterpret_cast<const Element*>(value_of[0]);
          mix.b_row = p.values.slot;
          return;
        }
      for (int64_t j = 0; j < count; ++j) {
        float* to = reinterpret_cast<float*>(values + j * scratch.width);
        for (int64_t c = 0; c < whole; c += kLanes) store(to + c, elements(K{}, value_of[j] + c));
        if (whole < p.value_size) store(to + whole, some(K{}, value_of[j] + whole, p.value_size - whole));
      }
    } else {
#if defined(__AVX512BF16__)
      for (int64_t j = 0; j < count; j += 2) {
        Element* to = values + j / 2 * scratch.width;
        const T *a = value_of[j], *b = j + 1 < count ? value_of[j + 1] : nullptr;
        if (b)
          for (int64_t c = 0; c < whole; c += kAll) interleave(elements(K{}, a + c), elements(K{}, b + c), to + c);
        for (int64_t c = b ? whole : 0; c < p.value_size; c += kAll)
          interleave(some(K{}, a + c, p.value_size - c), b ? some(K{}, b + c, p.value_size - c) : Vec{}, to + c);
      }
      for (int64_t j = padded(count, 2) / 2; j < padded(count, 32) / 2; ++j)
        __builtin_memset(values + j * scratch.width, 0, sizeof(Element) * static_cast<uint64_t>(scratch.width));
#endif
    }
  }

#if defined(__AVX512BF16__)
  // (a[0], b[0]), (a[1], b[1]), ...: 32 pairs
  static inline void interleave(Vec a, Vec b, Element* to) {
    const auto half = [&]<int... I>(uint16_t from, std::integer_sequence<int, I...>) {
      using Shorts = uint16_t __attribute__((vector_size(64)));
      const Shorts index = Shorts{(I % 2 * 32 + I / 2)...} + from;
      return (Vec)_mm512_permutex2var_epi16((__m512i)a, (__m512i)index, (__m512i)b);
    };
    store(reinterpret_cast<float*>(to), half(0, std::make_integer_sequence<int, 32>()));
    store(reinterpret_cast<float*>(to + 16), half(16, std::make_integer_sequence<int, 32>()));
  }
#endif

  // scores -> weights of vector i; its maximum, its sum, and what it has summed so far follow.
  void weigh(int64_t i, int64_t at, int64_t count, bool fresh) {
    float* score = scores + i * kBlockKeys;
    const int64_t low = from[i] - at, high = until[i] - at;
    if (low >= count || high <= 0) {
      __builtin_memset(weights + i * (kBlockKeys / K::kPer), 0, sizeof(Element) * (kBlockKeys / K::kPer));
      return;
    }
    const int vecs = static_cast<int>((count + kLanes - 1) / kLanes);
    Vec x[kBlockVecs], top = splat(kLowest);
    for (int v = 0; v < vecs; ++v) {
      const int64_t lane = v * kLanes;
      x[v] = load(score + lane) * p.scale;
      if (p.softcap != 0.0f) x[v] = p.softcap * tanh(x[v] / p.softcap);
      if (p.alibi) x[v] += slope[i] * (static_cast<float>(at + lane - position[i]) + counting());
      if (p.bias) x[v] += bias(i, at + lane, count - lane);
      if (low > lane || high < lane + kLanes) {
        const IVec index = __builtin_convertvector(counting(), IVec);
        const int32_t lowest = static_cast<int32_t>(low > lane ? low - lane : 0);
        const int32_t beyond = static_cast<int32_t>(high < lane + kLanes ? high - lane : kLanes);
        x[v] = (index >= lowest) & (index < beyond) ? x[v] : splat(kLowest);
      }
      top = max(x[v], top);
    }
    const float old = chunk.maximum[i];
    const float found = across(top, [](Vec a, Vec b) { return max(a, b); })[0];
    const float maximum = old > found ? old : found, base = maximum == kLowest ? 0.0f : maximum;
    Vec sum{};
    for (int v = 0; v < kBlockVecs; ++v) {
      const Vec weight = v < vecs ? weight_of(x[v] - base) : Vec{};
      sum += put(i, v, weight);
    }
    const float shrink = old == maximum ? 1.0f : weight_of(old - base);
    chunk.maximum[i] = maximum;
    chunk.sum[i] = chunk.sum[i] * shrink + across(sum, [](Vec a, Vec b) { return a + b; })[0];
    if (fresh || shrink == 1.0f) return;
    for (int64_t c = i * width; c < (i + 1) * width; c += kLanes)
      store(chunk.values + c, load(chunk.values + c) * shrink);
  }

  // Weights [v * kLanes, (v + 1) * kLanes) of vector i into their place; returns them as they are there.
  Vec put(int64_t i, int v, Vec weight) {
    if constexpr (K::kPer == 1) {
      store(weights + i * kBlockKeys + v * kLanes, weight);
      return weight;
    } else {
#if defined(__AVX512BF16__)
      const __m256bh narrow = _mm512_cvtneps_pbh((__m512)weight);
      BFloat16* to = reinterpret_cast<BFloat16*>(weights + i * (kBlockKeys / 2)) + v * kLanes;
      __builtin_memcpy(to, &narrow, sizeof narrow);
      return load(to);
#endif
    }
  }

  static Vec counting() {
    Vec v;
    for (int l = 0; l < kLanes; ++l) v[l] = static_cast<float>(l);
    return v;
  }

  Vec bias_vec(const RaggedAttentionParams& p, int64_t at, int64_t left) {
    if (left >= kLanes && p.bias_key == 1) {
      Vec v;
      typed(p.bias, p.bias_dtype, [&](auto* b) { v = load(b + at); });
      return v;
    }
    Vec v{};
    for (int64_t l = 0; l < kLanes && l < left; ++l) v[l] = value_at(p.bias, p.bias_dtype, at + l * p.bias_key);
    return v;
  }
  Vec bias(int64_t i, int64_t key, int64_t left) { return bias_vec(p, bias_at[i] + key * p.bias_key, left); }
};

}  // namespace

void ragged_attention_task(const RaggedAttentionParams& p, const RaggedTask& task, float* scratch, float* partial) {
#if defined(EXEUNT_AMX)
  if (p.dtype == DType::bfloat16) tiles_begin();
#endif
  if (p.dtype == DType::float32) Tile<Floats, float>(p, task, scratch).run(partial);
  if (p.dtype == DType::float16) Tile<Floats, Float16>(p, task, scratch).run(partial);
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16) Tile<Pairs, BFloat16>(p, task, scratch).run(partial);
#else
  if (p.dtype == DType::bfloat16) Tile<Floats, BFloat16>(p, task, scratch).run(partial);
#endif
#if defined(EXEUNT_AMX)
  if (p.dtype == DType::bfloat16) tiles_end();
#endif
}

void ragged_attention_merge(const RaggedAttentionParams& p, const RaggedTask* tasks, int64_t count, float* partials) {
  const int64_t vectors = tasks->count, width = padded(p.value_size, 16);
  const Result whole = Result::at(partials + tasks->partial, vectors);
  for (int64_t i = 1; i < count; ++i)
    absorb(whole, Result::at(partials + tasks[i].partial, vectors), vectors, width, false);
  finish(p, *tasks, whole, false);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
