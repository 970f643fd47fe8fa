#pragma once
#include <cstdint>

#include "core/params.h"

namespace exeunt::cuda {

constexpr int64_t kLargestHead = 256;  // of keys and of values

// Bytes of workspace that a call of these shapes can need, whatever its lists say: T, Hq, Hkv, R, keys that a row has
// room for, Dv.
int64_t ragged_attention_workspace(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t entries, int64_t room,
                                   int64_t value_size);

// Enqueues the kernels on `stream` (a cudaStream_t) of `device`; every pointer of `p` is device memory. Neither waits
// nor allocates, and launches the same for the same shapes, so a captured graph follows what the lists say. Entries
// whose lists name what is not there become NaN. Throws std::runtime_error with what CUDA said.
void ragged_attention(const RaggedAttentionParams& p, int device, void* stream);

}  // namespace exeunt::cuda
