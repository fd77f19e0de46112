// The double-buffered cp.async loop that the planted bugs and the legal idioms both are made of.
#pragma once

#include "harness.h"

namespace lsm::test {

enum class Bug { none, no_wait, no_barrier_before, no_barrier_after };

// One block of 128 threads adds up `steps` tiles of 512 words, each thread what its mirror image
// loaded.
template <Bug kBug>
__global__ void __launch_bounds__(128) add_tiles(u32 const* x, u32* y, int steps) {
    u32* const buffer = reinterpret_cast<u32*>(dyn_smem());  // [2][512]
    int const t = static_cast<int>(threadIdx.x);
    u32 total = 0;
    cp_async16(smem_u32(buffer + 4 * t), x + 4 * t, true);
    cp_async_commit();
    for (int s = 0; s < steps; ++s) {
        if (s + 1 < steps) {
            cp_async16(smem_u32(buffer + 512 * ((s + 1) % 2) + 4 * t), x + 512 * (s + 1) + 4 * t,
                       true);
        }
        cp_async_commit();
        if constexpr (kBug != Bug::no_wait) cp_async_wait<1>();
        if constexpr (kBug != Bug::no_barrier_before) __syncthreads();
        u32 const* const tile = buffer + 512 * (s % 2);
        for (int i = 0; i < 4; ++i) total += tile[4 * (127 - t) + i];
        // The next round's copies overwrite what was just read.
        if constexpr (kBug != Bug::no_barrier_after) __syncthreads();
    }
    cp_async_wait<0>();
    store_global(y + t, total);
}

template <Bug kBug>
bool run_add_tiles(int steps = 6) {
    std::vector<u32> x(512 * static_cast<std::size_t>(steps)), y(128);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<u32>(i * 2654435761u);
    launch(add_tiles<kBug>, dim3(1), dim3(128), 4096, nullptr, static_cast<u32 const*>(x.data()),
           y.data(), steps);
    for (std::size_t t = 0; t < 128; ++t) {
        u32 expected = 0;
        for (std::size_t s = 0; s < static_cast<std::size_t>(steps); ++s) {
            for (std::size_t i = 0; i < 4; ++i) expected += x[512 * s + 4 * (127 - t) + i];
        }
        if (y[t] != expected) return false;
    }
    return true;
}

}  // namespace lsm::test
