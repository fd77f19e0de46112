// The reverse chain on tensor cores.
#include "kernels/delta/reverse.cuh"
#include "kernels/delta/tensor_backward.h"
#include "kernels/dispatch.h"

namespace lsm::delta {

void run_reverse(DeltaWork const& work, int64_t blocks, void* stream) {
    dispatch(Buckets<64, 128>{}, work.p.K, [&](auto K) {
        using Kernel = Reverse<K>;
        launch(reverse<K>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
               sizeof(typename Kernel::SharedStorage), stream, work);
    });
}

}  // namespace lsm::delta
