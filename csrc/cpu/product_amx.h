// The streaming product on tile registers (AMX): sixteen weight rows are the A operand, as they lie or packed, and the
// hidden rows the B operand, packed once in blocks of sixteen.
//
//   tmm4  A  16 weight rows x 64 bytes             tmm5, tmm6  B  [16 groups of elements][16 hidden rows][4 bytes]
//   tmm0-3   sums [16 weight rows][16 hidden rows], one per block of hidden rows; each B is read once per line
//   end      sums -> memory -> transposed -> z[16] of each hidden row
//
// Bits: a sum is one chain over D inside the tile unit, in steps of a line, whatever the other rows are.
//
// Included by product.h for the ISA that has it. EXEUNT_AMX_EMULATED takes the intrinsics from
// tests/cpp/amx_emulated.h.
#pragma once
#if defined(EXEUNT_AMX_EMULATED)
#include "amx_emulated.h"
#else
#include <immintrin.h>
#endif

namespace exeunt::cpu::EXEUNT_ISA {

struct Bfloat16Tiles {
  static constexpr int kPlanes = 1, kElement = 2;  // bytes of an element; a group has 4 / kElement
  template <int Block>
  EXEUNT_INLINE void add() {  // register numbers are part of the instruction: literals only
    if constexpr (Block == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (Block == 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (Block == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (Block == 3) _tile_dpbf16ps(3, 4, 6);
  }
  template <class Put>
  EXEUNT_INLINE void split(const float* row, int64_t width, RowScale&, Put&& put) {
    for (int64_t d = 0; d < width; ++d) {
      const BFloat16 value = to_bfloat16(row[d]);
      put(d, 0, &value);
    }
  }
  EXEUNT_INLINE void finish(float*, const RowScale&, const Tile&) {}
};

struct Int8Tiles {
  static constexpr int kPlanes = 2, kElement = 1;
  template <int Block>
  EXEUNT_INLINE void add() {
    if constexpr (Block == 0) _tile_dpbusd(0, 4, 5);
    if constexpr (Block == 1) _tile_dpbusd(1, 4, 6);
    if constexpr (Block == 2) _tile_dpbusd(2, 4, 5);
    if constexpr (Block == 3) _tile_dpbusd(3, 4, 6);
  }
  template <class Put>
  EXEUNT_INLINE void split(const float* row, int64_t width, RowScale& s, Put&& put) {
    split_planes(row, width, s, [&](int64_t d, int high, int low) {
      const int8_t planes[2] = {static_cast<int8_t>(high), static_cast<int8_t>(low)};
      put(d, 0, planes);
      put(d, 1, planes + 1);
    });
  }
  EXEUNT_INLINE void finish(float* z, const RowScale& s, const Tile& tile) { join_planes(z, s, tile); }
};

// sums[w][h] -> z[h][w]
EXEUNT_INLINE void transpose(const float* sums, float (*z)[kTile]) {
  Vec v[kTile];
  for (int i = 0; i < kTile; ++i) v[i] = load(sums + i * kTile);
  const auto stage = [&]<int Block>(std::integral_constant<int, Block>) {
    for (int start = 0; start < kTile; start += Block)
      for (int i = start; i < start + Block / 2; ++i) {
        const Vec low = take_halves<Block, 0>(v[i], v[i + Block / 2]),
                  high = take_halves<Block, 1>(v[i], v[i + Block / 2]);
        v[i] = low;
        v[i + Block / 2] = high;
      }
  };
  stage(std::integral_constant<int, 16>());
  stage(std::integral_constant<int, 8>());
  stage(std::integral_constant<int, 4>());
  stage(std::integral_constant<int, 2>());
  for (int i = 0; i < kTile; ++i) store(z[i], v[i]);
}

template <class K>
struct TileProduct {
  static constexpr int64_t kRows = kMaxRows / K::kPlanes;
  static constexpr int64_t kOnce = kRows;                // a tile of the weight is read once, whatever comes
  static constexpr int64_t kBlockBytes = kTile * kLine;  // one line of one block of hidden rows

  struct Scope {  // the tile registers are shaped while one of these lives
    Scope() {
      struct alignas(64) {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
      } config = {1, 0, {}, {}, {}};
      for (int i = 0; i < 7; ++i) config.bytes[i] = kLine, config.rows[i] = kTile;
      _tile_loadconfig(&config);
    }
    ~Scope() { _tile_release(); }
  };

  EXEUNT_INLINE int64_t rows_bytes(int64_t rows, int64_t lines) {
    return (rows * K::kPlanes + kTile - 1) / kTile * lines * kBlockBytes;
  }

  EXEUNT_INLINE void pack_row(const float* row, int64_t width, int64_t lines, int64_t n, PackedRows x) {
    constexpr int64_t kGroup = 4 / K::kElement, kPerLine = kLine / K::kElement;
    const auto place = [&](int64_t d, int plane) {
      const int64_t virtual_row = n * K::kPlanes + plane;
      return x.data + (virtual_row / kTile * lines + d / kPerLine) * kBlockBytes + d % kPerLine / kGroup * kLine +
             virtual_row % kTile * 4 + d % kGroup * K::kElement;
    };
    for (int plane = 0; plane < K::kPlanes; ++plane)
      for (int64_t d = 0; d < lines * kPerLine; d += kGroup) __builtin_memset(place(d, plane), 0, 4);
    K::split(row, width, x.scale[n],
             [&](int64_t d, int plane, const void* value) { __builtin_memcpy(place(d, plane), value, K::kElement); });
  }

  template <class Each>
  EXEUNT_INLINE void run(const Tile& tile, PackedRows x, int64_t first, int64_t rows, Each&& each) {
    const int64_t lines = tile.lines, virtual_rows = rows * K::kPlanes;
    const char* b = x.data + first * K::kPlanes / kTile * lines * kBlockBytes;
    const int blocks = static_cast<int>((virtual_rows + kTile - 1) / kTile);
    if (blocks == 1) sums<1>(tile, b);
    if (blocks == 2) sums<2>(tile, b);
    if (blocks == 3) sums<3>(tile, b);
    if (blocks == 4) sums<4>(tile, b);
    alignas(64) float sum[kTile * kTile], z[kTile][kTile];
    for (int block = 0; block < blocks; ++block) {
      if (block == 0) _tile_stored(0, sum, kLine);
      if (block == 1) _tile_stored(1, sum, kLine);
      if (block == 2) _tile_stored(2, sum, kLine);
      if (block == 3) _tile_stored(3, sum, kLine);
      transpose(sum, z);
      for (int r = 0; r < kTile && block * kTile + r < virtual_rows; r += K::kPlanes) {
        const int64_t row = (block * kTile + r) / K::kPlanes;
        K::finish(z[r], x.scale[first + row], tile);
        each(row, static_cast<const float*>(z[r]));
      }
    }
  }

 private:
  template <int Blocks>
  EXEUNT_INLINE void sums(const Tile& tile, const char* b) {
    const int64_t lines = tile.lines;
    _tile_zero(0);
    if constexpr (Blocks > 1) _tile_zero(1);
    if constexpr (Blocks > 2) _tile_zero(2);
    if constexpr (Blocks > 3) _tile_zero(3);
    for (int64_t l = 0; l < lines; ++l) {
      for (int i = 0; i < kTile; ++i) __builtin_prefetch(tile.next + (l * kTile + i) * kLine, 0, 2);
      _tile_loadd(4, tile.data + l * tile.line_stride, tile.row_stride);
      _tile_loadd(5, b + l * kBlockBytes, kLine);
      K::template add<0>();
      if constexpr (Blocks > 1) {
        _tile_loadd(6, b + (lines + l) * kBlockBytes, kLine);
        K::template add<1>();
      }
      if constexpr (Blocks > 2) {
        _tile_loadd(5, b + (2 * lines + l) * kBlockBytes, kLine);
        K::template add<2>();
      }
      if constexpr (Blocks > 3) {
        _tile_loadd(6, b + (3 * lines + l) * kBlockBytes, kLine);
        K::template add<3>();
      }
    }
  }
};

}  // namespace exeunt::cpu::EXEUNT_ISA
