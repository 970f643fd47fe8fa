// The tile instructions that the AMX kernels use, in plain C++: their logic runs on any CPU, under sanitizers too.
// Shapes come from the loaded configuration, as in the hardware; using a tile before it is shaped or beyond what was
// configured aborts. It cannot show speed. Sums of bfloat16 are rounded where Intel's manual rounds them; only
// denormals are not flushed.
#pragma once
#include <immintrin.h>  // its own tile intrinsics give way below

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace exeunt::amx_emulated {
namespace {

struct Tile {
  int rows = 0, bytes = 0;
  unsigned char data[16][64];
};
thread_local Tile tiles[8];

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

Tile& shaped(int t) {
  require(t >= 0 && t < 8 && tiles[t].rows > 0, "a tile is used that no configuration shaped");
  return tiles[t];
}

void load_config(const void* p) {
  const unsigned char* c = static_cast<const unsigned char*>(p);
  require(c[0] == 1, "palette must be 1");
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * t, sizeof bytes);
    tiles[t].rows = c[48 + t];
    tiles[t].bytes = bytes;
    require(tiles[t].rows <= 16 && bytes <= 64, "a tile has at most 16 rows of 64 bytes");
    std::memset(tiles[t].data, 0xff, sizeof tiles[t].data);  // NaN: nothing may be used before it is loaded
  }
}

void release() {
  for (Tile& t : tiles) t.rows = 0;
}

void zero(int t) { std::memset(shaped(t).data, 0, sizeof tiles[t].data); }

void load(int t, const void* p, int64_t stride) {
  Tile& tile = shaped(t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.data[r], static_cast<const char*>(p) + r * stride, static_cast<size_t>(tile.bytes));
}

void store(int t, void* p, int64_t stride) {
  Tile& tile = shaped(t);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(p) + r * stride, tile.data[r], static_cast<size_t>(tile.bytes));
}

float bfloat16(const unsigned char* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sum[m][n] = dot(sum[m][n], groups, x, y), where x(k) = a[m][4 bytes k] and y(k) = b[k][4 bytes n], k < groups: two
// bfloat16 each, or four integers
template <class Sum, class Dot>
void multiply(int s, int a, int b, Dot dot) {
  Tile &ts = shaped(s), &ta = shaped(a), &tb = shaped(b);
  require(ts.rows == ta.rows && ts.bytes == tb.bytes && ta.bytes == 4 * tb.rows, "tile shapes do not match");
  for (int m = 0; m < ts.rows; ++m)
    for (int n = 0; n < ts.bytes / 4; ++n) {
      Sum sum;
      std::memcpy(&sum, ts.data[m] + 4 * n, sizeof sum);
      sum =
          dot(sum, ta.bytes / 4, [&](int k) { return ta.data[m] + 4 * k; }, [&](int k) { return tb.data[k] + 4 * n; });
      std::memcpy(ts.data[m] + 4 * n, &sum, sizeof sum);
    }
}

// Even and odd elements of a line are sums of their own, which begin at zero: the sum before is rounded once a line.
void multiply_bfloat16(int s, int a, int b) {
  multiply<float>(s, a, b, [](float sum, int groups, auto x, auto y) {
    float even = 0.0f, odd = 0.0f;
    for (int k = 0; k < groups; ++k) {
      even = __builtin_fmaf(bfloat16(x(k)), bfloat16(y(k)), even);
      odd = __builtin_fmaf(bfloat16(x(k) + 2), bfloat16(y(k) + 2), odd);
    }
    return sum + (even + odd);
  });
}

[[maybe_unused]] void multiply_integers(int s, int a, int b) {
  multiply<int32_t>(s, a, b, [](int32_t sum, int groups, auto x, auto y) {
    for (int k = 0; k < groups; ++k)
      for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(x(k)[i]) * static_cast<int8_t>(y(k)[i]);
    return sum;
  });
}

}  // namespace
}  // namespace exeunt::amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig exeunt::amx_emulated::load_config
#define _tile_release exeunt::amx_emulated::release
#define _tile_zero exeunt::amx_emulated::zero
#define _tile_loadd exeunt::amx_emulated::load
#define _tile_stored exeunt::amx_emulated::store
#define _tile_dpbf16ps exeunt::amx_emulated::multiply_bfloat16
#define _tile_dpbssd exeunt::amx_emulated::multiply_integers
