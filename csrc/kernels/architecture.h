// Which GPU a launcher runs for, where that decides between kernels.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#else
#include "emu/architecture.h"
#endif

namespace lsm {

// Of the current device: 80, 90, ... The environment's LSM_ARCHITECTURE lowers it, to compare with older devices' kernels.
#ifdef __CUDACC__
inline int architecture() {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    char const* const wish = std::getenv("LSM_ARCHITECTURE");
    int const found = 10 * major + minor;
    return wish == nullptr ? found : std::min(found, std::atoi(wish));
}
#else
inline int architecture() {
    return emu::architecture();
}
#endif

}  // namespace lsm
