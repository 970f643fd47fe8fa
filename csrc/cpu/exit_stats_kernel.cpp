// exit_stats, some vocabulary chunks: the streaming product with statistics as its epilogue.
//
//   head chunk            for each group of four tiles of 16 vocabulary rows (product.h): 64 products z of each hidden
//   +-----------+         row, in L1
//   | 16 rows   | tile      -> bias, logits_out, scale, softcap, temperature
//   +-----------+           -> LaneStats of the row: lane l follows vocabulary rows l, l + lanes, ...
//   | 16 rows   |         at the end of the chunk the lanes of each row are merged to one ExitStats
//
// A row's statistics are loaded and stored once a group, and exponents are relative to a reference that seldom moves:
// with narrow heads or many rows they would take as long as the products.
//
// Hazard: products past the end of the chunk mean nothing; -inf takes their place before anything looks at them.
#include <limits>

#include "cpu/dots.h"
#include "cpu/gumbel.h"
#include "cpu/product.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr float kFloor = -88.0f;  // below it e^x is no normal number: exp() makes it zero
constexpr float kInf = std::numeric_limits<float>::infinity();

// What exponents are relative to: a row's largest logit so far, until one exceeds it by kSlack. Most rows keep the
// first group's, so that sums neither wait for the largest logit nor are scaled to it. What `weighted` loses when it is
// shifted to the largest at the end is less than e^kSlack ulp of itself: the reference is one of its terms.
constexpr float kSlack = 2.0f;

struct LaneStats {
  Vec top1, top2, sumexp, weighted;
  IVec argmax;
};

EXEUNT_INLINE void reset(LaneStats& s, float& reference) {
  s.top1 = s.top2 = splat(-kInf);
  s.sumexp = s.weighted = splat(0.0f);
  s.argmax = IVec{} - 1;
  reference = std::numeric_limits<float>::lowest();  // which a banned word's logit may be: there may be sums beside it
}

// Sums relative to the largest of top1, which may be +inf.
EXEUNT_INLINE void refer(LaneStats& s, float& reference, Vec top1) {
  const float to = across(top1, [](Vec a, Vec b) { return max(a, b); })[0];
  const Vec moved = max(splat(reference - to), splat(kFloor)), factor = exp(moved);
  s.weighted = factor * (s.weighted + moved * s.sumexp);
  s.sumexp = factor * s.sumexp;
  reference = to;
}

// The logits of `tiles` tiles, z[t * stride] and on, the first of them vocabulary rows `ids`. NaN and +inf leave NaN in
// sumexp; -inf contributes nothing.
template <bool Entropy>
EXEUNT_INLINE void push(LaneStats& s, float& reference, const float* z, int tiles, int64_t stride, IVec ids) {
  constexpr int kVecs = kTile / kLanes;
  Vec top1 = s.top1, top2 = s.top2;
  IVec argmax = s.argmax;
  for (int i = 0; i < tiles * kVecs; ++i, ids += kLanes) {
    const Vec v = load(z + i / kVecs * stride + i % kVecs * kLanes);
    const IVec higher = v > top1;
    top2 = max(higher ? top1 : v, top2);  // which stays, beside a NaN
    argmax = higher ? ids : argmax;
    top1 = higher ? v : top1;
  }
  if (any(top1 > splat(reference + kSlack))) [[unlikely]]
    refer(s, reference, top1);
  const Vec zero = splat(reference);
  Vec sumexp = s.sumexp, weighted = s.weighted;
  for (int i = 0; i < tiles * kVecs; ++i) {
    const Vec v = load(z + i / kVecs * stride + i % kVecs * kLanes);
    const Vec shift = max(splat(kFloor), v - zero), e = exp(shift);  // of max() and NaN the second argument stays
    sumexp += e;
    if constexpr (Entropy) weighted += shift * e;
  }
  s = {top1, top2, sumexp, weighted, argmax};
}

// Merge the lanes of one row, lowest vocabulary index first among equals.
EXEUNT_INLINE ExitStats collect(const LaneStats& s, float reference) {
  if (any(s.sumexp != s.sumexp)) return exit_stats_flagged();
  const auto largest = [](Vec a, Vec b) { return max(a, b); };
  const auto sum = [](Vec a, Vec b) { return a + b; };
  const Vec top1 = across(s.top1, largest);
  const IVec first = s.top1 == top1 ? s.argmax : IVec{} + std::numeric_limits<int32_t>::max();
  const IVec argmax = across(first, [](IVec a, IVec b) { return a < b ? a : b; });
  if (argmax[0] < 0) return exit_stats_empty();
  const float shift = reference - top1[0], factor = exp(splat(shift))[0], sumexp = across(s.sumexp, sum)[0];
  return {argmax[0], top1[0], across(first == argmax ? s.top2 : s.top1, largest)[0], factor * sumexp,
          factor * (across(s.weighted, sum)[0] + shift * sumexp)};
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

// What a block of hidden rows has seen of a chunk: the epilogue of its product. Entropy or not is known at compile
// time: what it costs, only who asks for it pays.
template <bool Entropy>
class Statistics {
 public:
  Statistics(const ExitStatsChunksArgs& args, int64_t first, int64_t rows)
      : a(args), p(*args.p), first(first), rows(rows) {
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    for (int64_t r = 0; r < rows; ++r) start(r);
  }

  Epilogue epilogue() {
    return {[](void* self, const Group& g, const Ahead&) { static_cast<Statistics*>(self)->begin(g); },
            [](void* self, const Group& g, int64_t r) { static_cast<Statistics*>(self)->row(g, r); }, this};
  }

  // A loop over the rows for each thing that is asked, so that what every call needs runs without branches.
  void begin(const Group& g) {
    const int64_t end = g.at + g.count;
    over = end == a.end || end % a.chunk == 0;
    column = (g.at - a.begin) / a.chunk;
    const bool capped = p.softcap > 0.0f;
    const float gain_in = capped ? p.scale / p.softcap : p.scale / p.temperature;
    const float gain_out = p.softcap / p.temperature;
    const int tiles = g.tiles();
    alignas(64) float bias[kGroup * kTile];
    alignas(64) uint32_t vocabulary[kGroup * kTile];
    for (int i = 0; (p.head_bias.data || p.seeds) && i < tiles * kTile; ++i) {
      const int64_t at = i < g.count ? g.at + i : g.at, v = p.columns ? p.columns[at] : at;
      vocabulary[i] = static_cast<uint32_t>(v);
      bias[i] = p.head_bias.data ? value_at(p.head_bias.data, p.head_bias.dtype, v * p.head_bias.stride) : 0.0f;
    }
    const auto at = [&](int64_t r, int i) { return g.z[i / kTile][r] + i % kTile; };
    // use(row, column, z as it is): for every vector of products
    const auto each = [&](auto use) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < tiles * kTile; i += kLanes) use(r, i, load(at(r, i)));
    };
    if (p.head_bias.data) each([&](int64_t r, int i, Vec v) { store(at(r, i), v + load(bias + i)); });
    for (int64_t r = 0; p.logits_out && r < rows; ++r) {
      const int64_t to = a.out_rows[first + r] * p.logits_stride + g.at;
      for (int i = 0; i < g.count; ++i) store_at(p.logits_out, p.logits_dtype, to + i, *at(r, i));
    }
    if (capped)
      each([&](int64_t r, int i, Vec v) {  // but for an infinite product, which is to flag its row
        store(at(r, i), v - v == 0.0f ? tanh(v * gain_in) * gain_out : v * gain_in);
      });
    else if (gain_in != 1.0f)
      each([&](int64_t r, int i, Vec v) { store(at(r, i), v * gain_in); });
    if (g.count % kTile) each([&](int64_t r, int i, Vec v) { store(at(r, i), lane < g.count - i ? v : splat(-kInf)); });
    if (p.topk) each([&](int64_t r, int i, Vec v) { offer(top[r], p.topk, v, ids_at(g, i)); });
    if (p.seeds)
      each([&](int64_t r, int i, Vec v) {
        UVec counter;
        __builtin_memcpy(&counter, vocabulary + i, sizeof counter);
        draw(drawn[r], v, ids_at(g, i), counter, static_cast<uint64_t>(p.seeds[first + r]));
      });
    for (int64_t r = 0; p.target && r < rows; ++r) {
      const int64_t i = p.target[first + r] - g.at;
      if (i >= 0 && i < g.count) p.target_out[first + r] = *at(r, static_cast<int>(i));
    }
  }

  void row(const Group& g, int64_t r) {
    constexpr int64_t kStride = sizeof g.z[0] / sizeof(float);
    if (g.tiles() == kGroup)
      push<Entropy>(stats[r], reference[r], g.z[0][r], kGroup, kStride, ids_at(g, 0));
    else
      push<Entropy>(stats[r], reference[r], g.z[0][r], g.tiles(), kStride, ids_at(g, 0));
    if (over) finish(r, column);
  }

 private:
  const ExitStatsChunksArgs& a;
  const ExitStatsParams& p;
  const int64_t first, rows;
  bool over = false;   // whether the group under way ends its chunk,
  int64_t column = 0;  // which is this one of those that `a` begins with
  IVec lane;
  LaneStats stats[kMaxRows];
  float reference[kMaxRows];  // apart: a LaneStats would grow by a vector
  LaneDraw drawn[kMaxRows];
  TopK top[kMaxRows];

  IVec ids_at(const Group& g, int i) const { return lane + (static_cast<int32_t>(g.at) + i); }

  void start(int64_t r) {
    reset(stats[r], reference[r]);
    drawn[r] = {splat(-kInf), IVec{} - 1};
    for (Candidate& c : top[r].list) c = candidate_none();
  }

  // A row has seen the whole of a chunk.
  void finish(int64_t r, int64_t chunk) {
    const int64_t at = (first + r) * a.partial_stride + chunk;
    a.partials[at] = collect(stats[r], reference[r]);
    for (int i = 0; i < p.topk; ++i) a.topk[at * p.topk + i] = top[r].list[i];
    if (p.seeds) a.drawn[at] = collect(drawn[r]);
    start(r);
  }
};

template <bool Entropy>
EXEUNT_INLINE void chunks(const ExitStatsChunksArgs& a) {
  const ExitStatsParams& p = *a.p;
  const int64_t all = a.end_row - a.first_row, most = product_rows(p.head);
  // Of rows that one product takes all chunks are one stream; others meet each while it is in a cache.
  const int64_t length = all <= most ? a.end - a.begin : a.chunk;
  for (int64_t begin = a.begin; begin < a.end; begin += length) {
    const int64_t end = length < a.end - begin ? begin + length : a.end;
    for (int64_t first = a.first_row; first < a.end_row; first += most) {
      const int64_t rows = a.end_row - first < most ? a.end_row - first : most;
      Statistics<Entropy> statistics(a, first, rows);
      if (a.plain) {  // which are of one chunk
        alignas(64) float z[1][kProductRows][kTile] = {};
        dots({a.plain + first * p.width, p.width, p.width, **z, kTile}, rows, p.head, begin, end);
        const Group group{begin, static_cast<int>(end - begin), z};
        statistics.begin(group);
        for (int64_t r = 0; r < rows; ++r) statistics.row(group, r);
      } else {
        product({p.head, p.width, p.columns, a.panel, nullptr}, begin, end, a.x, first, rows, statistics.epilogue());
      }
    }
  }
}

}  // namespace

void exit_stats_chunks(const ExitStatsChunksArgs& a) {
  if (a.p->entropy)
    chunks<true>(a);
  else
    chunks<false>(a);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
