// kv_fill, one head of one layer: the streaming product, and as its epilogue what a stock layer does to keys and values
// before it hands them to the cache.
//
//   tile of 16 weight rows . packed rows -> out[row][16 of Dh]     until the head is whole
//   values:  + bias                                    -> cache
//   keys:    + bias -> norm over Dh -> rotary embedding -> cache   all in float32, rounded once on the way into the
//   cache
//
// Hazard: two threads never write one head; the caller has checked that no two rows share a slot.
#include "cpu/product.h"
#include "cpu/vec.h"

namespace exeunt::cpu::EXEUNT_ISA {
namespace {

// Norm over the head, in double as all statistics of norms.
EXEUNT_INLINE void normalise_head(float* z, const KvFillParams& p, const KvLayer& layer, int64_t head) {
  const double size = static_cast<double>(p.head_size);
  double mean = 0.0, power = 0.0;
  if (p.key_norm == Norm::layer) {
    for (int64_t d = 0; d < p.head_size; ++d) mean += z[d];
    mean /= size;
  }
  for (int64_t d = 0; d < p.head_size; ++d) power += (z[d] - mean) * (z[d] - mean);
  const double rstd = 1.0 / __builtin_sqrt(power / size + static_cast<double>(p.key_eps));
  for (int64_t d = 0; d < p.head_size; ++d) {
    const float weight = value_at(layer.key_norm, p.dtype, head * layer.key_norm_head + d) + p.shift;
    z[d] = static_cast<float>((z[d] - mean) * rstd) * weight;
  }
}

// z[a] * cos[a] + partner * sin[a]; a pair is half the table apart, or side by side.
template <class T>
EXEUNT_INLINE void rotate(float* z, const T* cos, const T* sin, int64_t size, bool interleaved) {
  const auto turn = [&](int64_t a, int64_t b) __attribute__((always_inline)) {
    const float x = z[a], y = z[b];
    z[a] = x * to_float(cos[a]) - y * to_float(sin[a]);
    z[b] = y * to_float(cos[b]) + x * to_float(sin[b]);
  };
  if (interleaved)
    for (int64_t a = 0; a < size; a += 2) turn(a, a + 1);
  else
    for (int64_t a = 0; a < size / 2; ++a) turn(a, a + size / 2);
}

EXEUNT_INLINE void store_row(void* out, DType dtype, int64_t at, const float* z, int64_t size) {
  if (dtype == DType::float32)
    __builtin_memcpy(static_cast<float*>(out) + at, z, sizeof(float) * static_cast<uint64_t>(size));
  else if (dtype == DType::bfloat16)
    for (int64_t d = 0; d < size; ++d) static_cast<BFloat16*>(out)[at + d] = to_bfloat16(z[d]);
  else
    for (int64_t d = 0; d < size; ++d) static_cast<Float16*>(out)[at + d] = to_float16(z[d]);
}

}  // namespace

void kv_fill_pack(const KvFillParams& p, const KvLayer& layer, const double* standard, float* row, int64_t n,
                  PackedRows x) {
  const double shift = p.shift;
  const auto finish = [&](auto scaled) {  // with the bias, if there is one
    if (layer.norm_bias)
      typed(layer.norm_bias, p.dtype, [&](auto* b) {
        for (int64_t d = 0; d < p.width; ++d) row[d] = static_cast<float>(scaled(d) + to_float(b[d]));
      });
    else
      for (int64_t d = 0; d < p.width; ++d) row[d] = static_cast<float>(scaled(d));
  };
  if (layer.norm_weight)
    typed(layer.norm_weight, p.dtype,
          [&](auto* w) { finish([&](int64_t d) { return standard[d] * (to_float(w[d]) + shift); }); });
  else
    finish([&](int64_t d) { return standard[d]; });
  round_to(p.dtype, row, p.width);
  pack_row(p.dtype, p.form, row, p.width, n, x);
}

void kv_fill_head(const KvHeadArgs& a) {
  const KvFillParams& p = *a.p;
  const KvLayer& layer = *a.layer;
  const KvPlace& place = *a.place;
  const char* data = static_cast<const char*>(a.keys ? layer.key : layer.value);
  const int64_t head_stride = a.keys ? layer.key_head : layer.value_head;
  const int64_t row_stride = a.keys ? layer.key_row : layer.value_row;
  const WeightArg lying{data + a.head * head_stride, p.dtype, p.form, kTile * row_stride, row_stride, kLine, nullptr};
  const WeightArg packed{data + a.head * head_stride, p.dtype, p.form, row_stride, kLine, kTile * kLine, nullptr};
  const WeightArg weight = p.form == WeightForm::lies ? lying : packed;
  const void* bias = a.keys ? layer.key_bias : layer.value_bias;
  const int64_t bias_at = a.head * (a.keys ? layer.key_bias_head : layer.value_bias_head);
  void* out = a.keys ? place.keys : place.values;
  const int64_t out_row = a.keys ? place.key_row : place.value_row;
  const int64_t out_slot = a.keys ? place.key_slot : place.value_slot;
  const int64_t out_head = a.head * (a.keys ? place.key_head : place.value_head);
  const auto place_of = [&](int64_t n) { return p.batch_rows[n] * out_row + p.slots[n] * out_slot + out_head; };
  const int64_t bytes = element_bytes(p.dtype);
  const int64_t stride = (p.head_size + kTile - 1) / kTile * kTile, block = product_rows(weight);

  for (int64_t first = 0; first < a.x.rows; first += block) {
    const int64_t rows = a.x.rows - first < block ? a.x.rows - first : block;
    // A head's place in the cache is a page of its own: without this, its store waits there for microseconds.
    for (int64_t r = first; r < first + rows; ++r) {
      const char* place = static_cast<const char*>(out) + place_of(r) * bytes;
      for (int64_t at = 0; at < p.head_size * bytes; at += kLine) __builtin_prefetch(place + at, 1, 3);
    }
    struct Copy {
      float* out;
      int64_t stride, rows;
    } copy{a.out, stride, rows};
    const auto begin = [](void* self, const Group& g, const Ahead& ahead) {
      for (int64_t share = 0; share < 8; ++share) ahead.fetch(share);  // for the time that the head's end will take
      const Copy& to = *static_cast<const Copy*>(self);
      for (int64_t r = 0; r < to.rows; ++r)
        for (int t = 0; t < g.tiles(); ++t)
          __builtin_memcpy(to.out + r * to.stride + g.at + t * kTile, g.z[t][r], sizeof g.z[t][r]);
    };
    const char* next = first + block < a.x.rows ? static_cast<const char*>(weight.data) : a.next;
    product({weight, p.width, nullptr, a.panel, next}, 0, p.head_size, a.x, first, rows, {begin, nullptr, &copy});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = first + r;
      float* z = a.out + r * stride;
      if (bias)
        for (int64_t d = 0; d < p.head_size; ++d) z[d] += value_at(bias, p.dtype, bias_at + d);
      if (a.keys && p.key_norm != Norm::none) normalise_head(z, p, layer, a.head);
      if (a.keys && a.rotary.cos) {
        const int64_t at = p.source[n] * p.rotary;
        typed(a.rotary.cos, p.tables_dtype, [&](auto* cos) {
          rotate(z, cos + at, static_cast<decltype(cos)>(a.rotary.sin) + at, p.rotary, p.interleaved);
        });
      }
      store_row(out, p.dtype, place_of(n), z, p.head_size);
    }
  }
}

}  // namespace exeunt::cpu::EXEUNT_ISA
