// A request that no register waits for.
#pragma once

#include "kernels/platform.cuh"

#ifndef __CUDACC__
#include "emu/cache.h"
#endif

namespace lsm {

// Asks for the 32-byte sector at p of global memory to be brought into the second-level cache.
LSM_DEVICE void prefetch_l2(void const* p) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
    emu::note_prefetch(p);
    static_cast<void>(*static_cast<char const volatile*>(p));  // it must be there
#endif
}

}  // namespace lsm
