// What tests want of the emulation itself: its schedule, and single wrappers of csrc/cuda/ptx.cuh run by one warp.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/ptx.cuh"

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
inline Lanes<uint32_t> emulated_ldmatrix(const std::string& shared, const std::vector<int>& offsets) {
  Lanes<uint32_t> r(32);
  emu::launch(dim3(1), dim3(32), shared.size(), [&] {
    const unsigned lane = threadIdx.x;
    if (lane == 0) std::memcpy(cuda::ptx::dynamic_shared(), shared.data(), shared.size());
    __syncthreads();
    uint32_t words[4];
    cuda::ptx::ldmatrix_x4(words, cuda::ptx::dynamic_shared() + offsets[lane]);
    r[lane].assign(words, words + 4);
  });
  return r;
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

inline void bind_emulation(pybind11::module_& m) {
  m.def("set_schedule", [](unsigned seed) { emu::schedule = seed; });
  m.def("mma_bf16", &emulated_mma<BFloat16>);
  m.def("mma_f16", &emulated_mma<Float16>);
  m.def("ldmatrix_x4", &emulated_ldmatrix);
  m.def("cp_async_16", &emulated_cp_async);
}

}  // namespace exeunt
