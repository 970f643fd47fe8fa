// The wrappers of csrc/cuda/ptx.cuh in C++, for cuda_emulation.h. test_ptx_layouts.py compares them with an interpreter
// of the PTX strings beside which they stand.
#pragma once
#include "core/dtype.h"
#include "cuda_runtime.h"

namespace exeunt::cuda::ptx {

inline char* dynamic_shared() { return reinterpret_cast<char*>(emu::block->shared); }

inline void barrier_sync(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32)
    emu::fail("bar.sync: the barrier is not one of 1..15, or threads are no whole warps");
  emu::barrier(id, threads, "bar.sync");
}

inline void check_shared(const char* op, const void* at) {
  const auto* p = static_cast<const unsigned char*>(at);
  if (reinterpret_cast<uintptr_t>(at) % 16) emu::fail(std::string(op) + ": a shared address is not 16-byte aligned");
  if (p < emu::block->shared || p + 16 > emu::block->shared + emu::block->shared_bytes)
    emu::fail(std::string(op) + ": outside dynamic shared memory");
}

inline void land(emu::Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

inline void cp_async_16(void* shared, const void* global, int bytes) {
  check_shared("cp.async", shared);
  if (reinterpret_cast<uintptr_t>(global) % 16) emu::fail("cp.async: a global address is not 16-byte aligned");
  if (bytes < 0 || bytes > 16) emu::fail("cp.async: the source size is not within 0..16");
  std::memset(shared, 0xFF, 16);  // from here on nobody may read it, and nobody may still be reading it
  emu::Copy copy{shared, global, static_cast<unsigned>(bytes), false};
  if (emu::coin()) land(copy);
  emu::Unseen unseen;
  emu::self->open.push_back(copy);
}

inline void cp_async_commit() {
  emu::Unseen unseen;
  emu::self->groups.push_back(std::move(emu::self->open));
  emu::self->open.clear();
}

template <int kPending>
inline void cp_async_wait() {
  auto& groups = emu::self->groups;
  while (groups.size() > kPending) {
    for (emu::Copy& copy : groups.front()) land(copy);
    emu::Unseen unseen;
    groups.erase(groups.begin());
  }
}

inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [&](int at) {
    const float x = to_float(BFloat16{static_cast<uint16_t>(a >> at)});
    const float y = to_float(BFloat16{static_cast<uint16_t>(b >> at)});
    return static_cast<uint32_t>(to_bfloat16(x * y).bits) << at;
  };
  return half(0) | half(16);
}

struct Words {
  uint32_t word[4];
};

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  Words mine, result;
  check_shared("ldmatrix", row);
  std::memcpy(mine.word, row, 16);
  emu::warp_op("ldmatrix.x4", ~0u, mine, result, [](const Words* const* in, Words* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) out[lane]->word[matrix] = in[8 * matrix + lane / 4]->word[lane % 4];
  });
  std::memcpy(r, result.word, 16);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  Words mine, result;
  check_shared("ldmatrix", row);
  std::memcpy(mine.word, row, 16);
  emu::warp_op("ldmatrix.x4.trans", ~0u, mine, result, [](const Words* const* in, Words* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int row_of_matrix) {
          uint16_t halves[8];
          std::memcpy(halves, in[8 * matrix + row_of_matrix]->word, 16);
          return static_cast<uint32_t>(halves[lane / 4]);
        };
        out[lane]->word[matrix] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
      }
  });
  std::memcpy(r, result.word, 16);
}

template <class T>
inline uint32_t pack(float low, float high) {
  const auto bits = [](float value) {
    if constexpr (std::is_same_v<T, BFloat16>)
      return static_cast<uint32_t>(to_bfloat16(value).bits);
    else
      return static_cast<uint32_t>(to_float16(value).bits);
  };
  return bits(low) | bits(high) << 16;
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct In {
    const uint32_t *a, *b;
    const float* d;
  } in{a, b, d};
  struct Out {
    float d[4];
  } result;
  emu::warp_op("mma.m16n8k16", ~0u, in, result, [](const In* const* lanes, Out* const* out) {
    const auto half = [](uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> (16 * i))}); };
    float A[16][16], B[8][16];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 2; ++i) {
        for (int q = 0; q < 4; ++q) A[g + 8 * (q & 1)][2 * t + i + 8 * (q >> 1)] = half(lanes[l]->a[q], i);
        for (int q = 0; q < 2; ++q) B[g][2 * t + i + 8 * q] = half(lanes[l]->b[q], i);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int q = 0; q < 4; ++q) {
        const int row = l / 4 + 8 * (q >> 1), column = 2 * (l % 4) + (q & 1);
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[column][k];
        out[l]->d[q] = lanes[l]->d[q] + sum;
      }
  });
  std::memcpy(d, result.d, 16);
}

}  // namespace exeunt::cuda::ptx
