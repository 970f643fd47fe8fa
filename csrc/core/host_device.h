// Functions of csrc/core that CUDA kernels call too.
#pragma once

#ifdef __CUDACC__
#define EXEUNT_HOST_DEVICE __host__ __device__
#else
#define EXEUNT_HOST_DEVICE
#endif
