// exit_stats on CPU: normalise and pack the rows once, run the vocabulary chunks on the threads, merge each row's
// partials.
//
//   workspace: | packed rows | RowScale [M] | out_rows [M] int64 | partials [M, chunks] | per thread: panel, row |
//
// Chunks are fixed by V alone and merged in order, so the bits do not depend on the number of threads.
#include "cpu/exit_stats.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "core/exit_stats.h"
#include "cpu/isa.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunk = 256;
constexpr double kSerialWork = 65536;  // multiply-adds below which a parallel region costs more than it saves

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int64_t chunk_size(int64_t vocab) { return std::max(kMinChunk, round_up((vocab + kMaxChunks - 1) / kMaxChunks, 16)); }

// Where everything lies in the workspace, each part on a 64-byte boundary.
struct Layout {
  int64_t chunk, chunks, scale, out_rows, partials, panels, panel_bytes, row_bytes, total;
  Layout(DType head, int64_t rows, int64_t vocab, int64_t width, int32_t threads)
      : chunk(chunk_size(vocab)), chunks((vocab + chunk - 1) / chunk) {
    scale = round_up(selected_isa().rows_bytes(head, rows, width), 64);
    out_rows = scale + round_up(rows * static_cast<int64_t>(sizeof(RowScale)), 64);
    partials = out_rows + round_up(rows * static_cast<int64_t>(sizeof(int64_t)), 64);
    panels = partials + round_up(rows * chunks * static_cast<int64_t>(sizeof(ExitStats)), 64);
    panel_bytes = 16 * round_up(width * element_bytes(head), 64);
    row_bytes = round_up(width * static_cast<int64_t>(sizeof(float)), 64);
    total = panels + std::max(1, threads) * (panel_bytes + row_bytes);
  }
};

int64_t index_at(const void* list, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(list)[i] : static_cast<const int32_t*>(list)[i];
}

// Statistics of the norm in double: D is short beside V x D, and squares of large hidden values cannot overflow.
// The row leaves with the head's dtype, as the model's own norm would hand it to its head.
void normalise(const ExitStatsParams& p, int64_t row, float* x) {
  const int64_t at = row * p.hidden_stride;
  const auto hidden = [&](int64_t d) { return static_cast<double>(value_at(p.hidden, p.hidden_dtype, at + d)); };
  double mean = 0.0, power = 0.0;
  if (p.norm == Norm::layer) {
    for (int64_t d = 0; d < p.width; ++d) mean += hidden(d);
    mean /= static_cast<double>(p.width);
  }
  if (p.norm != Norm::none) {
    for (int64_t d = 0; d < p.width; ++d) power += (hidden(d) - mean) * (hidden(d) - mean);
  }
  const double rstd =
      p.norm == Norm::none ? 1.0 : 1.0 / std::sqrt(power / static_cast<double>(p.width) + static_cast<double>(p.eps));
  for (int64_t d = 0; d < p.width; ++d) {
    double value = hidden(d);
    if (p.norm != Norm::none) value = (value - mean) * rstd;
    if (p.norm_weight.data) value *= value_at(p.norm_weight.data, p.norm_weight.dtype, d);
    if (p.norm_bias.data) value += value_at(p.norm_bias.data, p.norm_bias.dtype, d);
    x[d] = rounded_to(p.head.dtype, static_cast<float>(value));
  }
}

}  // namespace

int64_t exit_stats_workspace(DType head, int64_t rows, int64_t vocab, int64_t width, int32_t threads) {
  return Layout(head, rows, vocab, width, threads).total;
}

void exit_stats(const ExitStatsParams& p) {
  const Layout layout(p.head.dtype, p.rows, p.vocab, p.width, p.threads);
  char* workspace = static_cast<char*>(p.workspace);
  const PackedRows x{workspace, reinterpret_cast<RowScale*>(workspace + layout.scale)};
  int64_t* out_rows = reinterpret_cast<int64_t*>(workspace + layout.out_rows);
  ExitStats* partials = reinterpret_cast<ExitStats*>(workspace + layout.partials);
  const int64_t live = p.count ? std::clamp<int64_t>(index_at(p.count, p.count_64, 0), 0, p.rows) : p.rows;
  const Isa& isa = selected_isa();
  const double work = static_cast<double>(live) * static_cast<double>(p.vocab) * static_cast<double>(p.width);
  const int threads = work < kSerialWork ? 1 : std::max(1, p.threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* panel = workspace + layout.panels + omp_get_thread_num() * (layout.panel_bytes + layout.row_bytes);
    float* row = reinterpret_cast<float*>(panel + layout.panel_bytes);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < live; ++r) {
      out_rows[r] = p.row_list ? index_at(p.row_list, p.row_list_64, r) : r;
      normalise(p, out_rows[r], row);
      isa.pack_row(p.head.dtype, row, p.width, r, x);
    }
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < layout.chunks; ++c) {
      const int64_t begin = c * layout.chunk;
      isa.exit_stats_chunk(
          {&p, x, out_rows, live, begin, std::min(begin + layout.chunk, p.vocab), panel, partials + c, layout.chunks});
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.rows; ++r) {
      ExitStats s = exit_stats_empty();
      if (r < live)
        for (int64_t c = 0; c < layout.chunks; ++c) s = exit_stats_merge(s, partials[r * layout.chunks + c]);
      s = exit_stats_finish(s);
      p.argmax[r] = s.argmax;
      p.top1[r] = s.top1;
      p.top2[r] = s.top2;
      p.sumexp[r] = s.sumexp;
      p.weighted[r] = s.weighted;
    }
  }
}

}  // namespace exeunt::cpu
