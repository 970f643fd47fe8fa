// The emulation itself: what warps exchange, and what it must refuse. Exits non-zero with a line for each failure.
#include <cstdio>
#include <string>

#include "cuda/ptx.cuh"

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
    emu::launch(dim3(1), dim3(threads), 256, kernel);
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
                 error_of(1, [] { ptx::cp_async_16(ptx::dynamic_shared() + 256, global, 4); }));
  expect_refused("source size", error_of(1, [] { ptx::cp_async_16(ptx::dynamic_shared(), global, 17); }));
}

}  // namespace

int main() {
  for (unsigned schedule : {0u, 1u, 2u}) {
    emu::schedule = schedule;
    warps_exchange();
    mistakes_are_refused();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
