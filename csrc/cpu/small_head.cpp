// Small heads on CPU: blocks of rows go through norm, pooler and head one after the other, while they are in cache.
//
//   workspace per thread: | row as doubles, as floats | packed rows, RowScale | pooled rows | panel |
#include "cpu/small_head.h"

#include <omp.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kRows = 16;            // rows of a block
constexpr double kSerialWork = 1 << 20;  // multiply-adds below which a parallel region costs more than it saves

struct Layout {
  int64_t row, packed, scale, pooled, panel, total;
  explicit Layout(const SmallHeadParams& p) {
    const Isa& isa = selected_isa();
    const int64_t inner = p.pooled ? p.pooler.outputs : 0, widest = std::max(p.width, inner);
    const auto packed_bytes = [&](const LayerArg& layer) {
      return isa.rows_bytes(layer.weight.dtype, kRows, layer.inputs);
    };
    const auto panel_bytes = [](const LayerArg& layer) {
      return 16 * round_up(layer.inputs * element_bytes(layer.weight.dtype), 64) + 64;
    };
    row = round_up(widest * 8, 64);
    packed = row + round_up(widest * 4, 64);
    scale = packed + round_up(std::max(packed_bytes(p.head), p.pooled ? packed_bytes(p.pooler) : 0), 64);
    pooled = scale + round_up(kRows * static_cast<int64_t>(sizeof(RowScale)), 64);
    panel = pooled + round_up(kRows * inner * 4, 64);
    total = panel + round_up(std::max(panel_bytes(p.head), p.pooled ? panel_bytes(p.pooler) : 0), 64);
  }
};

}  // namespace

int64_t small_head_workspace(const SmallHeadParams& p) { return std::max(1, p.threads) * Layout(p).total; }

void small_head(const SmallHeadParams& p) {
  const Layout layout(p);
  const Isa& isa = selected_isa();
  const LayerArg& first = p.pooled ? p.pooler : p.head;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  const double work = static_cast<double>(p.rows) * static_cast<double>(first.outputs) * static_cast<double>(p.width);
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
      normalise(p.hidden, p.hidden_dtype, (begin + r) * p.hidden_stride, p.width, p.norm, first.weight.dtype, row,
                wide);
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
