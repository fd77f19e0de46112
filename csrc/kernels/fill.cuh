// One number to a whole buffer.
#pragma once

#include "kernels/platform.cuh"

namespace lsm {

template <class T>
__global__ void __launch_bounds__(128) fill_kernel(T* to, i64 count, T value) {
    i64 const i = static_cast<i64>(blockIdx.x) * 128 + threadIdx.x;
    if (i < count) store_global(to + i, value);
}

template <class T>
void fill(T* to, i64 count, T value, void* stream) {
    if (count > 0)
        launch(fill_kernel<T>, dim3(static_cast<unsigned>((count + 127) / 128)), dim3(128), 0,
               stream, to, count, value);
}

}  // namespace lsm
