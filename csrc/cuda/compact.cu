#include "cuda/compact.cuh"
#include "cuda/compact.h"
#include "cuda/launch.h"

namespace exeunt::cuda {

void compact(const void* mask, int64_t stride, int64_t n, int64_t* rows, int64_t* count, int device, void* stream) {
  const OnDevice on_device(device);
  launch(&compact_kernel, 1, kThreads, 2 * kWarps * static_cast<int>(sizeof(int)), static_cast<cudaStream_t>(stream),
         static_cast<const uint8_t*>(mask), stride, n, rows, count);
}

void expand(const int64_t* rows, const int64_t* count, const void* compacted, const void* into, void* out, int64_t n,
            int64_t row_bytes, int device, void* stream_handle) {
  const OnDevice on_device(device);
  const auto run = [&]<class Word>(const Word*) {
    launch(&expand_kernel<Word>, n, kThreads, 0, static_cast<cudaStream_t>(stream_handle), rows, count,
           static_cast<const Word*>(compacted), static_cast<const Word*>(into), static_cast<Word*>(out),
           row_bytes / static_cast<int64_t>(sizeof(Word)));
  };
  const uintptr_t all = reinterpret_cast<uintptr_t>(compacted) | reinterpret_cast<uintptr_t>(into) |
                        reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes);
  if (all % 16 == 0)
    run(static_cast<const uint4*>(nullptr));
  else
    run(static_cast<const uint8_t*>(nullptr));
}

}  // namespace exeunt::cuda
