// exit_stats, one vocabulary chunk: the streaming product with statistics as its epilogue.
//
//   head chunk            for each tile of 16 vocabulary rows (product.h):
//   +-----------+           for each hidden row: its 16 products z, in L1
//   | 16 rows   | tile        -> bias, logits_out, scale, softcap, temperature
//   +-----------+             -> LaneStats of the row: lane l follows vocabulary rows l, l + lanes, ...
//   | 16 rows   |         at the end of the chunk the lanes of each row are merged to one ExitStats
//
// Hazard: products past the end of the chunk are those of its last row; they are overwritten by -inf.
#include <limits>

#include "cpu/kernels.h"
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

EXEUNT_INLINE void push(LaneStats& s, Vec z, IVec ids) {
  s.bad |= ~(z < kInf);  // NaN and +inf; -inf passes and contributes nothing
  const IVec higher = z > s.top1;
  const Vec top1 = higher ? z : s.top1;
  s.top2 = higher ? s.top1 : max(z, s.top2);
  s.argmax = higher ? ids : s.argmax;
  // max() returns its second argument for NaN, so (-inf) - (-inf) and NaN logits also land on the floor.
  const Vec shift = max(s.top1 - top1, splat(kFloor));
  const Vec delta = max(z - top1, splat(kFloor));
  const Vec factor = exp_or_zero(shift), e = exp_or_zero(delta);
  s.weighted = factor * (s.weighted + shift * s.sumexp) + delta * e;
  s.sumexp = factor * s.sumexp + e;
  s.top1 = top1;
}

// Merge the lanes of one row, lowest vocabulary index first among equals.
EXEUNT_INLINE ExitStats collect(const LaneStats& s) {
  alignas(64) float top1[kLanes], sumexp[kLanes], weighted[kLanes];
  store(top1, s.top1);
  int best = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (s.bad[l]) return exit_stats_flagged();
    if (top1[l] > top1[best] || (top1[l] == top1[best] && s.argmax[l] < s.argmax[best])) best = l;
  }
  if (s.argmax[best] < 0) return exit_stats_empty();
  const Vec shift = max(s.top1 - top1[best], splat(kFloor));
  const Vec factor = exp_or_zero(shift);
  store(sumexp, factor * s.sumexp);
  store(weighted, factor * (s.weighted + shift * s.sumexp));
  ExitStats out{s.argmax[best], top1[best], s.top2[best], 0.0f, 0.0f};
  for (int l = 0; l < kLanes; ++l) {
    if (l != best && top1[l] > out.top2) out.top2 = top1[l];
    out.sumexp += sumexp[l];
    out.weighted += weighted[l];
  }
  return out;
}

template <class Product>
void chunk(const ExitStatsChunkArgs& a, Product product) {
  const ExitStatsParams& p = *a.p;
  const bool capped = p.softcap > 0.0f;
  const float gain_in = capped ? p.scale / p.softcap : p.scale / p.temperature;
  const float gain_out = p.softcap / p.temperature;
  [[maybe_unused]] const typename Product::Scope scope;
  IVec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;

  for (int64_t first = 0; first < a.rows; first += Product::kRows) {
    const int64_t rows = a.rows - first < Product::kRows ? a.rows - first : Product::kRows;
    alignas(64) LaneStats stats[Product::kRows];
    for (int64_t r = 0; r < rows; ++r) reset(stats[r]);

    for (int64_t vocab = a.begin; vocab < a.end; vocab += kTile) {
      const int count = static_cast<int>(a.end - vocab < kTile ? a.end - vocab : kTile);
      alignas(64) float bias[kTile];
      for (int i = 0; p.head_bias.data && i < kTile; ++i)
        bias[i] = value_at(p.head_bias.data, p.head_bias.dtype, i < count ? vocab + i : vocab);
      const Tile tile = tile_of(p.head, p.width, vocab, count, rows > Product::kOnce, a.panel);
      product.run(tile, a.x, first, rows, [&](int64_t r, const float* z) __attribute__((always_inline)) {
        alignas(64) float raw[kTile];
        for (int i = 0; i < kTile; i += kLanes)
          store(raw + i, p.head_bias.data ? load(z + i) + load(bias + i) : load(z + i));
        if (p.logits_out) {
          const int64_t at = a.out_rows[first + r] * p.logits_stride + vocab;
          for (int i = 0; i < count; ++i) store_at(p.logits_out, p.logits_dtype, at + i, raw[i]);
        }
        for (int i = 0; i < kTile; i += kLanes) {
          const IVec ids = lane + i;
          Vec v = load(raw + i) * gain_in;
          if (capped) v = tanh(v) * gain_out;
          if (count < kTile) v = ids < count ? v : splat(-kInf);
          push(stats[r], v, ids + static_cast<int32_t>(vocab));
        }
      });
    }
    for (int64_t r = 0; r < rows; ++r) a.partials[(first + r) * a.partial_stride] = collect(stats[r]);
  }
}

int64_t lines_of(DType weights, int64_t width) { return (width * element_bytes(weights) + kLine - 1) / kLine; }

}  // namespace

int64_t rows_bytes(DType weights, int64_t rows, int64_t width) {
  return with_product(weights, [&](auto product) { return product.rows_bytes(rows, lines_of(weights, width)); });
}

void pack_row(DType weights, const float* row, int64_t width, int64_t n, PackedRows x) {
  with_product(weights, [&](auto product) { product.pack_row(row, width, lines_of(weights, width), n, x); });
}

void exit_stats_chunk(const ExitStatsChunkArgs& args) {
  with_product(args.p->head.dtype, [&](auto product) { chunk(args, product); });
}

}  // namespace exeunt::cpu::EXEUNT_ISA
