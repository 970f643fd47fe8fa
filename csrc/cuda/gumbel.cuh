// Gumbel noise for sampling in the pass over the head, the same as csrc/cpu/gumbel.h makes: the first word of
// Philox4x32-10 (Salmon et al., 2011) with the row's seed as key and the vocabulary id as counter.
#pragma once
#include <cmath>
#include <cstdint>

#include "cuda/ptx.cuh"

namespace exeunt::cuda {

__device__ __forceinline__ uint32_t philox(uint32_t counter, uint64_t seed) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

// -log(E) with E = -log(1 - u) exponential and u = (word + 1/2) / 2^32; -inf, which never wins, where u rounds to 1.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return -logf(-log1pf(-u));
}

}  // namespace exeunt::cuda
