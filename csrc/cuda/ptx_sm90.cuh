// Inline PTX of Hopper (sm_90a) alone: barriers in shared memory, bulk copies of boxes of a tensor, products of a
// warpgroup. As in ptx.cuh, each string stands behind a function that says what it does.
#pragma once
#ifdef EXEUNT_CUDA_EMULATED
#include "ptx_sm90_emulated.h"
#else
#include <cuda.h>

#include "cuda/ptx.cuh"

namespace exeunt::cuda::ptx {

// A barrier counts, phase after phase, arrivals and bytes: a phase completes once `arrivals` have arrived and as many
// bytes have landed as were announced. One thread initialises, then makes that known to the copy engine by the fence.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}

// Announces bytes to the current phase, then arrives.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of that parity has completed, waiting for it for a while. The phase before a barrier's first counts
// as a completed one of parity 1.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t completed;
  asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
               : "=r"(completed)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return completed != 0;
}

// The box of `map` whose first element is (x, y), x along the rows, to shared memory, 1024-byte aligned; its bytes
// count towards the barrier's phase. What lies outside the tensor arrives as zeros, and counts too.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               :
               : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}

// Opens a group of products: what the warpgroup did to their registers before comes before them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Waits until all but the last kPending groups are done: their operands may then be overwritten, and results read.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// Gives registers of the calling warpgroup back, or takes some that others gave back: from here on it has kRegisters.
template <int kRegisters>
__device__ __forceinline__ void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// Keeps the compiler from moving what is done with d across this place.
template <int kRows>
__device__ __forceinline__ void hold(float (&d)[kRows / 8][4]) {
#pragma unroll
  for (auto& eight : d)
#pragma unroll
    for (float& value : eight) asm volatile("" : "+f"(value) : : "memory");
}

// d += a b of a warpgroup, with a 64 x 16 and b 16 x kRows in shared memory, d 64 x kRows in float32. Asynchronous: d
// and the operands are the tensor cores' until wgmma_wait() covers the group that wgmma_commit() closed over it. With
// warp w of the group, g = lane / 4 and t = lane % 4: d[j][q] is element (16 w + g + 8 (q >> 1), 8 j + 2 t + (q & 1)).
// a and b are described as rows of 16 elements along D (product_sm90.cuh: descriptor).
template <class T, int kRows>
__device__ void wgmma(float (&d)[kRows / 8][4], uint64_t a, uint64_t b);

#define EXEUNT_D8(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define EXEUNT_D16(j) EXEUNT_D8(j), EXEUNT_D8(j + 1)
#define EXEUNT_D32(j) EXEUNT_D16(j), EXEUNT_D16(j + 2)
#define EXEUNT_D64(j) EXEUNT_D32(j), EXEUNT_D32(j + 4)
#define EXEUNT_D128(j) EXEUNT_D64(j), EXEUNT_D64(j + 8)
#define EXEUNT_WGMMA(T, kind, rows, registers, descriptors, ...)                                                    \
  template <>                                                                                                       \
  __device__ __forceinline__ void wgmma<T, rows>(float (&d)[rows / 8][4], uint64_t a, uint64_t b) {                 \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32." kind \
                 "." kind " {" registers "}, " descriptors ", add, 1, 1, 0, 0; }"                                   \
                 : __VA_ARGS__                                                                                      \
                 : "l"(a), "l"(b)                                                                                   \
                 : "memory");                                                                                       \
  }
#define EXEUNT_WGMMA_KINDS(rows, registers, descriptors, ...)               \
  EXEUNT_WGMMA(BFloat16, "bf16", rows, registers, descriptors, __VA_ARGS__) \
  EXEUNT_WGMMA(Float16, "f16", rows, registers, descriptors, __VA_ARGS__)

// clang-format off
EXEUNT_WGMMA_KINDS(8,
    "%0, %1, %2, %3",
    "%4, %5", EXEUNT_D8(0))
EXEUNT_WGMMA_KINDS(16,
    "%0, %1, %2, %3, %4, %5, %6, %7",
    "%8, %9", EXEUNT_D16(0))
EXEUNT_WGMMA_KINDS(32,
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
    "%16, %17", EXEUNT_D32(0))
EXEUNT_WGMMA_KINDS(64,
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
    "%32, %33", EXEUNT_D64(0))
EXEUNT_WGMMA_KINDS(128,
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
    "%62, %63",
    "%64, %65", EXEUNT_D128(0))

// clang-format on

#undef EXEUNT_WGMMA_KINDS
#undef EXEUNT_WGMMA
#undef EXEUNT_D128
#undef EXEUNT_D64
#undef EXEUNT_D32
#undef EXEUNT_D16
#undef EXEUNT_D8

}  // namespace exeunt::cuda::ptx
#endif
