// Gumbel noise for sampling in the pass over the head: argmax(z + noise) is a draw from softmax(z).
//
// The noise of a (row, vocabulary id) comes from a counter-based generator keyed by the row's seed, with the id as its
// counter (Philox4x32-10, first word; Salmon et al., 2011), so a draw depends neither on the batch nor on the order.
#pragma once
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {

using Wide = uint64_t __attribute__((vector_size(kLanes * 8)));

EXEUNT_INLINE UVec philox(UVec counter, uint64_t seed) {
  UVec c0 = counter, c1 = UVec{}, c2 = UVec{}, c3 = UVec{};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = __builtin_convertvector(c0, Wide) * 0xD2511F53u,
               p1 = __builtin_convertvector(c2, Wide) * 0xCD9E8D57u;
    c0 = __builtin_convertvector(p1 >> 32, UVec) ^ c1 ^ key0;
    c2 = __builtin_convertvector(p0 >> 32, UVec) ^ c3 ^ key1;
    c1 = __builtin_convertvector(p1, UVec);
    c3 = __builtin_convertvector(p0, UVec);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

// -log(E) with E = -log(1 - u) exponential and u = (word + 1/2) / 2^32. Small u, which make the large noise that wins,
// keep their full precision: log(1 - u) is taken as log1p.
EXEUNT_INLINE Vec gumbel(UVec word) {
  const Vec u = (__builtin_convertvector(word, Vec) + 0.5f) * 0x1p-32f;
  const Vec rest = 1.0f - u;
  // u = 1 by rounding: as unlikely as it is hopeless; any large E will do.
  const Vec safe = rest > 0.0f ? rest : splat(0x1p-33f);
  const Vec exponential = rest == 1.0f ? u : log(safe) * u / (safe - 1.0f);
  return -log(exponential);
}

}  // namespace exeunt::cpu::EXEUNT_ISA
