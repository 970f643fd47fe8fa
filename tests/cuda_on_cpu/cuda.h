// The driver's description of a matrix to the copy engine, in front of the toolkit's header of this name.
#pragma once
#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0, CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct CUtensorMap {
  const char* data;
  int64_t width, rows, row_bytes;  // width in bytes
  int box_width, box_rows;         // box_width in bytes
  int element;                     // bytes
};

// Two dimensions and 128-byte swizzle alone; refuses what the driver refuses.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t dimensions, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  if (dimensions != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || steps[0] != 1 || steps[1] != 1 ||
      reinterpret_cast<uintptr_t>(data) % 16 || strides[0] % 16 || strides[0] >= uint64_t{1} << 40 || !sizes[0] ||
      !sizes[1] || sizes[0] > uint64_t{1} << 32 || sizes[1] > uint64_t{1} << 32 || box[0] * element > 128 ||
      box[1] > 256)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data),
          static_cast<int64_t>(sizes[0]) * element,
          static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(strides[0]),
          static_cast<int>(box[0]) * element,
          static_cast<int>(box[1]),
          element};
  return CUDA_SUCCESS;
}
