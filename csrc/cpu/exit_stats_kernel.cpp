// exit_stats, one vocabulary chunk: few hidden rows times a streamed head, statistics in registers and L1.
//
//   head chunk            for each tile of 16 vocabulary rows:
//   +-----------+           for each group of R hidden rows (at most 4):
//   | 16 rows   | tile        R x C dot products at a time, one accumulator vector per (row, vocabulary) pair
//   +-----------+             -> z[R][16] in L1 -> bias, logits_out, scale, softcap, temperature
//   | 16 rows   |             -> LaneStats of the row: lane l follows vocabulary rows l, l + lanes, ...
//   +-----------+         at the end of the chunk the lanes of each row are merged to one ExitStats
//
// Bits: every (row, vocabulary) product is one chain of multiply-adds over D whatever R and C are, so a row's
// statistics depend neither on the rows beside it nor on the thread that ran the chunk.
// Hazard: vocabulary rows past the end of the chunk are read as its last row and then overwritten by -inf.
#include <limits>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

constexpr int kTile = 16;                        // vocabulary rows per tile; a multiple of every lane count
constexpr int64_t kDepth = 1024;                 // elements of D per block: 4 rows of x and 4 of the head fit L1
constexpr int kRowBlock = 64;                    // hidden rows whose LaneStats sit in L1 together (24 KiB with AVX-512)
constexpr int kMaxGroup = kLanes == 16 ? 4 : 2;  // hidden rows that share one load of the head
constexpr float kFloor = -87.0f;                 // e^-87 vanishes beside the leading 1 and is still a normal number
constexpr float kInf = std::numeric_limits<float>::infinity();

// Columns per group, so that rows * columns accumulators and their operands fit the register file.
template <int Rows>
constexpr int columns() {
  return Rows == 1 || (Rows == 2 && kLanes == 16) ? 8 : 4;
}

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

// The products of Rows hidden rows with Cols vocabulary rows over [begin, end) of D, in registers. Between blocks of D
// the sums wait in `acc`, still spread over lanes; the last block folds them into z[r][column ...].
// head[] holds a pointer for each vocabulary row of the tile (the ragged last tile repeats one) and of the next tile:
// what will be read after these Cols rows is prefetched line by line, since so few streams leave the memory idle.
template <int Rows, int Cols, class W>
EXEUNT_INLINE void accumulate(const W* const* head, int column, const float* x, int64_t x_stride, int64_t begin,
                              int64_t end, int64_t width, Vec (*acc)[kTile], float (*z)[kTile]) {
  Vec sum[Rows][Cols] = {};
  if (begin > 0)
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) sum[r][c] = acc[r][column + c];
  const auto step = [&](int64_t d, auto&& weights) {
    Vec xv[Rows][kVecs<W>];
    for (int r = 0; r < Rows; ++r)
      for (int k = 0; k < kVecs<W>; ++k) xv[r][k] = load(x + r * x_stride + d + k * kLanes);
    for (int c = 0; c < Cols; ++c) {
      Vec wv[kVecs<W>];
      weights(head[column + c] + d, wv);
      __builtin_prefetch(head[column + c + Cols] + d, 0, 2);
      for (int k = 0; k < kVecs<W>; ++k)
        for (int r = 0; r < Rows; ++r) sum[r][c] += wv[k] * xv[r][k];
    }
  };
  int64_t d = begin;
  for (; d + kStep<W> <= end; d += kStep<W>) step(d, [](const W* w, auto& wv) { load_weights(w, wv); });
  if (d < end) step(d, [&](const W* w, auto& wv) { load_weights_tail(w, end - d, wv); });
  for (int r = 0; r < Rows; ++r) {
    if (end < width) {
      for (int c = 0; c < Cols; ++c) acc[r][column + c] = sum[r][c];
      continue;
    }
    for (int c = 0; c < Cols; c += 4) {
      const Vec4 sums = sum4(sum[r][c], sum[r][c + 1], sum[r][c + 2], sum[r][c + 3]);
      __builtin_memcpy(z[r] + column + c, &sums, sizeof sums);
    }
  }
}

// z[r][c] = head[c] . x[r] for a tile. Wide rows go in blocks of D, so that those of x stay in L1 for all columns; the
// chain of multiply-adds of each pair is the same.
template <int Rows, class W>
EXEUNT_INLINE void dot(const W* const* head, const float* x, int64_t x_stride, int64_t width, float (*z)[kTile]) {
  constexpr int kCols = columns<Rows>();
  alignas(64) Vec acc[Rows][kTile];
  const int64_t depth = Rows == 1 ? width : kDepth;
  for (int64_t d = 0; d < width; d += depth)
    for (int c = 0; c < kTile; c += kCols)
      accumulate<Rows, kCols>(head, c, x, x_stride, d, d + depth < width ? d + depth : width, width, acc, z);
}

EXEUNT_INLINE void write_logits(const ExitStatsParams& p, int64_t row, int64_t vocab, int count, const float* raw) {
  const int64_t at = row * p.logits_stride + vocab;
  if (p.logits_dtype == DType::float32) {
    __builtin_memcpy(static_cast<float*>(p.logits_out) + at, raw, sizeof(float) * static_cast<unsigned>(count));
  } else {
    BFloat16* out = static_cast<BFloat16*>(p.logits_out) + at;
    for (int i = 0; i < count; ++i) out[i] = to_bfloat16(raw[i]);
  }
}

// One tile of the head against Rows hidden rows: products, then what the model does to a logit, then statistics.
template <int Rows, class W>
EXEUNT_INLINE void tile_rows(const ExitStatsChunkArgs& a, const W* const* head, int64_t vocab, int count,
                             const float* bias, int64_t first, LaneStats* stats) {
  const ExitStatsParams& p = *a.p;
  alignas(64) float z[Rows][kTile];
  dot<Rows>(head, a.x + first * a.x_stride, a.x_stride, p.width, z);
  const bool capped = p.softcap > 0.0f;
  const float gain_in = capped ? p.scale / p.softcap : p.scale / p.temperature;
  const float gain_out = p.softcap / p.temperature;
  for (int r = 0; r < Rows; ++r) {
    if (bias)
      for (int i = 0; i < kTile; ++i) z[r][i] += bias[i];
    if (p.logits_out) write_logits(p, a.out_rows[first + r], vocab, count, z[r]);
    for (int i = 0; i < kTile; i += kLanes) {
      Vec v = load(z[r] + i) * gain_in;
      if (capped) v = tanh(v) * gain_out;
      IVec ids;
      for (int l = 0; l < kLanes; ++l) ids[l] = i + l;
      if (count < kTile) v = ids < count ? v : splat(-kInf);
      push(stats[r], v, ids + static_cast<int32_t>(vocab));
    }
  }
}

template <class W>
void chunk(const ExitStatsChunkArgs& a) {
  const ExitStatsParams& p = *a.p;
  const W* weight = static_cast<const W*>(p.head);
  for (int64_t block = 0; block < a.rows; block += kRowBlock) {
    const int64_t rows = a.rows - block < kRowBlock ? a.rows - block : kRowBlock;
    alignas(64) LaneStats stats[kRowBlock];
    for (int64_t r = 0; r < rows; ++r) reset(stats[r]);

    for (int64_t vocab = a.begin; vocab < a.end; vocab += kTile) {
      const int count = static_cast<int>(a.end - vocab < kTile ? a.end - vocab : kTile);
      const W* head[2 * kTile];
      float bias[kTile];
      for (int i = 0; i < 2 * kTile; ++i) {
        const int64_t v = vocab + i < a.end ? vocab + i : a.end - 1;
        head[i] = weight + v * p.head_stride;
        if (i < kTile && p.head_bias.data)
          bias[i] = p.head_bias.dtype == DType::float32 ? static_cast<const float*>(p.head_bias.data)[v]
                                                        : to_float(static_cast<const BFloat16*>(p.head_bias.data)[v]);
      }
      const float* b = p.head_bias.data ? bias : nullptr;
      int64_t r = 0;
      for (; r + kMaxGroup <= rows; r += kMaxGroup)
        tile_rows<kMaxGroup>(a, head, vocab, count, b, block + r, stats + r);
      if (rows - r >= 2) tile_rows<2>(a, head, vocab, count, b, block + r, stats + r), r += 2;
      if (rows - r >= 1) tile_rows<1>(a, head, vocab, count, b, block + r, stats + r);
    }
    for (int64_t r = 0; r < rows; ++r) a.partials[(block + r) * a.partial_stride] = collect(stats[r]);
  }
}

}  // namespace

void exit_stats_chunk(const ExitStatsChunkArgs& args) {
  if (args.p->head_dtype == DType::float32)
    chunk<float>(args);
  else
    chunk<BFloat16>(args);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
