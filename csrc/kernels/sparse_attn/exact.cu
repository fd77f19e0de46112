#include "kernels/dispatch.h"
#include "kernels/sparse_attn/exact.cuh"
#include "kernels/sparse_attn/launch.h"

#include <algorithm>

namespace lsm::sparse_attn {
namespace {

template <int D, bool kBackward>
void run_rows(Work const& work, void* stream) {
    if (dim3 const grid = query_grid(work); grid.x > 0)
        launch(exact_rows<D, kBackward>, grid, dim3(kExactThreads),
               ExactRowsKernel<D, kBackward>::bytes(work.p), stream, work);
}

template <int D, Want Wants>
void run_keys(Work const& work, void* stream) {
    if (dim3 const grid = key_grid(work); grid.x > 0)
        launch(exact_keys<D, Wants>, grid, dim3(kExactThreads),
               ExactKeysKernel<D, Wants>::bytes(work.p), stream, work);
}

template <class F>
void dispatch_width(Work const& work, F const& f) {
    dispatch(Buckets<256, 576>{}, std::max(work.p.K, work.p.V), f);
}

}  // namespace

void exact_forward(Work const& work, void* stream) {
    dispatch_width(work, [&](auto D) { run_rows<D, false>(work, stream); });
}

void exact_backward(Work const& work, void* stream) {
    dispatch_width(work, [&](auto D) {
        run_rows<D, true>(work, stream);
        if constexpr (D > 256) {  // no registers for both
            run_keys<D, Want::values>(work, stream);
            run_keys<D, Want::keys>(work, stream);
        } else {
            run_keys<D, Want::both>(work, stream);
        }
    });
}

}  // namespace lsm::sparse_attn
