// Small heads on CPU: blocks of rows go through mean or norm, pooler, head, statistics and a plain threshold one after
// the other, while they are in cache. Blocks are what threads share out: a tagger judges thousands of rows. Where there
// is one block, they share the outputs of a large layer instead: reading a pooler takes one thread longer than all
// else.
//
//   workspace per thread: | rows as floats | pooled rows |
#include "cpu/small_head.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kRows = 16;              // rows of a block at most
constexpr double kSerialWork = 1 << 20;    // multiply-adds below which a parallel region costs more than it saves
constexpr int64_t kSerialLayer = 1 << 17;  // elements of a layer's weight, likewise where one block of rows reads it

struct Layout {
  int64_t pooled, total;
  Layout(int64_t width, int64_t pooler, int64_t all_rows) {
    const int64_t rows = std::min(kRows, all_rows);
    pooled = round_up(rows * width * 4, 64);
    total = pooled + round_up(rows * pooler * 4, 64);
  }
};

// No more than there are blocks.
int threads_for(int64_t rows, int threads) {
  return static_cast<int>(std::clamp<int64_t>((rows + kRows - 1) / kRows, 1, std::max(1, threads)));
}

// out[rows, outputs] of a layer for one block of rows.
void linear(const LayerArg& layer, const float* x, int64_t x_stride, int64_t rows, float* out, int threads) {
  const int64_t shares = (layer.outputs + 15) / 16;  // whole lines of `out`
  const int64_t parts = layer.outputs * layer.inputs >= kSerialLayer ? std::min<int64_t>(threads, shares) : 1;
  const auto run = [&](int64_t part) {
    const int64_t end = std::min(shares * (part + 1) / parts * 16, layer.outputs);
    selected_isa().linear_rows({&layer, x, x_stride, rows, out, shares * part / parts * 16, end});
  };
  if (parts == 1) return run(0);  // a team of one takes time as well
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) run(part);
}

// mean[0..width) of the tokens of a row that count; the order of the sum does not see the others. The sums of a strip
// of the width stay in registers.
void mean_of_tokens(const SmallHeadParams& p, int64_t row, float* mean) {
  constexpr int64_t kStrip = 16;
  const uint8_t* counts = p.mask ? p.mask + row * p.mask_stride : nullptr;
  int64_t n = counts ? 0 : p.tokens;
  for (int64_t t = 0; counts && t < p.tokens; ++t) n += counts[t] != 0;
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(n, 1));
  typed(p.hidden, p.hidden_dtype, [&](auto* h) {
    h += row * p.hidden_stride;
    const auto strip = [&](int64_t begin, auto width) {
      double sum[kStrip] = {};
      for (int64_t t = 0; t < p.tokens; ++t) {
        if (counts && !counts[t]) continue;
        const auto* token = h + t * p.token_stride + begin;
        for (int64_t d = 0; d < width; ++d) sum[d] += to_float(token[d]);
      }
      for (int64_t d = 0; d < width; ++d) mean[begin + d] = static_cast<float>(sum[d] * share);
    };
    int64_t d = 0;
    for (; d + kStrip <= p.width; d += kStrip) strip(d, std::integral_constant<int64_t, kStrip>());
    if (d < p.width) strip(d, p.width - d);
  });
}

// As exit_stats_merge over single logits, with one exponential each: the largest is known before anything is summed.
ExitStats stats_of(const float* logits, int64_t classes) {
  ExitStats s = exit_stats_empty();
  for (int64_t c = 0; c < classes; ++c) {
    const float z = logits[c];
    if (!(z < std::numeric_limits<float>::infinity())) return exit_stats_flagged();
    if (z > s.top1) {
      s.top2 = s.top1;
      s.top1 = z;
      s.argmax = static_cast<int32_t>(c);
    } else if (z > s.top2) {
      s.top2 = z;
    }
  }
  if (s.argmax < 0) return exit_stats_flagged();
  for (int64_t c = 0; c < classes; ++c) {
    const float below = logits[c] - s.top1, e = std::exp(below);
    s.sumexp += e;
    if (e > 0.0f) s.weighted += below * e;
  }
  return s;
}

double score_of(const ExitStats& s, Measure measure, int64_t classes) {
  const double sumexp = s.sumexp, entropy = std::max(std::log(sumexp) - s.weighted / sumexp, 0.0);
  if (s.argmax < 0) return std::numeric_limits<double>::quiet_NaN();
  switch (measure) {
    case Measure::max_prob:
      return 1.0 / sumexp;
    case Measure::margin:
      return -std::expm1(static_cast<double>(s.top2) - s.top1) / sumexp;
    case Measure::logit_margin:
      return static_cast<double>(s.top1) - s.top2;
    case Measure::neg_entropy:
      return -entropy;
    case Measure::neg_normalized_entropy:
      return -entropy / std::log(static_cast<double>(classes));
    case Measure::none:
      break;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

// Sum of f(d) over [0, width) in eight interleaved parts, so that additions overlap; always in the same order.
template <class F>
double sum_of(int64_t width, F f) {
  double part[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    for (int i = 0; i < 8; ++i) part[i] += f(d + i);
  for (int i = 0; d < width; ++d, ++i) part[i] += f(d);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// How many rows leave, and of how many float32 arithmetic in another order might say something else.
struct Verdict {
  int64_t gone = 0, unsure = 0;
};

// Statistics and verdict of rows [begin, begin + rows), whose logits are there.
Verdict judge(const SmallHeadParams& p, int64_t begin, int64_t rows) {
  Verdict v;
  for (int64_t n = begin; n < begin + rows && (p.argmax || p.measure != Measure::none); ++n) {
    const ExitStats s = stats_of(p.out + n * p.head.outputs, p.head.outputs);
    if (p.argmax) {
      p.argmax[n] = s.argmax;
      p.top1[n] = s.top1;
      p.top2[n] = s.top2;
      p.sumexp[n] = s.sumexp;
      p.weighted[n] = s.weighted;
    }
    if (p.measure == Measure::none) continue;
    const double score = score_of(s, p.measure, p.head.outputs);
    const bool leaves = std::isfinite(score) && score > p.threshold;
    p.leave[n] = leaves;
    v.gone += leaves;
    v.unsure += std::isfinite(score) && std::abs(score - p.threshold) <= 1e-5 * (1.0 + std::abs(score));
  }
  return v;
}

// A block of rows, from mean or norm to verdict, in memory of its own. Its layers are read by `threads`.
Verdict of_block(const SmallHeadParams& p, const Layout& layout, int64_t block, char* base, int threads) {
  const Isa& isa = selected_isa();
  const LayerArg& first = p.pooled ? p.pooler : p.head;
  // What already is what the product reads is not widened and rounded.
  const bool mean = p.tokens != 1 || p.mask;
  const bool as_it_is = !mean && p.norm.kind == Norm::none && !p.norm.weight.data && !p.norm.bias.data &&
                        p.hidden_dtype == DType::float32 && first.weight.dtype == DType::float32;
  float* own = reinterpret_cast<float*>(base);
  const float* ready = as_it_is ? static_cast<const float*>(p.hidden) + block * kRows * p.hidden_stride : own;
  int64_t ready_stride = as_it_is ? p.hidden_stride : p.width;
  float* pooled = reinterpret_cast<float*>(base + layout.pooled);
  const int64_t begin = block * kRows, rows = std::min(kRows, p.rows - begin);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = own + r * p.width;
    const int64_t at = (begin + r) * p.hidden_stride;
    if (mean) {
      mean_of_tokens(p, begin + r, row);
      if (first.weight.dtype != DType::float32)
        for (int64_t d = 0; d < p.width; ++d) row[d] = rounded_to(first.weight.dtype, row[d]);
    } else if (!as_it_is) {
      isa.normalise(p.hidden, p.hidden_dtype, at, p.width, p.norm, first.weight.dtype, row);
    }
  }
  if (p.pooled) {
    linear(p.pooler, ready, ready_stride, rows, pooled, threads);
    for (int64_t i = 0; i < rows * p.pooler.outputs; ++i) pooled[i] = rounded_to(p.head.weight.dtype, pooled[i]);
    ready = pooled;
    ready_stride = p.pooler.outputs;
  }
  linear(p.head, ready, ready_stride, rows, p.out + begin * p.head.outputs, threads);
  return judge(p, begin, rows);
}

}  // namespace

int64_t small_head_workspace(int64_t width, int64_t pooler, int64_t rows, int threads) {
  return threads_for(rows, threads) * Layout(width, pooler, rows).total;
}

int64_t small_head(const SmallHeadParams& p) {
  const LayerArg& first = p.pooled ? p.pooler : p.head;
  const Layout layout(p.width, p.pooled ? p.pooler.outputs : 0, p.rows);
  char* workspace = static_cast<char*>(p.workspace);
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks == 1) {  // outside of any parallel region: within one, threads would be made anew for the layer's
    const Verdict v = of_block(p, layout, 0, workspace, std::max(1, p.threads));
    return v.unsure ? -1 : v.gone;
  }
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(first.outputs + p.tokens - 1) * static_cast<double>(p.width);
  const int threads = work < kSerialWork ? 1 : threads_for(p.rows, p.threads);
  int64_t gone = 0, unsure = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(+ : gone, unsure)
  for (int64_t block = 0; block < blocks; ++block) {
    const Verdict v = of_block(p, layout, block, workspace + omp_get_thread_num() * layout.total, 1);
    gone += v.gone;
    unsure += v.unsure;
  }
  return unsure ? -1 : gone;
}

void saturation(const SaturationParams& p) {
  for (int64_t r = 0; r < p.rows; ++r)
    typed(p.a, p.a_dtype, [&](auto* a) {
      typed(p.b, p.b_dtype, [&](auto* b) {
        a += r * p.a_stride;
        b += r * p.b_stride;
        const auto dot = [&](auto* u, auto* v) {
          return sum_of(p.width, [&](int64_t d) { return static_cast<double>(to_float(u[d])) * to_float(v[d]); });
        };
        const double norms = std::sqrt(dot(a, a)) * std::sqrt(dot(b, b));
        const double cosine = dot(a, b) / std::max(norms, 1e-300);  // 0 where a row is 0
        p.out[r] = static_cast<float>(cosine != cosine ? cosine : std::clamp(cosine, -1.0, 1.0));
      });
    });
}

}  // namespace exeunt::cpu
