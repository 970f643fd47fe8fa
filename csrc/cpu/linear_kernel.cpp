// A plain layer for few rows: the streaming product, and bias and activation as its epilogue. Weight rows that fill no
// tile (a head of two classes) are multiplied one by one: a tile of zeros around them would cost more than they do.
#include "cpu/dot.h"
#include "cpu/product.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

EXEUNT_INLINE Vec activated(Vec v, Activation activation) {
  if (activation == Activation::tanh) return tanh(v);
  if (activation == Activation::relu) return v < 0.0f ? splat(0.0f) : v;  // NaN stays
  if (activation == Activation::sigmoid) {
    const Vec bounded = v < -87.0f ? splat(-87.0f) : v > 87.0f ? splat(87.0f) : v;
    const Vec result = 1.0f / (1.0f + exp(-bounded));
    return v == v ? result : v;
  }
  return v;
}

}  // namespace

void linear_rows(const LinearArgs& a) {
  const LayerArg& layer = *a.layer;
  const int64_t block = product_rows(layer.weight), tiles_end = a.end - a.end % kTile;
  for (int64_t first = 0; first < a.x.rows; first += block) {
    const int64_t rows = a.x.rows - first < block ? a.x.rows - first : block;
    const auto epilogue = [&](int64_t at, int count, float (*z)[kTile], const Ahead&) {
      alignas(64) float bias[kTile] = {};
      for (int i = 0; layer.bias.data && i < count; ++i)
        bias[i] = value_at(layer.bias.data, layer.bias.dtype, (at + i) * layer.bias.stride);
      for (int64_t r = 0; r < rows; ++r) {
        for (int i = 0; i < kTile; i += kLanes)
          store(z[r] + i, activated(load(z[r] + i) + load(bias + i), layer.activation));
        __builtin_memcpy(a.out + (first + r) * layer.outputs + at, z[r], sizeof(float) * static_cast<uint64_t>(count));
      }
    };
    const Stream stream{layer.weight, layer.inputs, nullptr, a.panel, nullptr};
    if (a.begin < tiles_end) product(stream, a.begin, tiles_end, a.x, first, rows, epilogue_of(epilogue));
    if (tiles_end == a.end) continue;
    alignas(64) float z[kMaxRows][kTile] = {};
    for (int64_t r = 0; r < rows; ++r)
      dots(a.rows + (first + r) * a.row_stride, layer.inputs, layer.weight, tiles_end, a.end, z[r]);
    epilogue(tiles_end, static_cast<int>(a.end - tiles_end), z, {});
  }
}

}  // namespace exeunt::cpu::EXEUNT_ISA
