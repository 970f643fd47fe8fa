#include "cuda/launch.h"
#include "cuda/small_head.cuh"
#include "cuda/small_head.h"

namespace exeunt::cuda {
namespace {

int64_t pooled_at(const SmallHeadParams& p) {
  return (p.rows * p.width * element_bytes(p.pooler.weight.dtype) + 63) / 64 * 64;
}

void linear(const LayerArg& layer, const void* x, int64_t rows, void* out, DType out_dtype, cudaStream_t stream) {
  const int64_t blocks = (layer.outputs + kWarps - 1) / kWarps * ((rows + 7) / 8);
  typed(x, layer.weight.dtype, [&](auto* rows_of_x) {
    launch(&linear_kernel<std::remove_cvref_t<decltype(*rows_of_x)>>, blocks, kThreads, 0, stream, layer, rows_of_x,
           rows, out, out_dtype);
  });
}

}  // namespace

int64_t small_head_workspace(const SmallHeadParams& p) {
  const int64_t element = element_bytes(p.head.weight.dtype);
  return p.pooled ? pooled_at(p) + p.rows * p.pooler.outputs * element : p.rows * p.width * element;
}

void small_head(const SmallHeadParams& p, int device, void* stream_handle) {
  const OnDevice on_device(device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  char* x = static_cast<char*>(p.workspace);
  const DType dtype = p.head.weight.dtype;  // the pooler's too
  launch(&small_head_normalise_kernel, p.rows, kThreads, kNormaliseScratch, stream, p, static_cast<void*>(x), dtype);
  const void* rows = x;
  if (p.pooled) {
    char* pooled = x + pooled_at(p);
    linear(p.pooler, x, p.rows, pooled, dtype, stream);
    rows = pooled;
  }
  linear(p.head, rows, p.rows, p.out, DType::float32, stream);
}

void saturation(const SaturationParams& p, int device, void* stream_handle) {
  const OnDevice on_device(device);
  launch(&saturation_kernel, p.rows, kThreads, 3 * kWarps * static_cast<int>(sizeof(double)),
         static_cast<cudaStream_t>(stream_handle), p);
}

}  // namespace exeunt::cuda
