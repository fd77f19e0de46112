// Functions that rarely run and are not inlined: the registers they need are no kernel's.
#pragma once

#include "kernels/platform.cuh"

#ifdef __CUDACC__
#define LSM_DEVICE_RARE __device__ __noinline__
#else
#define LSM_DEVICE_RARE inline
#endif
