// Small heads on CPU: blocks of rows go through norm, pooler and head one after the other, while they are in cache.
// Statistics of few classes, and a plain threshold on them, are scalar work beside that.
//
//   workspace per thread: | row as doubles, as floats | packed rows, RowScale | pooled rows | panel |
#include "cpu/small_head.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kRows = 16;            // rows of a block
constexpr double kSerialWork = 1 << 20;  // multiply-adds below which a parallel region costs more than it saves

struct Layout {
  int64_t row, packed, scale, pooled, panel, total;
  Layout(DType weight, int64_t width, int64_t pooler) {
    const int64_t widest = std::max(width, pooler);
    row = round_up(widest * 8, 64);
    packed = row + round_up(widest * 4, 64);
    scale = packed + round_up(selected_isa().rows_bytes(weight, kRows, widest), 64);
    pooled = scale + round_up(kRows * static_cast<int64_t>(sizeof(RowScale)), 64);
    panel = pooled + round_up(kRows * pooler * 4, 64);
    total = panel + 16 * round_up(widest * element_bytes(weight), 64) + 64;
  }
};

// mean[0..width) of the tokens of a row that count; the order of the sum does not see the others.
void mean_of_tokens(const SmallHeadParams& p, int64_t row, double* sum, float* mean) {
  const uint8_t* counts = p.mask ? p.mask + row * p.mask_stride : nullptr;
  std::fill(sum, sum + p.width, 0.0);
  int64_t n = 0;
  typed(p.hidden, p.hidden_dtype, [&](auto* h) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (counts && !counts[t]) continue;
      ++n;
      auto* token = h + row * p.hidden_stride + t * p.token_stride;
      for (int64_t d = 0; d < p.width; ++d) sum[d] += to_float(token[d]);
    }
  });
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(n, 1));
  for (int64_t d = 0; d < p.width; ++d) mean[d] = static_cast<float>(sum[d] * share);
}

ExitStats stats_of(const float* logits, int64_t classes) {
  ExitStats s = exit_stats_empty();
  for (int64_t c = 0; c < classes; ++c) s = exit_stats_merge(s, exit_stats_of(logits[c], static_cast<int32_t>(c)));
  return exit_stats_finish(s);
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

// 1: leave, 0: stay, -1: float32 arithmetic in another order might say something else.
int decide(double score, const SmallHeadParams& p) {
  if (!std::isfinite(score)) return 0;
  if (std::abs(score - p.threshold) <= 1e-5 * (1.0 + std::abs(score))) return -1;
  return score > p.threshold;
}

}  // namespace

int64_t small_head_workspace(DType weight, int64_t width, int64_t pooler, int threads) {
  return std::max(1, threads) * Layout(weight, width, pooler).total;
}

int64_t small_head(const SmallHeadParams& p) {
  const LayerArg& first = p.pooled ? p.pooler : p.head;
  const Layout layout(p.head.weight.dtype, p.width, p.pooled ? p.pooler.outputs : 0);
  const Isa& isa = selected_isa();
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  const double work =
      static_cast<double>(p.rows) * static_cast<double>(first.outputs + p.tokens - 1) * static_cast<double>(p.width);
  const int threads = work < kSerialWork ? 1 : std::max(1, p.threads);

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    char* base = static_cast<char*>(p.workspace) + omp_get_thread_num() * layout.total;
    double* wide = reinterpret_cast<double*>(base);
    float* row = reinterpret_cast<float*>(base + layout.row);
    float* pooled = reinterpret_cast<float*>(base + layout.pooled);
    const PackedRows x{base + layout.packed, reinterpret_cast<RowScale*>(base + layout.scale)};
    const int64_t begin = block * kRows, rows = std::min(kRows, p.rows - begin);
    for (int64_t r = 0; r < rows; ++r) {
      if (p.tokens > 1 || p.mask) {
        mean_of_tokens(p, begin + r, wide, row);
        normalise(row, DType::float32, 0, p.width, p.norm, first.weight.dtype, row, wide);
      } else {
        normalise(p.hidden, p.hidden_dtype, (begin + r) * p.hidden_stride, p.width, p.norm, first.weight.dtype, row,
                  wide);
      }
      isa.pack_row(first.weight.dtype, row, p.width, r, x);
    }
    if (p.pooled) {
      isa.linear_rows({&p.pooler, x, rows, base + layout.panel, pooled});
      for (int64_t r = 0; r < rows; ++r) {
        float* values = pooled + r * p.pooler.outputs;
        for (int64_t d = 0; d < p.pooler.outputs; ++d) values[d] = rounded_to(p.head.weight.dtype, values[d]);
        isa.pack_row(p.head.weight.dtype, values, p.pooler.outputs, r, x);
      }
    }
    isa.linear_rows({&p.head, x, rows, base + layout.panel, p.out + begin * p.head.outputs});
  }

  int64_t gone = 0;
  for (int64_t n = 0; n < p.rows && (p.argmax || p.measure != Measure::none); ++n) {
    const ExitStats s = stats_of(p.out + n * p.head.outputs, p.head.outputs);
    if (p.argmax) {
      p.argmax[n] = s.argmax;
      p.top1[n] = s.top1;
      p.top2[n] = s.top2;
      p.sumexp[n] = s.sumexp;
      p.weighted[n] = s.weighted;
    }
    if (p.measure != Measure::none && gone >= 0) {
      const int leaves = decide(score_of(s, p.measure, p.head.outputs), p);
      p.leave[n] = leaves == 1;
      gone = leaves < 0 ? -1 : gone + leaves;
    }
  }
  return gone;
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
