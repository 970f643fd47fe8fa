// What tests want of the emulation itself: its schedule, and single wrappers of csrc/cuda/ptx.cuh run by one warp.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.h"

namespace exeunt {

// Per lane: what a wrapper takes and what it leaves.
template <class T>
using Lanes = std::vector<std::vector<T>>;

template <class T>
Lanes<float> emulated_mma(const Lanes<uint32_t>& a, const Lanes<uint32_t>& b, Lanes<float> d) {
  emu::launch(dim3(1), dim3(32), 0, [&] {
    const unsigned lane = threadIdx.x;
    uint32_t a_words[4], b_words[2];
    float sums[4];
    for (int q = 0; q < 4; ++q) a_words[q] = a[lane][q], sums[q] = d[lane][q];
    for (int q = 0; q < 2; ++q) b_words[q] = b[lane][q];
    cuda::ptx::mma<T>(sums, a_words, b_words);
    d[lane].assign(sums, sums + 4);
  });
  return d;
}

// `shared` bytes, of which lane l passes the address `offsets[l]`.
template <bool kTurned>
Lanes<uint32_t> emulated_ldmatrix(const std::string& shared, const std::vector<int>& offsets) {
  Lanes<uint32_t> r(32);
  emu::launch(dim3(1), dim3(32), shared.size(), [&] {
    const unsigned lane = threadIdx.x;
    if (lane == 0) std::memcpy(cuda::ptx::dynamic_shared(), shared.data(), shared.size());
    __syncthreads();
    uint32_t words[4];
    const char* row = cuda::ptx::dynamic_shared() + offsets[lane];
    if constexpr (kTurned)
      cuda::ptx::ldmatrix_x4_trans(words, row);
    else
      cuda::ptx::ldmatrix_x4(words, row);
    r[lane].assign(words, words + 4);
  });
  return r;
}

template <class T>
uint32_t emulated_pack(float low, float high) {
  return cuda::ptx::pack<T>(low, high);
}

// 16 bytes of shared memory before the wait and after it.
inline std::vector<pybind11::bytes> emulated_cp_async(const std::string& global, int bytes) {
  alignas(16) char source[16];
  std::memcpy(source, global.data(), 16);
  char before[16], after[16];
  emu::launch(dim3(1), dim3(1), 16, [&] {
    char* shared = cuda::ptx::dynamic_shared();
    cuda::ptx::cp_async_16(shared, source, bytes);
    cuda::ptx::cp_async_commit();
    std::memcpy(before, shared, 16);
    cuda::ptx::cp_async_wait<0>();
    std::memcpy(after, shared, 16);
  });
  return {pybind11::bytes(before, 16), pybind11::bytes(after, 16)};
}

// One product of a warpgroup on `shared`, its four warps' results per thread.
template <class T, int kRows>
Lanes<float> emulated_wgmma(const std::string& shared, uint64_t a, uint64_t b, Lanes<float> d) {
  emu::launch(dim3(1), dim3(128), shared.size(), [&] {
    if (threadIdx.x == 0) std::memcpy(cuda::ptx::dynamic_shared(), shared.data(), shared.size());
    __syncthreads();
    float sums[kRows / 8][4];
    std::vector<float>& mine = d[threadIdx.x];
    std::copy(mine.begin(), mine.end(), &sums[0][0]);
    cuda::ptx::wgmma_fence();
    cuda::ptx::wgmma<T, kRows>(sums, a, b);
    cuda::ptx::wgmma_commit();
    cuda::ptx::wgmma_wait<0>();
    std::copy(&sums[0][0], &sums[0][0] + kRows / 2, mine.begin());
  });
  return d;
}

// Shared memory before a box of 16-bit elements has landed, and after.
inline std::vector<pybind11::bytes> emulated_tma(const std::string& matrix, int64_t rows, int64_t width,
                                                 int64_t row_bytes, int box_rows, int x, int y) {
  std::vector<uint4> aligned(matrix.size() / 16 + 1);
  std::memcpy(aligned.data(), matrix.data(), matrix.size());
  const CUtensorMap map = cuda::tensor_map(aligned.data(), rows, width, row_bytes, box_rows);
  const size_t bytes = static_cast<size_t>(box_rows) * 128;
  std::string before, after;
  emu::launch(dim3(1), dim3(1), bytes + 8, [&] {
    char* shared = cuda::ptx::dynamic_shared();
    auto* barrier = reinterpret_cast<uint64_t*>(shared + bytes);
    cuda::ptx::mbarrier_init(barrier, 1);
    cuda::ptx::mbarrier_init_fence();
    cuda::ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(bytes));
    cuda::ptx::tma_load(shared, &map, x, y, barrier);
    before.assign(shared, bytes);
    cuda::ptx::mbarrier_try_wait(barrier, 0);
    after.assign(shared, bytes);
  });
  return {pybind11::bytes(before), pybind11::bytes(after)};
}

template <int kRows>
void bind_wgmma(pybind11::module_& m) {
  m.def(("wgmma_bf16_" + std::to_string(kRows)).c_str(), &emulated_wgmma<BFloat16, kRows>);
  m.def(("wgmma_f16_" + std::to_string(kRows)).c_str(), &emulated_wgmma<Float16, kRows>);
}

inline void bind_emulation(pybind11::module_& m) {
  m.def("set_schedule", [](unsigned seed) { emu::schedule = seed; });
  m.def("set_capability", [](int capability) { emu::capability = capability; });
  m.def("fail_next_launch", [](int error) { emu::launch_error = error; });
  m.def("mma_bf16", &emulated_mma<BFloat16>);
  m.def("mma_f16", &emulated_mma<Float16>);
  m.def("ldmatrix_x4", &emulated_ldmatrix<false>);
  m.def("ldmatrix_x4_trans", &emulated_ldmatrix<true>);
  m.def("pack_bf16", &emulated_pack<BFloat16>);
  m.def("pack_f16", &emulated_pack<Float16>);
  m.def("cp_async_16", &emulated_cp_async);
  bind_wgmma<8>(m);
  bind_wgmma<16>(m);
  bind_wgmma<32>(m);
  bind_wgmma<64>(m);
  bind_wgmma<128>(m);
  m.def("tma_load", &emulated_tma);
}

}  // namespace exeunt
