// The sparse attention engine on tensor cores, for one type of numbers each.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/sparse_attn/launch.h"
#include "kernels/sparse_attn/tensor_keys.cuh"
#include "kernels/sparse_attn/tensor_rows.cuh"

namespace lsm::sparse_attn {

template <class Config>
void run_rows(Work const& work, void* stream) {
    if (dim3 const grid = query_grid(work); grid.x > 0)
        launch(tensor_rows<Config>, grid, dim3(Config::kThreads),
               sizeof(typename RowsKernel<Config>::SharedStorage), stream, work);
}

template <class Config>
void run_keys(Work const& work, void* stream) {
    if (dim3 const grid = key_grid(work); grid.x > 0)
        launch(tensor_keys<Config>, grid, dim3(Config::kThreads),
               sizeof(typename KeysKernel<Config>::SharedStorage), stream, work);
}

// Of values, whose widest are narrower than the widest keys.
template <int D>
constexpr int kValueColumns = D > 256 ? 512 : D;

template <class F>
void dispatch_width(Work const& work, F const& f) {
    dispatch(Buckets<64, 128, 256, 576>{}, work.p.K > work.p.V ? work.p.K : work.p.V, f);
}

template <class T>
void forward_with(Work const& work, void* stream) {
    dispatch_width(work, [&](auto D) {
        if constexpr (D < 256) {
            if (work.plain && !work.unite && work.least_weight == 0.f)
                return run_rows<RowsConfig<T, D, 4, 2, 64, false>>(work, stream);
        }
        constexpr int N = D < 256 ? 64 : D == 256 ? 32 : 16;
        run_rows<RowsConfig<T, D, 8, 1, N, false, kValueColumns<D>>>(work, stream);
    });
}

template <class T>
void backward_with(Work const& work, void* stream) {
    dispatch_width(work, [&](auto D) {
        if constexpr (D >= 256) {
            constexpr int N = D == 256 ? 32 : 16, DV = kValueColumns<D>;
            run_rows<RowsConfig<T, D, 4, 1, N, true, DV>>(work, stream);
            run_keys<KeysConfig<T, D, N, Want::values, DV>>(work, stream);
            run_keys<KeysConfig<T, D, N, Want::keys, DV>>(work, stream);
        } else {
            run_rows<RowsConfig<T, D, 8, 1, 64, true>>(work, stream);
            run_keys<KeysConfig<T, D, 32, Want::both>>(work, stream);
        }
    });
}

}  // namespace lsm::sparse_attn
