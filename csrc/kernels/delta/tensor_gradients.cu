// A chunk's gradients on tensor cores.
#include "kernels/delta/gradients_channels.cuh"
#include "kernels/delta/tensor_kernels.h"

namespace lsm::delta {

template <class Kernel>
void run(void (*kernel)(DeltaWork), DeltaWork const& work, int64_t blocks, void* stream) {
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_gradients(DeltaWork const& work, int64_t blocks, void* stream) {
    dispatch_form(work.p, [&](auto form) {
        dispatch_width<form>(work.p.K, [&](auto K) {
            if constexpr (form != Form::whole) {
                run<GradientsChannels<K, form>>(gradients_channels<K, form>, work, blocks, stream);
            } else if (work.p.erase.data != nullptr) {
                run<Gradients<K, true>>(gradients<K, true>, work, blocks, stream);
            } else {
                run<Gradients<K, false>>(gradients<K, false>, work, blocks, stream);
            }
        });
    });
}

}  // namespace lsm::delta
