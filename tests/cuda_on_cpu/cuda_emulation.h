// CUDA C++ on a CPU: enough of the language and its runtime to run this project's kernels under a C++20 compiler, its
// sanitizers and its debugger. tests/cuda_on_cpu/cuda_runtime.h shadows the toolkit's header of that name.
//
//   block     runs alone on the calling OS thread, blocks one after the other
//   thread    a fiber; it gives way only where it waits for others: barriers, warp operations, its end
//   warp op   a rendezvous: the last lane to arrive computes what every lane receives
//   cp.async  each copy lands at once or not before it is waited for; until then its target holds NaN
//   Hopper    mbarriers, bulk copies, products of a warpgroup: ptx_sm90_emulated.h
//   shared    dynamic shared memory is NaN (0xFF) at the start of every block
//   schedule  `emu::schedule = 0`: threads in order, copies late; any other seed: a random order, some copies early
//
// Errors end the launch with emu::Error: a deadlock (naming who waits where), lanes that meet in different operations,
// a misaligned or out-of-bounds address in a copy or a matrix load, a thread that ends with copies in flight.
//
// Under ThreadSanitizer every thread is a TSan fiber, ordered with others by barriers, mbarriers, __syncwarp and
// wgmma's aligned instructions alone, so a missing barrier is reported as the race that it is. Under AddressSanitizer
// shared memory ends where it ends.
//
// What it cannot see: wrong PTX strings (ptx_layouts.py holds those to their documentation), what nvcc makes of the
// code, bank conflicts, registers, speed, and races between blocks.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running thread: set whenever one is switched to

namespace emu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline unsigned schedule = 0;

enum class State : uint8_t { ready, at_barrier, at_warp_op, at_mbarrier, done };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;  // of 16; zeros fill the rest
  bool landed;
};

// A product of a warpgroup that is under way.
struct Product {
  float* results;
  std::function<void()> run;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int linear = 0;
  State state = State::ready;
  const char* where = "its start";
  int barrier = 0;                        // which one it is at
  const void* awaited = nullptr;          // the mbarrier that it is at
  std::vector<Copy> open;                 // cp.async not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  bool fenced = false;                    // wgmma: a fence since the last commit
  std::vector<Product> products;          // not yet committed
  std::vector<std::vector<Product>> product_groups;
  std::map<float*, std::vector<float>> held;  // what accumulators hold that products have taken
};

struct Warp {
  uint32_t arrived = 0, mask = 0;
  const char* op = nullptr;
  const void* in[32];
  void* out[32];
};

// One of a block's sixteen barriers; __syncthreads is the first.
struct Barrier {
  int waiting = 0;
  unsigned passed = 0;
  char order[2];  // what TSan orders threads by, in turn
};

struct Block {
  dim3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int alive = 0;
  Barrier barriers[16];
  char began, ended;                             // what TSan orders threads by
  bool unfenced = false;                         // an mbarrier was initialised and the copy engine not told
  std::vector<std::function<void()>> in_flight;  // bulk copies
  Engines engines;                               // that make them
  Fiber main;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  std::mt19937 random;
};

inline Block* block = nullptr;
inline Thread* self = nullptr;

// Heads or tails, by the schedule's seed; always tails without one.
inline bool coin() {
  Unseen unseen;
  return schedule && block->random() % 2;
}

NO_TSAN inline void give_way() { switch_fiber(self->fiber, block->main); }

[[noreturn]] inline void fail(const std::string& what) {
  if (block->error.empty()) block->error = what;
  self->state = State::done;
  for (;;) give_way();
}

NO_TSAN inline void open_barrier(Block& b, int id) {
  b.barriers[id].waiting = 0;
  ++b.barriers[id].passed;
  for (Thread& t : b.threads)
    if (t.state == State::at_barrier && t.barrier == id) t.state = State::ready;
}

NO_TSAN inline void wait_at_barrier(Block& b, int id, int threads, const char* where) {
  Unseen unseen;
  self->where = where;
  self->barrier = id;
  if (++b.barriers[id].waiting == threads) return open_barrier(b, id);
  self->state = State::at_barrier;
  give_way();
}

// `threads` of the block meet, or all that have not ended.
NO_TSAN inline void barrier(int id, int threads, const char* where) {
  Block& b = *block;
  char* order = &b.barriers[id].order[b.barriers[id].passed & 1];
  tsan_release(order);
  wait_at_barrier(b, id, threads ? threads : b.alive, where);
  tsan_acquire(order);
}

inline void wake(const void* mbarrier) {
  for (Thread& t : block->threads)
    if (t.state == State::at_mbarrier && t.awaited == mbarrier) t.state = State::ready;
}

// Runs `copy` at some later time, as the copy engine would: beside all threads, ordered after the calling one only.
template <class Run>
void later(Run copy) {
  auto order = std::make_shared<char>();
  tsan_release(order.get());
  Unseen unseen;
  block->in_flight.push_back([copy, order] {
    block->engines.run([&] {
      tsan_acquire(order.get());
      copy();
    });
  });
}

// The lanes of `mask` meet; the last to arrive runs combine(in, out), arrays over the lanes.
template <class In, class Out, class Combine>
inline void warp_op(const char* op, uint32_t mask, const In& in, Out& out, Combine&& combine) {
  Unseen unseen;
  Block& b = *block;
  Warp& w = b.warps[self->linear >> 5];
  const int lane = self->linear & 31;
  const uint32_t bit = 1u << lane;
  self->where = op;
  if (!(mask & bit)) fail(std::string(op) + ": the calling lane is not in its mask");
  if (!w.arrived) {
    w.mask = mask;
    w.op = op;
  } else if (w.mask != mask || std::strcmp(w.op, op) != 0) {
    fail(std::string("lanes of one warp meet in different operations: ") + op + " and " + w.op);
  }
  w.in[lane] = &in;
  w.out[lane] = &out;
  w.arrived |= bit;
  if (w.arrived != mask) {
    self->state = State::at_warp_op;
    give_way();
    return;
  }
  w.arrived = 0;
  combine(reinterpret_cast<const In* const*>(w.in), reinterpret_cast<Out* const*>(w.out));
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && l != lane) b.threads[(self->linear & ~31) + l].state = State::ready;
}

NO_TSAN inline void end_thread() {
  tsan_release(&block->ended);
  Unseen unseen;
  self->state = State::done;
  if (--block->alive && block->barriers[0].waiting == block->alive) open_barrier(*block, 0);
}

NO_TSAN inline void thread_main() {
  fiber_started();
  tsan_acquire(&block->began);
  try {
    (*block->kernel)();
    if (!self->open.empty() || !self->groups.empty()) throw Error("a thread ended with cp.async in flight");
    if (!self->products.empty() || !self->product_groups.empty()) throw Error("a thread ended with wgmma in flight");
  } catch (const std::exception& e) {
    if (block->error.empty()) block->error = e.what();
  }
  end_thread();
  for (;;) give_way();
}

inline std::string deadlock(const Block& b) {
  std::string what = "deadlock in block " + std::to_string(b.index.x) + ":";
  int named = 0;
  for (const Thread& t : b.threads)
    if (t.state != State::done && named++ < 4) what += " thread " + std::to_string(t.linear) + " at " + t.where + ",";
  return what + " " + std::to_string(b.threads.size() - static_cast<size_t>(b.alive)) + " threads have ended";
}

inline void run_block(Block& b, std::vector<Stack>& stacks) {
  const int n = static_cast<int>(b.threads.size());
  std::vector<int> order(n);
  b.alive = n;
  for (Barrier& barrier : b.barriers) barrier.waiting = 0;
  b.unfenced = false;
  b.in_flight.clear();
  b.error.clear();
  block = &b;
  FiberScope scope(b.main);
  for (int i = 0; i < n; ++i) {
    Thread& t = b.threads[i];
    order[i] = t.linear = i;
    t.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    t.state = State::ready;
    t.open.clear();
    t.groups.clear();
    t.products.clear();
    t.product_groups.clear();
    t.held.clear();
    t.fenced = false;
    make_fiber(t.fiber, stacks[i], &thread_main);
  }
  for (Warp& w : b.warps) w = Warp{};
  tsan_release(&b.began);
  if (b.shared) std::memset(b.shared, 0xFF, b.shared_bytes);
  while (b.alive && b.error.empty()) {
    bool ran = false;
    if (schedule) std::shuffle(order.begin(), order.end(), b.random);
    for (int i : order) {
      if (b.threads[i].state != State::ready) continue;
      ran = true;
      self = &b.threads[i];
      threadIdx = self->index;
      switch_fiber(b.main, self->fiber);
      if (!b.error.empty()) break;
    }
    // A bulk copy lands when nobody can go on without it, or when the schedule says so.
    const size_t flying = b.in_flight.size();
    if (flying && (!ran || (schedule && b.random() % 4 == 0))) {
      const size_t which = schedule ? b.random() % flying : 0;
      const auto land = std::move(b.in_flight[which]);
      b.in_flight.erase(b.in_flight.begin() + static_cast<std::ptrdiff_t>(which));
      land();
    } else if (!ran && b.error.empty()) {
      b.error = deadlock(b);
    }
  }
  if (b.error.empty() && !b.in_flight.empty()) b.error = "the block ended with bulk copies in flight";
  tsan_acquire(&b.ended);
  block = nullptr;
  self = nullptr;
  if (!b.error.empty()) throw Error(b.error);
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  static std::vector<Stack> stacks;
  while (stacks.size() < threads) stacks.emplace_back();
  std::unique_ptr<unsigned char, decltype(&std::free)> shared(nullptr, std::free);
  Block b;
  if (shared_bytes) {
    b.shared_bytes = (shared_bytes + 1023) / 1024 * 1024;
    shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, b.shared_bytes)));
  }
  b.shared = shared.get();
  b.threads.resize(threads);
  b.warps.resize((threads + 31) / 32);
  blockDim = size;
  gridDim = grid;
  b.kernel = &kernel;
  b.random.seed(schedule);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = blockIdx = dim3(x, y, z);
        run_block(b, stacks);
      }
}

}  // namespace emu

inline void __syncthreads() { emu::barrier(0, 0, "__syncthreads"); }

inline void __syncwarp(uint32_t mask = ~0u) {
  int in = 0, out = 0;
  emu::Warp* w = &emu::block->warps[emu::self->linear >> 5];
  emu::tsan_release(w);
  emu::warp_op("__syncwarp", mask, in, out, [](auto, auto) {});
  emu::tsan_acquire(w);
}

// Each lane receives what lane source(l) brought, or keeps its own where there is no such lane.
template <class T, class Source>
inline T emu_shuffle(const char* op, uint32_t mask, T value, Source source) {
  T result{};
  emu::warp_op(op, mask, value, result, [&](const T* const* in, T* const* out) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const int from = source(l);
      const bool outside = from < 0 || from > 31;
      if (!outside && !(mask >> from & 1)) throw emu::Error(std::string(op) + ": the source lane is not in the mask");
      *out[l] = *in[outside ? l : from];
    }
  });
  return result;
}

template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emu_shuffle("__shfl_xor_sync", mask, value, [lanes](int l) { return l ^ lanes; });
}

template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned lanes) {
  return emu_shuffle("__shfl_down_sync", mask, value, [lanes](int l) { return l + static_cast<int>(lanes); });
}

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int lane) {  // each lane names its own source
  struct In {
    T value;
    int lane;
  } mine{value, lane & 31};
  T result{};
  emu::warp_op("__shfl_sync", mask, mine, result, [mask](const In* const* in, T* const* out) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      if (!(mask >> in[l]->lane & 1)) throw emu::Error("__shfl_sync: the source lane is not in the mask");
      *out[l] = in[in[l]->lane]->value;
    }
  });
  return result;
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  uint32_t result = 0;
  emu::warp_op("__ballot_sync", mask, predicate, result, [&](const int* const* in, uint32_t* const* out) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l)
      if ((mask >> l & 1) && *in[l]) bits |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) *out[l] = bits;
  });
  return result;
}

// Threads give way at barriers and warp operations alone, so a plain read, change and write is atomic.
template <class T>
inline T atomicAdd(T* at, T value) {
  emu::tsan_acquire(at);
  emu::Unseen unseen;
  const T old = *at;
  *at = old + value;
  return old;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

inline int __popc(uint32_t bits) { return std::popcount(bits); }

inline float __fmaf_rn(float a, float b, float c) { return a * b + c; }
