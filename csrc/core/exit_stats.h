// What one pass over the head leaves per row: a monoid, so that vocabulary chunks, shards and ranks can be joined.
//
//   top1, top2   the two largest logits            sumexp   = sum of e^(z - top1)
//   argmax       the lowest index that reaches top1  weighted = sum of (z - top1) e^(z - top1)
//
// Shifted by top1 nothing cancels: max_prob = 1 / sumexp, entropy = log(sumexp) - weighted / sumexp.
// A row that met NaN or +inf is *flagged*: argmax -1 and NaN everywhere; it absorbs whatever it is joined with.
// Functions are static: this header is compiled into objects of several ISAs, none of which may export them.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace exeunt {

struct ExitStats {
  int32_t argmax;
  float top1, top2, sumexp, weighted;
};

EXEUNT_HOST_DEVICE static inline ExitStats exit_stats_empty() {
  constexpr float none = -std::numeric_limits<float>::infinity();
  return {-1, none, none, 0.0f, 0.0f};
}

EXEUNT_HOST_DEVICE static inline ExitStats exit_stats_flagged() {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  return {-1, nan, nan, nan, nan};
}

// Of a single logit.
EXEUNT_HOST_DEVICE static inline ExitStats exit_stats_of(float z, int32_t id) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  if (!(z < inf)) return exit_stats_flagged();
  if (z == -inf) return exit_stats_empty();
  return {id, z, -inf, 1.0f, 0.0f};
}

EXEUNT_HOST_DEVICE static inline ExitStats exit_stats_merge(const ExitStats& a, const ExitStats& b) {
  if (a.top1 != a.top1 || b.top1 != b.top1) return exit_stats_flagged();
  if (b.argmax < 0) return a;  // empty: no finite logit seen
  if (a.argmax < 0) return b;
  const bool a_wins = a.top1 > b.top1 || (a.top1 == b.top1 && a.argmax < b.argmax);
  ExitStats hi = a, lo = b;  // values, not references: on a GPU they then stay in registers
  if (!a_wins) {
    hi = b;
    lo = a;
  }
  const float shift = lo.top1 - hi.top1;  // <= 0; -inf only when the difference overflows
  const float factor = std::exp(shift);
  ExitStats out = hi;
  out.top2 = hi.top2 > lo.top1 ? hi.top2 : lo.top1;
  if (factor > 0.0f) {
    out.sumexp += factor * lo.sumexp;
    out.weighted += factor * (lo.weighted + shift * lo.sumexp);
  }
  return out;
}

// What a finished row reports: one that saw no finite logit is as unusable as one that saw NaN.
EXEUNT_HOST_DEVICE static inline ExitStats exit_stats_finish(const ExitStats& s) {
  return s.argmax < 0 ? exit_stats_flagged() : s;
}

}  // namespace exeunt
