// A chunk's gradients on tensor cores.
#include "kernels/delta/gradients.cuh"
#include "kernels/delta/tensor_backward.h"
#include "kernels/dispatch.h"

namespace lsm::delta {

template <int K, bool OwnErase>
void run(DeltaWork const& work, int64_t blocks, void* stream) {
    using Kernel = Gradients<K, OwnErase>;
    launch(gradients<K, OwnErase>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_gradients(DeltaWork const& work, int64_t blocks, void* stream) {
    bool const own_erase = work.p.erase.data != nullptr;
    dispatch(Buckets<64, 128>{}, work.p.K, [&](auto K) {
        own_erase ? run<K, true>(work, blocks, stream) : run<K, false>(work, blocks, stream);
    });
}

}  // namespace lsm::delta
