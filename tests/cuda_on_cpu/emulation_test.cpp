// The emulation itself: what warps exchange, and what it must refuse. Exits non-zero with a line for each failure.
#include <cstdio>
#include <string>

#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.h"

using namespace exeunt::cuda;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

template <class Kernel>
std::string error_of(int threads, Kernel kernel) {
  try {
    emu::launch(dim3(1), dim3(threads), 1024, kernel);
  } catch (const emu::Error& e) {
    return e.what();
  }
  return "";
}

void expect_refused(const std::string& why, const std::string& said) {
  expect(said.find(why) != std::string::npos, "expected '" + why + "', got '" + said + "'");
}

void warps_exchange() {
  int sum = 0;
  const std::string error = error_of(64, [&] {
    const int lane = static_cast<int>(threadIdx.x % 32);
    expect(__shfl_xor_sync(~0u, lane, 5) == (lane ^ 5), "__shfl_xor_sync");
    expect(__shfl_down_sync(~0u, lane, 3) == (lane + 3 > 31 ? lane : lane + 3), "__shfl_down_sync");
    expect(__shfl_sync(~0u, lane, 7) == 7, "__shfl_sync");
    expect(__ballot_sync(~0u, lane % 2) == 0xAAAAAAAAu, "__ballot_sync");
    atomicAdd(&sum, lane);
    __syncwarp();
    int* shared = reinterpret_cast<int*>(ptx::dynamic_shared());
    expect(shared[threadIdx.x % 64] == -1, "shared memory begins poisoned");
    __syncthreads();
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    expect(shared[63 - threadIdx.x] == static_cast<int>(63 - threadIdx.x), "__syncthreads");
  });
  expect(error.empty(), error);
  expect(sum == 2 * 31 * 16, "atomicAdd");
}

void mistakes_are_refused() {
  alignas(16) static const char global[32] = {};
  expect_refused("deadlock in block 0: thread 1 at __syncwarp", error_of(32, [] {
                   if (threadIdx.x != 0) __syncwarp();
                 }));
  expect_refused("meet in different operations", error_of(32, [] {
                   if (threadIdx.x < 16)
                     __syncwarp();
                   else
                     __ballot_sync(~0u, 1);
                 }));
  expect_refused("not in its mask", error_of(32, [] { __syncwarp(0xFFFF); }));
  expect_refused("cp.async in flight", error_of(1, [] {
                   ptx::cp_async_16(ptx::dynamic_shared(), global, 16);
                   ptx::cp_async_commit();
                 }));
  expect_refused("not 16-byte aligned", error_of(1, [] { ptx::cp_async_16(ptx::dynamic_shared(), global + 2, 16); }));
  expect_refused("outside dynamic shared",
                 error_of(1, [] { ptx::cp_async_16(ptx::dynamic_shared() + 1024, global, 4); }));
  expect_refused("source size", error_of(1, [] { ptx::cp_async_16(ptx::dynamic_shared(), global, 17); }));
}

uint64_t* barrier() { return reinterpret_cast<uint64_t*>(ptx::dynamic_shared()); }

void barriers_count_arrivals_and_bytes() {
  int passed = 0;
  const std::string error = error_of(64, [&] {
    if (threadIdx.x == 0) ptx::mbarrier_init(barrier(), 64);
    __syncthreads();
    expect(ptx::mbarrier_try_wait(barrier(), 1), "the phase before the first has completed");
    ptx::mbarrier_arrive(barrier());
    ptx::mbarrier_try_wait(barrier(), 0);
    ++passed;
    ptx::mbarrier_arrive(barrier());
    ptx::mbarrier_try_wait(barrier(), 1);
    ++passed;
    ptx::barrier_sync(1 + threadIdx.x / 32, 32);
  });
  expect(error.empty() && passed == 128, "two phases: " + error);
  expect_refused("was not initialised", error_of(1, [] { ptx::mbarrier_arrive(barrier()); }));
  expect_refused("thread 0 at mbarrier.try_wait", error_of(1, [] {
                   ptx::mbarrier_init(barrier(), 1);
                   ptx::mbarrier_arrive_expect_tx(barrier(), 16);
                   ptx::mbarrier_try_wait(barrier(), 0);
                 }));
  expect_refused("thread 0 at bar.sync", error_of(32, [] { ptx::barrier_sync(1, 64); }));
}

void products_of_warpgroups_are_fenced_committed_and_awaited() {
  const uint64_t rows = uint64_t{1} << 62;
  expect_refused("no wgmma.fence", error_of(128, [=] {
                   float d[1][4] = {};
                   ptx::wgmma<exeunt::BFloat16, 8>(d, rows, rows);
                 }));
  expect_refused("wgmma in flight", error_of(128, [=] {
                   float d[1][4] = {};
                   ptx::wgmma_fence();
                   ptx::wgmma<exeunt::BFloat16, 8>(d, rows, rows);
                   ptx::wgmma_wait<0>();
                   expect(d[0][0] != d[0][0], "results are NaN until they were committed and waited for");
                 }));
}

}  // namespace

int main() {
  for (unsigned schedule : {0u, 1u, 2u}) {
    emu::schedule = schedule;
    warps_exchange();
    mistakes_are_refused();
    barriers_count_arrivals_and_bytes();
    products_of_warpgroups_are_fenced_committed_and_awaited();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
