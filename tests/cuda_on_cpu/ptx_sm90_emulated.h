// The wrappers of csrc/cuda/ptx_sm90.cuh in C++, for cuda_emulation.h.
//
//   mbarrier   arrivals and bytes of the current phase; who waits for a phase gives way until it completes
//   TMA        a copy lands at some time between its issue and the first moment at which nobody else can go on; until
//              then its target holds NaN. Under ThreadSanitizer each copy is a thread of its own, ordered after its
//              issue and before what its barrier lets pass, so that early reads and early reuse are races
//   wgmma      products are done when they are waited for, by the thread that waits, from what shared memory holds
//              then; until then their results are NaN
#pragma once
#include <map>

#include "cuda.h"
#include "ptx_emulated.h"

namespace exeunt::cuda::ptx {

// The 64 bits of a barrier.
struct Mbarrier {
  uint16_t count, pending : 15, phase : 1;
  int32_t bytes;  // announced and not landed
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier_at(const char* op, uint64_t* barrier) {
  auto* at = reinterpret_cast<Mbarrier*>(barrier);
  const auto* p = reinterpret_cast<const unsigned char*>(barrier);
  if (reinterpret_cast<uintptr_t>(p) % 8 || p < emu::block->shared ||
      p + 8 > emu::block->shared + emu::block->shared_bytes)
    emu::fail(std::string(op) + ": the barrier is not in shared memory, 8-byte aligned");
  if (at->count == 0xFFFF) emu::fail(std::string(op) + ": the barrier was not initialised");
  return *at;
}

// What TSan orders threads by: a phase that is under way, of two.
inline void* order_of(Mbarrier& b, unsigned phase) { return reinterpret_cast<char*>(&b) + (phase & 1); }

inline void complete_if_done(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase = b.phase ^ 1u;
  b.pending = b.count & 0x7FFFu;
  emu::wake(&b);
}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  emu::Unseen unseen;
  auto* at = reinterpret_cast<Mbarrier*>(barrier);
  *at = {static_cast<uint16_t>(arrivals), 0, 0, 0};
  at->pending = arrivals & 0x7FFFu;
  emu::block->unfenced = true;
}

inline void mbarrier_init_fence() { emu::block->unfenced = false; }

inline void arrive(const char* op, uint64_t* barrier, uint32_t bytes) {
  Mbarrier& b = mbarrier_at(op, barrier);
  emu::tsan_release(order_of(b, b.phase));
  emu::Unseen unseen;
  b.bytes += static_cast<int32_t>(bytes);
  if (b.pending == 0) emu::fail(std::string(op) + ": more arrivals than the phase awaits");
  b.pending = (b.pending - 1u) & 0x7FFFu;
  complete_if_done(b);
}

inline void mbarrier_arrive(uint64_t* barrier) { arrive("mbarrier.arrive", barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  arrive("mbarrier.arrive.expect_tx", barrier, bytes);
}

NO_TSAN inline void wait_for_phase(Mbarrier& b, uint32_t parity) {
  emu::Unseen unseen;
  emu::self->where = "mbarrier.try_wait";
  while (b.phase == parity) {
    emu::self->state = emu::State::at_mbarrier;
    emu::self->awaited = &b;
    emu::give_way();
  }
}

inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  Mbarrier& b = mbarrier_at("mbarrier.try_wait", barrier);
  wait_for_phase(b, parity);
  emu::tsan_acquire(order_of(b, parity));
  return true;
}

// Where the byte of a row lies that the copy engine and the tensor cores exchange alike: bits 4 to 6 of an address with
// bits 7 to 9, of shared memory whose beginning is 1024-byte aligned.
inline size_t swizzled(size_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  Mbarrier& b = mbarrier_at("cp.async.bulk.tensor", barrier);
  auto* to = static_cast<unsigned char*>(shared);
  const size_t bytes = static_cast<size_t>(map->box_width) * map->box_rows, at = to - emu::block->shared;
  if (at % 1024) emu::fail("cp.async.bulk.tensor: the target is not 1024-byte aligned");
  if (to < emu::block->shared || at + bytes > emu::block->shared_bytes)
    emu::fail("cp.async.bulk.tensor: outside dynamic shared memory");
  if (emu::block->unfenced) emu::fail("cp.async.bulk.tensor: no fence since a barrier was initialised");
  std::memset(to, 0xFF, bytes);  // from here on nobody may read it, and nobody may still be reading it
  const auto land = [map = *map, x, y, at, bytes, &b] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int chunk = 0; chunk < map.box_width; chunk += 16) {
        unsigned char values[16] = {};
        const int64_t row = int64_t{y} + r, begin = int64_t{x} * map.element + chunk;
        const int64_t left = row >= 0 && row < map.rows ? map.width - begin : 0;
        if (left > 0) std::memcpy(values, map.data + row * map.row_bytes + begin, left < 16 ? left : 16);
        std::memcpy(emu::block->shared + swizzled(at + static_cast<size_t>(r) * 128 + chunk), values, 16);
      }
    emu::tsan_release(order_of(b, b.phase));
    emu::Unseen unseen;
    b.bytes -= static_cast<int32_t>(bytes);
    complete_if_done(b);
  };
  emu::later(land);
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emu::block->shared);
}

// All lanes of a warp meet; under TSan each is then ordered after what the others did.
inline void aligned(const char* op) {
  int in = 0, out = 0;
  emu::Warp* w = &emu::block->warps[emu::self->linear >> 5];
  emu::tsan_release(w);
  emu::warp_op(op, ~0u, in, out, [](auto, auto) {});
  emu::tsan_acquire(w);
}

inline void wgmma_fence() {
  aligned("wgmma.fence");
  emu::self->fenced = true;
}

// Operand rows of 16 elements: row r lies r % 8 rows of 128 bytes into the r / 8-th eight.
template <class T>
inline void operand_row(uint64_t descriptor, int row, float (&values)[16]) {
  const size_t start = (descriptor & 0x3FFF) << 4, apart = (descriptor >> 32 & 0x3FFF) << 4;
  for (int half = 0; half < 2; ++half) {
    T eight[8];
    const size_t at = swizzled(start + row / 8 * apart + row % 8 * 128 + half * 16);
    if (at + 16 > emu::block->shared_bytes) emu::fail("wgmma: an operand outside dynamic shared memory");
    std::memcpy(eight, emu::block->shared + at, 16);
    for (int k = 0; k < 8; ++k) values[8 * half + k] = to_float(eight[k]);
  }
}

template <class T, int kRows>
inline void wgmma(float (&d)[kRows / 8][4], uint64_t a, uint64_t b) {
  aligned("wgmma.mma_async");
  for (const uint64_t descriptor : {a, b})
    if (descriptor >> 62 != 1) emu::fail("wgmma: a descriptor whose layout is not the 128-byte swizzle");
  emu::Thread& self = *emu::self;
  if (!self.fenced) emu::fail("wgmma: no wgmma.fence since the last commit");
  float* results = &d[0][0];
  {
    emu::Unseen unseen;
    if (!self.held.count(results)) {
      self.held[results].assign(results, results + kRows / 2);
      std::memset(results, 0xFF, sizeof d);
    }
  }
  const auto multiply = [results, a, b] {
    const int lane = emu::self->linear % 32, first = emu::self->linear / 32 % 4 * 16 + lane / 4;
    float rows[2][16], column[16];
    std::vector<float>& sums = emu::self->held[results];
    for (int half = 0; half < 2; ++half) operand_row<T>(a, first + 8 * half, rows[half]);
    for (int j = 0; j < kRows / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        operand_row<T>(b, 8 * j + 2 * (lane % 4) + e, column);
        for (int half = 0; half < 2; ++half) {
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
          sums[4 * j + 2 * half + e] += sum;
        }
      }
  };
  emu::Unseen unseen;
  self.products.push_back({results, multiply});
}

inline void wgmma_commit() {
  aligned("wgmma.commit_group");
  emu::Unseen unseen;
  emu::self->product_groups.push_back(std::move(emu::self->products));
  emu::self->products.clear();
  emu::self->fenced = false;
}

template <int kPending>
inline void wgmma_wait() {
  auto& groups = emu::self->product_groups;
  while (groups.size() > kPending) {
    for (const emu::Product& product : groups.front()) product.run();
    emu::Unseen unseen;
    groups.erase(groups.begin());
  }
  {
    emu::Unseen unseen;
    for (auto held = emu::self->held.begin(); held != emu::self->held.end();) {
      bool wanted = false;
      for (const emu::Product& product : emu::self->products) wanted = wanted || product.results == held->first;
      for (const auto& group : groups)
        for (const emu::Product& product : group) wanted = wanted || product.results == held->first;
      if (!wanted) std::copy(held->second.begin(), held->second.end(), held->first);
      held = wanted ? std::next(held) : emu::self->held.erase(held);
    }
  }
  aligned("wgmma.wait_group");
}

template <int kRegisters>
inline void registers_down_to() {
  aligned("setmaxnreg");
}
template <int kRegisters>
inline void registers_up_to() {
  aligned("setmaxnreg");
}

template <int kRows>
inline void hold(float (&)[kRows / 8][4]) {}

}  // namespace exeunt::cuda::ptx
