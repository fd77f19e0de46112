// The short convolution, one pass over memory (walk.cuh).
#pragma once

#include "kernels/conv/walk.cuh"

namespace lsm::conv {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_kernel(ConvParams const p, Segments const segments, int tiles, bool whole) {
    auto& shared = *reinterpret_cast<SharedStorage<C>*>(dyn_smem());
    Place<C> const place(p, segments, tiles, p.y);
    if (place.segment.unused()) return;
    Filter<C> const filter(p, place, shared);
    store_state(p, place);

    int const reach = static_cast<int>(p.W) - 1;
    Batch<C> x, before, y;
    load_before(before, p, place, place.t, whole);
    LSM_UNROLL_BY(1)
    for (i64 t = place.t; t < place.stop; t += C::kBatch) {
        int const count = clamp_count(place.stop - t, C::kBatch);
        load_inputs(x, p, place, t, count, whole);
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            int own = reach;
            if (p.seq_idx != nullptr && i < count) {
                int const age = place.age(p, t + i);
                own = age < reach ? age : reach;
            }
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) {
                float const pre = convolve<C>(filter, x, before, i, v, own);
                y[i][v] = p.silu ? pre * logistic(pre) : pre;
            }
            if (C::kChannelLast && p.norm > 0) {
                float const inverse = inverse_norm(p, place, y[i]);
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v) y[i][v] *= inverse;
            }
        }
        store_batch(y, p.y, place, t, count, whole);
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) before[i][v] = x[i][v];
        }
    }
}

}  // namespace lsm::conv
