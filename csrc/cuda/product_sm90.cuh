// The streaming product on Hopper: the same tiles and the same order of sums as product.cuh, other hands.
//
//   producer warp    one lane: waits until a stage is empty, announces its bytes, has the copy engine (TMA) fetch
//                    128 bytes of D of the tile's 128 weight rows and of the block's hidden rows into it
//   4 consumer       wait until the stage is full; four wgmma steps of 16 elements on each half of the tile; release
//   warps a tile     the stage before, whose products are then done; after the last step the epilogue
//
//             full[s]: 1 arrival + bytes            empty[s]: 1 arrival a consumer warp
//   producer  ---- wait empty[0], copy 0 ---- wait empty[1], copy 1 ---- ...           runs ahead over tile boundaries
//   consumers      wait full[0], multiply 0 ---- wait full[1], multiply 1, release 0 ---- ...
//
//   rows of the block   8, 16, 32, 64: one tile, two thread blocks to a multiprocessor       memory is the limit
//                       128: two tiles side by side, of successive chunks, share the hidden rows; one thread block,
//                       whose producers are a whole warpgroup, because only such a one can hand registers over
//
// The copy engine lays a row's eight 16-byte chunks out exchanged (128-byte swizzle): chunk_at() of product.cuh, which
// is also how wgmma reads them. Both halves of a tile interleave in eights of rows, so that a warp holds 32 successive
// weight rows, as with mma.sync: acc[i][j][q] = weight row 32 warp + 16 (q >> 1) + 8 i + g times hidden row
// 8 j + 2 t + (q & 1). All numbers of rows go through wgmma: a row's bits do not depend on its batch.
//
// Hazards: full[s] completes once all announced bytes have landed, so nobody reads a stage early. A consumer releases a
// stage when its own products are done with it; a thread's products of one step are in flight while the next is issued.
// Copies never touch what is unaligned or listed (`columns`): product.cuh serves those.
#pragma once
#include "cuda/product.cuh"
#include "cuda/ptx_sm90.cuh"

namespace exeunt::cuda {

template <int kRows>
struct Sm90 {
  static constexpr int kGroups = kRows > 64 ? 2 : 1;  // tiles side by side, four consumer warps each
  static constexpr int kBlockThreads = kGroups * kThreads + (kGroups > 1 ? kThreads : 32);
  static constexpr int kBlocks = kRows > 64 ? 1 : 2;  // to a multiprocessor
  static constexpr int kStages = kRows > 32 ? 4 : 5;
  static constexpr int kStageBytes = (kGroups * kTile + kRows) * kLine;
  static constexpr int kBarriers = kStages * kStageBytes;  // where they lie
  static constexpr int kScratch = kBarriers + 128;         // where the epilogue's scratch begins
};

// An operand of wgmma: rows of 128 bytes in eights, exchanged within them, the eights `apart` bytes from each other.
__device__ __forceinline__ uint64_t descriptor(const char* shared, int apart) {
  return (ptx::shared_address(shared) & 0x3ffffu) >> 4 | uint64_t{1} << 16 | static_cast<uint64_t>(apart >> 4) << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// Which stage is next, and the parity of the phase that its barriers are in.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity;
  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <class T, int kRows>
__device__ __forceinline__ void produce(const CUtensorMap& weight, const CUtensorMap& x, Jobs jobs, int64_t lines,
                                        char* shared, uint64_t* full, uint64_t* empty) {
  using S = Sm90<kRows>;
  constexpr int kElements = kLine / static_cast<int>(sizeof(T));
  for (Turn<S::kStages> turn{0, 1}; !jobs.done(); jobs.next())
    for (int64_t line = 0; line < lines; ++line, turn.next()) {
      char* stage = shared + turn.stage * S::kStageBytes;
      wait(empty + turn.stage, turn.parity);
      ptx::mbarrier_arrive_expect_tx(full + turn.stage, S::kStageBytes);
      const int at = static_cast<int>(line) * kElements;
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group)
        ptx::tma_load(stage + group * kTile * kLine, &weight, at,
                      static_cast<int>((jobs.tile + group * jobs.tiles_per_chunk) * kTile), full + turn.stage);
      ptx::tma_load(stage + S::kGroups * kTile * kLine, &x, at, static_cast<int>(jobs.block * kRows),
                    full + turn.stage);
    }
}

template <class T, int kRows, class Epilogue>
__device__ __forceinline__ void consume(Jobs jobs, int64_t lines, int group, char* shared, uint64_t* full,
                                        uint64_t* empty, Epilogue epilogue) {
  using S = Sm90<kRows>;
  const bool leads = threadIdx.x % 32 == 0;
  for (Turn<S::kStages> turn{0, 0}; !jobs.done(); jobs.next()) {
    Accumulator<kRows> acc = {};
    int before = 0;
    for (int64_t line = 0; line < lines; ++line, turn.next()) {
      const char* stage = shared + turn.stage * S::kStageBytes;
      const uint64_t a = descriptor(stage + group * kTile * kLine, 16 * kLine);
      const uint64_t b = descriptor(stage + S::kGroups * kTile * kLine, 8 * kLine);
      wait(full + turn.stage, turn.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)  // 32 bytes further along D; i: eight rows further down
#pragma unroll
        for (int i = 0; i < 2; ++i) ptx::wgmma<T, kRows>(acc[i], a + (i * 8 * kLine + k * 32) / 16, b + k * 32 / 16);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (leads && line > 0) ptx::mbarrier_arrive(empty + before);
      before = turn.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::hold<kRows>(acc[0]);
    ptx::hold<kRows>(acc[1]);
    if (leads) ptx::mbarrier_arrive(empty + before);
    ptx::barrier_sync(1 + group, kThreads);  // the epilogue before has left its scratch
    const int64_t tile = jobs.tile + group * jobs.tiles_per_chunk;
    if (tile < jobs.tiles) epilogue(tile, jobs.block, acc);
  }
}

}  // namespace exeunt::cuda
