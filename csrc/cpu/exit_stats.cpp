// exit_stats on CPU: normalise and pack the rows once, run the vocabulary chunks on the threads, merge each row's
// partials.
//
//   workspace: | rows, packed or plain | their scales [M] | out_rows [M] int64 | partials, topk, drawn [M, chunks] |
//              | per thread: panel, one row |
//
// Chunks are fixed by V alone and merged in order, so the bits do not depend on the number of threads.
#include "cpu/exit_stats.h"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "core/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "cpu/runs.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunk = 256;
constexpr int kSideBySide = 16;          // packed rows that may lie in the same lines: one thread writes them
constexpr int64_t kShare = 64;           // rows that a call of the product takes at most
constexpr double kSerialWork = 1 << 18;  // multiply-adds below which a parallel region costs more than it saves
constexpr int64_t kNorm = 16;            // multiply-adds that the norm of an element is worth

// Whole groups of tiles (product.h).
int64_t chunk_size(int64_t vocab) { return std::max(kMinChunk, round_up((vocab + kMaxChunks - 1) / kMaxChunks, 64)); }

// Whether a head as it lies has too few rows for a tile: its products are taken one by one, of rows that nobody packs.
bool one_by_one(WeightForm form, int64_t vocab) { return vocab < 16 && form == WeightForm::lies; }

// Where everything lies in the workspace, each part on a 64-byte boundary.
struct Layout {
  int64_t chunk, chunks, scale, out_rows, partials, topk, drawn, panels, panel_size, row_bytes, total;
  Layout(DType head, WeightForm form, int64_t rows, int64_t vocab, int64_t width, int32_t k, bool draws,
         int32_t threads)
      : chunk(chunk_size(vocab)), chunks((vocab + chunk - 1) / chunk) {
    const int64_t plain = one_by_one(form, vocab) ? rows * width * static_cast<int64_t>(sizeof(float)) : 0;
    scale = round_up(std::max(selected_isa().rows_bytes(head, form, rows, width), plain), 64);
    out_rows = scale + round_up(rows * static_cast<int64_t>(sizeof(float)), 64);
    partials = out_rows + round_up(rows * static_cast<int64_t>(sizeof(int64_t)), 64);
    topk = partials + round_up(rows * chunks * static_cast<int64_t>(sizeof(ExitStats)), 64);
    drawn = topk + round_up(rows * chunks * k * static_cast<int64_t>(sizeof(Candidate)), 64);
    panels = drawn + round_up(rows * chunks * draws * static_cast<int64_t>(sizeof(Candidate)), 64);
    panel_size = panel_bytes(head, width);
    row_bytes = round_up(width * static_cast<int64_t>(sizeof(float)), 64);
    total = panels + std::max(1, threads) * (panel_size + row_bytes);
  }
};

int64_t index_at(const void* list, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(list)[i] : static_cast<const int32_t*>(list)[i];
}

// Write what row r reports: its statistics, and what its chunks' candidates come to. A flagged row has no candidates.
void finish(const ExitStatsParams& p, int64_t r, const ExitStats& s, const Candidate* topk, const Candidate* drawn,
            int64_t chunks) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const bool flagged = s.argmax < 0;
  const auto id = [&](int64_t at) { return at < 0 ? -1 : p.columns ? p.columns[at] : at; };
  p.argmax[r] = id(s.argmax);
  p.top1[r] = s.top1;
  p.top2[r] = s.top2;
  p.sumexp[r] = s.sumexp;
  p.weighted[r] = p.entropy ? s.weighted : nan;
  if (p.target && flagged) p.target_out[r] = nan;
  if (p.topk) {
    Candidate best[8];
    std::fill(best, best + p.topk, candidate_none());
    for (int64_t i = 0; i < chunks * p.topk; ++i) candidate_offer(best, p.topk, topk[i]);
    for (int i = 0; i < p.topk; ++i) {
      p.topk_logits[r * p.topk + i] = flagged ? nan : best[i].value;
      p.topk_ids[r * p.topk + i] = flagged ? -1 : id(best[i].id);
    }
  }
  if (p.seeds) {
    Candidate best = candidate_none();
    for (int64_t c = 0; c < chunks; ++c) candidate_offer(&best, 1, drawn[c]);
    p.sample[r] = flagged ? -1 : id(best.id);
  }
}

}  // namespace

int64_t exit_stats_workspace(DType head, WeightForm form, int64_t rows, int64_t vocab, int64_t width, int32_t topk,
                             bool draws, int32_t threads) {
  return Layout(head, form, rows, vocab, width, topk, draws, threads).total;
}

void exit_stats(const ExitStatsParams& p) {
  const Layout layout(p.head.dtype, p.head.form, p.rows, p.vocab, p.width, p.topk, p.seeds, p.threads);
  char* workspace = static_cast<char*>(p.workspace);
  int64_t* out_rows = reinterpret_cast<int64_t*>(workspace + layout.out_rows);
  ExitStats* partials = reinterpret_cast<ExitStats*>(workspace + layout.partials);
  Candidate* topk = reinterpret_cast<Candidate*>(workspace + layout.topk);
  Candidate* drawn = reinterpret_cast<Candidate*>(workspace + layout.drawn);
  const int64_t live = p.count ? std::clamp<int64_t>(index_at(p.count, p.count_64, 0), 0, p.rows) : p.rows;
  const PackedRows x{workspace, reinterpret_cast<float*>(workspace + layout.scale), live};
  // Named columns have the bits that they have beside all others.
  float* plain = one_by_one(p.head.form, p.vocab) && !p.columns ? reinterpret_cast<float*>(workspace) : nullptr;
  const Isa& isa = selected_isa();
  // Few words leave most of the work to the norm.
  const double work = static_cast<double>(live * p.width) * static_cast<double>(plain ? p.vocab + kNorm : p.vocab);
  const int threads = work < kSerialWork ? 1 : std::max(1, p.threads);

  const auto panel_of = [&](int thread) {
    return workspace + layout.panels + thread * (layout.panel_size + layout.row_bytes);
  };
  const auto pack = [&](int64_t r, int thread) {
    out_rows[r] = p.row_list ? index_at(p.row_list, p.row_list_64, r) : r;
    float* row = plain ? plain + r * p.width : reinterpret_cast<float*>(panel_of(thread) + layout.panel_size);
    isa.normalise(p.hidden, p.hidden_dtype, out_rows[r] * p.hidden_stride, p.width, p.norm, p.head.dtype, row);
    if (!plain) isa.pack_row(p.head.dtype, p.head.form, row, p.width, r, x);
  };
  // `count` chunks from the c-th for rows [first, end).
  const auto run_chunks = [&](int64_t c, int64_t count, int64_t first, int64_t end, int thread) {
    const int64_t begin = c * layout.chunk;
    isa.exit_stats_chunks({&p, x, plain, out_rows, begin, std::min(begin + count * layout.chunk, p.vocab), layout.chunk,
                           first, end, panel_of(thread), partials + c, topk + c * p.topk, drawn + c, layout.chunks});
  };
  const auto merge = [&](int64_t r) {
    const int64_t at = r * layout.chunks, chunks = r < live ? layout.chunks : 0;
    ExitStats s = exit_stats_empty();
    for (int64_t c = 0; c < chunks; ++c) s = exit_stats_merge(s, partials[at + c]);
    finish(p, r, exit_stats_finish(s), topk + at * p.topk, drawn + at, chunks);
  };
  // All that becomes of rows [first, end).
  const auto check = [&](int64_t first, int64_t end, int thread) {
    const int64_t last = std::min(end, live);
    for (int64_t r = first; r < last; ++r) pack(r, thread);
    if (first < last) run_chunks(0, layout.chunks, first, last, thread);
    for (int64_t r = first; r < end; ++r) merge(r);
  };
  if (threads == 1) return check(0, p.rows, 0);  // a team of one takes time as well
  if (plain) {  // a row stays in one thread's cache: reading it from another's takes longer than all else
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t first = 0; first < p.rows; first += kSideBySide)
      check(first, std::min(first + kSideBySide, p.rows), omp_get_thread_num());
    return;
  }
  // A chunk meets all rows while it is in a cache; where there are few chunks, some rows each time, so that all threads
  // have work.
  const int64_t share = layout.chunks < threads ? kShare : std::max<int64_t>(live, 1);
  const int64_t shares = (live + share - 1) / share;
  Runs runs(layout.chunks * shares, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(static, kSideBySide)
    for (int64_t r = 0; r < live; ++r) pack(r, thread);
    for (int64_t i, end; runs.next(i, end);)
      for (int64_t next; i < end; i = next) {
        next = shares > 1 ? i + 1 : end;
        const int64_t first = i % shares * share;
        run_chunks(i / shares, next - i, first, std::min(first + share, live), thread);
      }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.rows; ++r) merge(r);
  }
}

}  // namespace exeunt::cpu
