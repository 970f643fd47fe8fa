// exit_stats, one vocabulary chunk: the streaming product with statistics as its epilogue.
//
//   head chunk            for each tile of 16 vocabulary rows (product.h): 16 products z of each hidden row, in L1
//   +-----------+           -> bias, logits_out, scale, softcap, temperature
//   | 16 rows   | tile      -> LaneStats of the row: lane l follows vocabulary rows l, l + lanes, ...
//   +-----------+         at the end of the chunk the lanes of each row are merged to one ExitStats
//   | 16 rows   |
//
// Hazard: products past the end of the chunk mean nothing; -inf takes their place before anything looks at them.
#include <limits>

#include "cpu/dots.h"
#include "cpu/gumbel.h"
#include "cpu/product.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr float kFloor = -87.0f;  // e^-87 vanishes beside the leading 1 and is still a normal number
constexpr float kInf = std::numeric_limits<float>::infinity();

struct LaneStats {
  Vec top1, top2, sumexp, weighted;
  IVec argmax, bad;
};

EXEUNT_INLINE void reset(LaneStats& s) {
  s.top1 = s.top2 = splat(-kInf);
  s.sumexp = s.weighted = splat(0.0f);
  s.argmax = IVec{} - 1;
  s.bad = IVec{};
}

// e^x for x in [kFloor, 0], 0 at the floor.
EXEUNT_INLINE Vec exp_or_zero(Vec x) { return x > kFloor ? exp(x) : splat(0.0f); }

// One of the old maximum and z is the new one; the other enters with the one exponential that this takes.
template <bool Entropy>
EXEUNT_INLINE void push(LaneStats& s, Vec z, IVec ids) {
  s.bad |= ~(z < kInf);  // NaN and +inf; -inf passes and contributes nothing
  const IVec higher = z > s.top1;
  const Vec low = higher ? s.top1 : z, high = higher ? z : s.top1;
  s.top2 = higher ? low : max(z, s.top2);
  s.argmax = higher ? ids : s.argmax;
  // max() returns its second argument for NaN, so (-inf) - (-inf) and NaN logits also land on the floor.
  const Vec shift = max(low - high, splat(kFloor));
  const Vec e = exp_or_zero(shift);
  if constexpr (Entropy) {
    const Vec scaled = e * (s.weighted + shift * s.sumexp), added = s.weighted + shift * e;
    s.weighted = higher ? scaled : added;
  }
  const Vec scaled = e * s.sumexp + 1.0f, added = s.sumexp + e;
  s.sumexp = higher ? scaled : added;
  s.top1 = high;
}

// Merge the lanes of one row, lowest vocabulary index first among equals.
EXEUNT_INLINE ExitStats collect(const LaneStats& s) {
  if (any(s.bad)) return exit_stats_flagged();
  const auto largest = [](Vec a, Vec b) { return max(a, b); };
  const auto sum = [](Vec a, Vec b) { return a + b; };
  const Vec top1 = across(s.top1, largest);
  const IVec first = s.top1 == top1 ? s.argmax : IVec{} + std::numeric_limits<int32_t>::max();
  const IVec argmax = across(first, [](IVec a, IVec b) { return a < b ? a : b; });
  if (argmax[0] < 0) return exit_stats_empty();
  const Vec shift = max(s.top1 - top1, splat(kFloor)), factor = exp_or_zero(shift);
  return {argmax[0], top1[0], across(first == argmax ? s.top2 : s.top1, largest)[0], across(factor * s.sumexp, sum)[0],
          across(factor * (s.weighted + shift * s.sumexp), sum)[0]};
}

// The k largest logits of a row so far, largest first.
struct TopK {
  Candidate list[8];
};

EXEUNT_INLINE void offer(TopK& top, int k, Vec z, IVec ids) {
  if (!any(z > top.list[k - 1].value)) return;
  for (int l = 0; l < kLanes; ++l) candidate_offer(top.list, k, {z[l], ids[l]});
}

// The largest z + noise in each lane so far.
struct LaneDraw {
  Vec value;
  IVec id;
};

EXEUNT_INLINE void draw(LaneDraw& d, Vec z, IVec ids, UVec vocabulary, uint64_t seed) {
  const Vec value = z + gumbel(philox(vocabulary, seed));
  const IVec higher = value > d.value;
  d.value = higher ? value : d.value;
  d.id = higher ? ids : d.id;
}

EXEUNT_INLINE Candidate collect(const LaneDraw& d) {
  Candidate best = candidate_none();
  for (int l = 0; l < kLanes; ++l)
    if (d.value[l] > best.value || (d.value[l] == best.value && d.id[l] < best.id)) best = {d.value[l], d.id[l]};
  return best;
}

// Entropy or not is known at compile time: what it costs, only who asks for it pays.
template <bool Entropy>
EXEUNT_INLINE void chunk(const ExitStatsChunkArgs& a) {
  const ExitStatsParams& p = *a.p;
  const bool capped = p.softcap > 0.0f;
  const float gain_in = capped ? p.scale / p.softcap : p.scale / p.temperature;
  const float gain_out = p.softcap / p.temperature;
  const int64_t block = product_rows(p.head);
  IVec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;

  for (int64_t first = a.first_row; first < a.end_row; first += block) {
    const int64_t rows = a.end_row - first < block ? a.end_row - first : block;
    alignas(64) LaneStats stats[kMaxRows];
    alignas(64) LaneDraw drawn[kMaxRows];
    TopK top[kMaxRows];
    for (int64_t r = 0; r < rows; ++r) {
      reset(stats[r]);
      drawn[r] = {splat(-kInf), IVec{} - 1};
      for (Candidate& c : top[r].list) c = candidate_none();
    }

    // A loop over the rows for each thing that is asked, so that what every call needs runs without branches.
    const auto epilogue = [&](int64_t vocab, int count, float (*z)[kTile], const Ahead& ahead) {
      alignas(64) float bias[kTile];
      alignas(64) uint32_t vocabulary[kTile];
      for (int i = 0; (p.head_bias.data || p.seeds) && i < kTile; ++i) {
        const int64_t at = i < count ? vocab + i : vocab, v = p.columns ? p.columns[at] : at;
        vocabulary[i] = static_cast<uint32_t>(v);
        bias[i] = p.head_bias.data ? value_at(p.head_bias.data, p.head_bias.dtype, v * p.head_bias.stride) : 0.0f;
      }
      // use(row, column, z as it is): for every vector of products
      const auto each = [&](auto use) __attribute__((always_inline)) {
        for (int64_t r = 0; r < rows; ++r)
          for (int i = 0; i < kTile; i += kLanes) use(r, i, load(z[r] + i));
      };
      const auto ids_at = [&](int i) { return lane + (static_cast<int32_t>(vocab) + i); };
      if (p.head_bias.data) each([&](int64_t r, int i, Vec v) { store(z[r] + i, v + load(bias + i)); });
      for (int64_t r = 0; p.logits_out && r < rows; ++r) {
        const int64_t at = a.out_rows[first + r] * p.logits_stride + vocab;
        for (int i = 0; i < count; ++i) store_at(p.logits_out, p.logits_dtype, at + i, z[r][i]);
      }
      if (capped)
        each([&](int64_t r, int i, Vec v) { store(z[r] + i, tanh(v * gain_in) * gain_out); });
      else if (gain_in != 1.0f)
        each([&](int64_t r, int i, Vec v) { store(z[r] + i, v * gain_in); });
      if (count < kTile) each([&](int64_t r, int i, Vec v) { store(z[r] + i, lane < count - i ? v : splat(-kInf)); });

      each([&](int64_t r, int i, Vec v) {
        if (i == 0) ahead.fetch(r);
        push<Entropy>(stats[r], v, ids_at(i));
      });
      if (p.topk) each([&](int64_t r, int i, Vec v) { offer(top[r], p.topk, v, ids_at(i)); });
      if (p.seeds)
        each([&](int64_t r, int i, Vec v) {
          UVec counter;
          __builtin_memcpy(&counter, vocabulary + i, sizeof counter);
          draw(drawn[r], v, ids_at(i), counter, static_cast<uint64_t>(p.seeds[first + r]));
        });
      for (int64_t r = 0; p.target && r < rows; ++r) {
        const int64_t at = p.target[first + r] - vocab;
        if (at >= 0 && at < count) p.target_out[first + r] = z[r][at];
      }
    };
    if (a.plain) {
      alignas(64) float z[kMaxRows][kTile] = {};
      dots({a.plain + first * p.width, p.width, p.width, *z, kTile}, rows, p.head, a.begin, a.end);
      epilogue(a.begin, static_cast<int>(a.end - a.begin), z, {static_cast<const char*>(p.head.data), 0, 0});
    } else {
      product({p.head, p.width, p.columns, a.panel, nullptr}, a.begin, a.end, a.x, first, rows, epilogue_of(epilogue));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first + r) * a.partial_stride;
      a.partials[at] = collect(stats[r]);
      for (int i = 0; i < p.topk; ++i) a.topk[at * p.topk + i] = top[r].list[i];
      if (p.seeds) a.drawn[at] = collect(drawn[r]);
    }
  }
}

}  // namespace

void exit_stats_chunk(const ExitStatsChunkArgs& a) {
  if (a.p->entropy)
    chunk<true>(a);
  else
    chunk<false>(a);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
