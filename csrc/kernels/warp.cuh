// Sums and maxima over a warp, always in the same order; every lane gets the result.
#pragma once

#include "kernels/platform.cuh"

namespace lsm {

template <class T>
LSM_DEVICE T warp_sum(T x) {
    LSM_UNROLL
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

LSM_DEVICE float warp_max(float x) {
    LSM_UNROLL
    for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

}  // namespace lsm
