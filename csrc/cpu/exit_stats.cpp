// exit_stats on CPU: normalise the rows once, run the vocabulary chunks on the threads, merge each row's partials.
//
//   workspace: | x [M, D padded to 32] float | out_rows [M] int64 | partials [M, chunks] ExitStats |
//
// Chunks are fixed by V alone and merged in order, so the bits do not depend on the number of threads.
#include "cpu/exit_stats.h"

#include <algorithm>
#include <cmath>

#include "core/exit_stats.h"
#include "cpu/isa.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunk = 64;
constexpr double kSerialWork = 65536;  // multiply-adds below which a parallel region costs more than it saves

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int64_t chunk_size(int64_t vocab) { return std::max(kMinChunk, round_up((vocab + kMaxChunks - 1) / kMaxChunks, 16)); }

struct Layout {
  int64_t chunk, chunks, x_stride, x_bytes, rows_bytes, partial_bytes;
  Layout(int64_t rows, int64_t vocab, int64_t width)
      : chunk(chunk_size(vocab)),
        chunks((vocab + chunk - 1) / chunk),
        x_stride(round_up(width, 32)),
        x_bytes(rows * x_stride * static_cast<int64_t>(sizeof(float))),
        rows_bytes(round_up(rows * static_cast<int64_t>(sizeof(int64_t)), 64)),
        partial_bytes(rows * chunks * static_cast<int64_t>(sizeof(ExitStats))) {}
};

int64_t index_at(const void* list, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(list)[i] : static_cast<const int32_t*>(list)[i];
}

float value_at(const VectorArg& arg, int64_t i) {
  return arg.dtype == DType::float32 ? static_cast<const float*>(arg.data)[i]
                                     : to_float(static_cast<const BFloat16*>(arg.data)[i]);
}

// Where element d of a hidden row lies in x. float32 heads are read in order; a register of bfloat16 weights becomes
// its even elements, then its odd ones (vec.h), so x is dealt out in the same way.
int64_t lane_order(int64_t d, DType head, int64_t lanes) {
  if (head == DType::float32) return d;
  const int64_t block = d / (2 * lanes), within = d % (2 * lanes);
  return block * 2 * lanes + within % 2 * lanes + within / 2;
}

// Statistics of the norm in double: D is short beside V x D, and squares of large hidden values cannot overflow.
template <class T>
void normalise(const ExitStatsParams& p, const T* h, float* x, int64_t x_stride, int64_t lanes) {
  double mean = 0.0, power = 0.0;
  if (p.norm == Norm::layer) {
    for (int64_t d = 0; d < p.width; ++d) mean += to_float(h[d]);
    mean /= static_cast<double>(p.width);
  }
  if (p.norm != Norm::none) {
    for (int64_t d = 0; d < p.width; ++d) {
      const double centred = to_float(h[d]) - mean;
      power += centred * centred;
    }
  }
  const double rstd =
      p.norm == Norm::none ? 1.0 : 1.0 / std::sqrt(power / static_cast<double>(p.width) + static_cast<double>(p.eps));
  std::fill(x, x + x_stride, 0.0f);
  for (int64_t d = 0; d < p.width; ++d) {
    double value = to_float(h[d]);
    if (p.norm != Norm::none) value = (value - mean) * rstd;
    if (p.norm_weight.data) value *= value_at(p.norm_weight, d);
    if (p.norm_bias.data) value += value_at(p.norm_bias, d);
    x[lane_order(d, p.head_dtype, lanes)] = static_cast<float>(value);
  }
}

}  // namespace

int64_t exit_stats_workspace(int64_t rows, int64_t vocab, int64_t width) {
  const Layout layout(rows, vocab, width);
  return layout.x_bytes + layout.rows_bytes + layout.partial_bytes;
}

void exit_stats(const ExitStatsParams& p) {
  const Layout layout(p.rows, p.vocab, p.width);
  float* x = static_cast<float*>(p.workspace);
  int64_t* out_rows = reinterpret_cast<int64_t*>(reinterpret_cast<char*>(x) + layout.x_bytes);
  ExitStats* partials = reinterpret_cast<ExitStats*>(reinterpret_cast<char*>(out_rows) + layout.rows_bytes);
  const int64_t live = p.count ? std::clamp<int64_t>(index_at(p.count, p.count_64, 0), 0, p.rows) : p.rows;
  const Isa& isa = selected_isa();
  const double work = static_cast<double>(live) * static_cast<double>(p.vocab) * static_cast<double>(p.width);
  const int threads = work < kSerialWork ? 1 : std::max(1, p.threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < live; ++r) {
      out_rows[r] = p.row_list ? index_at(p.row_list, p.row_list_64, r) : r;
      const int64_t at = out_rows[r] * p.hidden_stride;
      if (p.hidden_dtype == DType::float32)
        normalise(p, static_cast<const float*>(p.hidden) + at, x + r * layout.x_stride, layout.x_stride, isa.lanes);
      else
        normalise(p, static_cast<const BFloat16*>(p.hidden) + at, x + r * layout.x_stride, layout.x_stride, isa.lanes);
    }
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < layout.chunks; ++c) {
      const int64_t begin = c * layout.chunk;
      isa.exit_stats_chunk({&p, x, layout.x_stride, out_rows, live, begin, std::min(begin + layout.chunk, p.vocab),
                            partials + c, layout.chunks});
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
