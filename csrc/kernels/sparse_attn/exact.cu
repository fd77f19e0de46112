#include "kernels/sparse_attn/exact.cuh"
#include "kernels/sparse_attn/launch.h"

namespace lsm::sparse_attn {

void exact_forward(Work const& work, void* stream) {
    launch(exact_rows<false>, query_grid(work), dim3(kExactThreads),
           ExactRowsKernel<false>::bytes(work.p), stream, work);
}

void exact_backward(Work const& work, void* stream) {
    if (dim3 const grid = query_grid(work); grid.x > 0)
        launch(exact_rows<true>, grid, dim3(kExactThreads), ExactRowsKernel<true>::bytes(work.p),
               stream, work);
    if (dim3 const grid = key_grid(work); grid.x > 0)
        launch(exact_keys, grid, dim3(kExactThreads), ExactKeysKernel::bytes(work.p), stream, work);
}

}  // namespace lsm::sparse_attn
