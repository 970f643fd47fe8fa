// What exit_stats keeps of single logits beside its sums: the k largest of a row, and the winner of a draw.
// Both are merged over vocabulary chunks in order; among equals the one that came first stays.
#pragma once
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace exeunt {

struct Candidate {
  float value;
  int32_t id;  // -1: none
};

EXEUNT_HOST_DEVICE static inline Candidate candidate_none() {
  constexpr float none = -std::numeric_limits<float>::infinity();
  return {none, -1};
}

// Keeps `list` [k], largest first.
EXEUNT_HOST_DEVICE static inline void candidate_offer(Candidate* list, int k, Candidate c) {
  if (!(c.value > list[k - 1].value) || c.id < 0) return;
  int at = k - 1;
  for (; at > 0 && c.value > list[at - 1].value; --at) list[at] = list[at - 1];
  list[at] = c;
}

}  // namespace exeunt
