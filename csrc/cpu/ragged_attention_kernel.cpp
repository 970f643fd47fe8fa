// ragged_attention, one task: a tile of query vectors that share a key head, over some chunks of one row's keys.
//
//   queries   laid out once for the products
//   for each block of keys of a chunk:                                          meanwhile later ones are fetched
//     scores    = keys . queries        -> scale, softcap, alibi, bias, visible range
//     weights   = e^(scores - maximum)  -> what was summed before shrinks where the maximum rose by much
//     result   += weights . values
//   chunks are merged in their order; the whole is divided by its sum and rounded once
//
// Who does the products:
//
//   Lanes   vector registers (ragged_lanes.h); scores of bfloat16 by vdpbf16ps where there is one
//   Tiles   tile registers (ragged_attention_amx.inc), bfloat16
//
// Bits: every sum is one chain over its depth whatever else is in registers, blocks and chunks are counted from
// kv_start; so a vector's result depends neither on its neighbours, nor on the padding, nor on who merges the chunks.
// Hazard: keys outside of the row's range are never read, not even as a factor of zero.
#include "cpu/kernels.h"
#include "cpu/ragged_lanes.h"
#if defined(EXEUNT_AMX)
#include "cpu/tiles.h"
#endif

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr float kLowest = -__builtin_inff();
constexpr float kSlack = 8.0f;  // scores pass the maximum by so much before sums are shrunk: weights are up to e^8

// e^x for x <= 0: zero from where float32 has no normal number left. NaN stays NaN.
EXEUNT_INLINE Vec weight_of(Vec x) { return x < -87.0f ? Vec{} : exp(x); }
EXEUNT_INLINE float weight_of(float x) { return weight_of(splat(x))[0]; }

#if defined(EXEUNT_AMX)
#include "cpu/ragged_attention_amx.inc"
#endif

// ---- the task -------------------------------------------------------------------------------------------------------

struct Result {  // of some vectors, not yet divided by its sums (ragged_partial())
  float *maximum, *sum, *values;
  EXEUNT_INLINE Result at(float* p, int64_t vectors) { return {p, p + vectors, p + padded(2 * vectors, 16)}; }
};

// whole = whole and then part
EXEUNT_INLINE void absorb(const Result& whole, const Result& part, int64_t vectors, int64_t width, bool first) {
  if (first) {
    const int64_t floats = whole.values - whole.maximum + vectors * width;
    __builtin_memcpy(whole.maximum, part.maximum, sizeof(float) * static_cast<uint64_t>(floats));
    return;
  }
  alignas(64) float old_scale[kTileVectors] = {}, new_scale[kTileVectors] = {};
  for (int64_t i = 0; i < vectors; ++i) {
    const float a = whole.maximum[i], b = part.maximum[i];
    const float top = a > b ? a : b, base = top == kLowest ? 0.0f : top;
    whole.maximum[i] = top;
    old_scale[i] = a - base;
    new_scale[i] = b - base;
  }
  for (int64_t i = 0; i < vectors; i += kLanes) {  // of those beyond the last one nothing is used
    store(old_scale + i, weight_of(load(old_scale + i)));
    store(new_scale + i, weight_of(load(new_scale + i)));
  }
  for (int64_t i = 0; i < vectors; ++i) {
    whole.sum[i] = whole.sum[i] * old_scale[i] + part.sum[i] * new_scale[i];
    for (int64_t d = i * width; d < (i + 1) * width; d += kLanes)
      store(whole.values + d, load(whole.values + d) * old_scale[i] + load(part.values + d) * new_scale[i]);
  }
}

template <class Products>
EXEUNT_INLINE void finish(const RaggedAttentionParams& p, const RaggedTask& task, const Result& whole, bool empty) {
  const int64_t group = p.heads / p.kv_heads, width = ragged_width(p.value_size);
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t vector = task.first + i;
    const int64_t token = p.q_indptr[task.entry] + vector / group, head = task.head * group + vector % group;
    const int64_t to = (token * p.heads + head) * p.value_size;
    const bool blind = empty || whole.sum[i] == 0.0f;  // it saw no key
    for (int64_t d = 0; d < p.value_size; ++d)
      store_at(p.out, p.dtype, to + d,
               blind ? 0.0f : whole.values[i * width + Products::column(d, width)] / whole.sum[i]);
  }
}

template <class Products>
class Tile {
 public:
  Tile(const RaggedAttentionParams& params, const RaggedTask& of, float* memory)
      : p(params),
        task(of),
        scratch(p.size, p.value_size),
        group(p.heads / p.kv_heads),
        width(ragged_width(p.value_size)),
        start(p.kv_start ? p.kv_start[of.entry] : 0),
        products(p, scratch, memory, of.count),
        blocks{{p, of, products.steps() + of.count * (kBlockVecs / kFetchVecs)},
               {p, of, products.steps() + of.count * (kBlockVecs / kFetchVecs)}},
        scores(memory + scratch.scores),
        chunk(Result::at(memory + scratch.chunk, of.count)),
        whole(Result::at(memory + scratch.whole, of.count)) {}

  void run(float* partial) {
    const bool finishes = !partial;
    bool first = true;
    if (task.begin < task.end) {
      read_queries();
      for (int64_t at = start + (task.begin - start) / kChunkKeys * kChunkKeys; at < task.end; at += kChunkKeys) {
        const int64_t end = at + kChunkKeys < task.end ? at + kChunkKeys : task.end;
        const int64_t from_key = task.begin > at ? at + (task.begin - at) / kBlockKeys * kBlockKeys : at;
        if (partial) fetch_to_write(partial);
        do of_chunk(from_key, end);
        while (products.doubts(chunk.values, task.count * width));
        absorb(partial ? Result::at(partial, task.count) : whole, chunk, task.count, width, first || partial);
        if (partial) partial += ragged_partial(task.count, p.value_size);
        first = false;
      }
    }
    if (finishes) finish<Products>(p, task, whole, first);
  }

 private:
  using T = typename Products::Value;
  static constexpr int64_t kBlockKeys = Block<T>::kKeys;
  static constexpr int kBlockVecs = kBlockKeys / kLanes;
  static constexpr int kFetchVecs = kBlockVecs > 4 ? kBlockVecs / 4 : 1;  // of weights between two fetches
  const RaggedAttentionParams& p;
  const RaggedTask& task;
  const RaggedScratch scratch;
  const int64_t group, width, start;
  Products products;
  Block<T> blocks[2];  // one that is worked on, and the next
  float* scores;
  const Result chunk, whole;
  Vec sums[kTileVectors];                           // of a chunk's weights, lane by lane
  int64_t from[kTileVectors], until[kTileVectors];  // the keys that a vector sees
  int64_t position[kTileVectors];
  float slope[kTileVectors];
  int64_t bias_at[kTileVectors];  // element of the bias of key 0

  void read_queries() {
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
      products.query(i, static_cast<const T*>(p.q) + token * p.q_token + head * p.q_head);
    }
  }

  // A partial result's lines, while its chunk is worked on: memory is busy, and stores to them would wait.
  void fetch_to_write(const float* partial) {
    for (int64_t i = 0; i < ragged_partial(task.count, p.value_size); i += 16) __builtin_prefetch(partial + i, 1, 3);
  }

  // Keys [at, end) one after another; weights and values of a chunk begin anew.
  void of_chunk(int64_t at, int64_t end) {
    for (int64_t i = 0; i < task.count; ++i) chunk.maximum[i] = kLowest, sums[i] = Vec{};
    for (bool fresh = true; at < end; at += kBlockKeys, fresh = false) {
      const auto up_to = [&](int64_t limit, int64_t first) {
        const int64_t left = limit - first;
        return left < 0 ? 0 : left < kBlockKeys ? left : kBlockKeys;
      };
      Block<T>&now = blocks[at / kBlockKeys % 2], &next = blocks[(at / kBlockKeys + 1) % 2];
      if (now.at != at || now.count != up_to(end, at)) now.find(at, up_to(end, at));
      next.find(at + kBlockKeys, up_to(task.ahead, at + kBlockKeys));
      products.score(now, next, scores);
      for (int64_t i = 0; i < task.count; ++i) weigh(i, at, now.count, fresh, next);
      products.mix(now, next, scores, chunk.values, width, fresh);
    }
    for (int64_t i = 0; i < task.count; ++i) chunk.sum[i] = across(sums[i], [](Vec a, Vec b) { return a + b; })[0];
  }

  // scores -> weights of vector i; its maximum, its sum, and what it has summed so far follow.
  void weigh(int64_t i, int64_t at, int64_t count, bool fresh, Block<T>& next) {
    float* score = scores + i * Products::kRow;
    const int64_t low = from[i] - at, high = until[i] - at;
    if (low >= count || high <= 0) {
      for (int v = 0; v < kBlockVecs; ++v) products.put(score, v, Vec{});
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
    const float maximum = found > old + kSlack ? found : old, base = maximum == kLowest ? 0.0f : maximum;
    Vec sum{};
    for (int v = 0; v < kBlockVecs; ++v) {
      const Vec weight = v < vecs ? weight_of(x[v] - base) : Vec{};
      sum += products.put(score, v, weight);
      if (v % kFetchVecs == 0) next.fetch();
    }
    if (old == maximum) {
      sums[i] += sum;
      return;
    }
    const float shrink = weight_of(old - base);
    chunk.maximum[i] = maximum;
    sums[i] = sums[i] * shrink + sum;
    if (fresh) return;
    for (int64_t c = i * width; c < (i + 1) * width; c += kLanes)
      store(chunk.values + c, load(chunk.values + c) * shrink);
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
  if (p.dtype == DType::float32) Tile<Lanes<Floats, float>>(p, task, scratch).run(partial);
  if (p.dtype == DType::float16) Tile<Lanes<Floats, Float16>>(p, task, scratch).run(partial);
  if (p.dtype != DType::bfloat16) return;
#if defined(EXEUNT_AMX)
  Tile<Tiles>(p, task, scratch).run(partial);
#elif defined(__AVX512BF16__)
  Tile<Lanes<Pairs, BFloat16>>(p, task, scratch).run(partial);
#else
  Tile<Lanes<Floats, BFloat16>>(p, task, scratch).run(partial);
#endif
}

void ragged_attention_merge(const RaggedAttentionParams& p, const RaggedTask& tile, int64_t chunks, float* partials) {
  const Result whole = Result::at(partials, tile.count);
  for (int64_t i = 1; i < chunks; ++i) {
    float* part = partials + i * ragged_partial(tile.count, p.value_size);
    absorb(whole, Result::at(part, tile.count), tile.count, ragged_width(p.value_size), false);
  }
#if defined(EXEUNT_AMX)
  if (p.dtype == DType::bfloat16) return finish<Tiles>(p, tile, whole, false);
#endif
  finish<Lanes<Floats, float>>(p, tile, whole, false);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
