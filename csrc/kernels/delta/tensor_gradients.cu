// A chunk's gradients on tensor cores.
#include "kernels/delta/gradients_channels.cuh"
#include "kernels/delta/tensor_backward.h"
#include "kernels/dispatch.h"

namespace lsm::delta {

template <class Kernel>
void run(void (*kernel)(DeltaWork), DeltaWork const& work, int64_t blocks, void* stream) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_gradients(DeltaWork const& work, int64_t blocks, void* stream) {
    dispatch(Buckets<64, 128>{}, work.p.K, [&](auto K) {
        if (work.p.decay == Decay::key) {
            run<GradientsChannels<K>>(gradients_channels<K>, work, blocks, stream);
        } else if (work.p.erase.data != nullptr) {
            run<Gradients<K, true>>(gradients<K, true>, work, blocks, stream);
        } else {
            run<Gradients<K, false>>(gradients<K, false>, work, blocks, stream);
        }
    });
}

}  // namespace lsm::delta
