// Every inline PTX string of exeunt, beside those of Hopper alone (ptx_sm90.cuh), each behind a function that says what
// it does. What lies in which lane is written down in the PTX manual's figures for the instruction named;
// tests/cuda_on_cpu holds each string to that.
#pragma once
#ifdef EXEUNT_CUDA_EMULATED
#include "ptx_emulated.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace exeunt::cuda::ptx {

// The block's dynamic shared memory, 1024-byte aligned.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char exeunt_shared[];
  return exeunt_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// __syncthreads() of `threads` threads, which must be whole warps, at the block's barrier `id` (1..15).
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// Copies `bytes` (0..16) from global to shared memory, past L1, and zeros up to 16; both addresses are 16-byte aligned.
// Asynchronous: it has happened once cp_async_wait() covers the group that cp_async_commit() closed over it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all but this thread's last kPending groups have landed. Others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Products of two pairs of bfloat16, rounded; subnormal numbers count.
__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm volatile("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// Four 8x8 matrices of 16-bit elements: lane 8 m + i brings the address of row i of matrix m; lane 4 i + c receives
// elements 2 c, 2 c + 1 of row i of matrix m in r[m].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix turned over: lane 4 i + c receives elements 2 c, 2 c + 1 of column i of matrix m in r[m].
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two numbers rounded to T, the first in the low half.
template <class T>
__device__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t pair;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d += a b, with a 16 x 16, b 16 x 8, d 16 x 8 in float32. With g = lane / 4 and t = lane % 4:
//   a[q]  elements (g + 8 (q & 1), 2 t + 8 (q >> 1) + {0, 1})
//   b[q]  elements (2 t + 8 q + {0, 1}, g)
//   d[q]  element (g + 8 (q >> 1), 2 t + (q & 1))
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace exeunt::cuda::ptx
#endif
