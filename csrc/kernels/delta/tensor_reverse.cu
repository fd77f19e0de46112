// The reverse chain on tensor cores.
#include "kernels/delta/reverse.cuh"
#include "kernels/delta/tensor_kernels.h"

namespace lsm::delta {

template <int K, Form form>
void run(DeltaWork const& work, int64_t blocks, void* stream) {
    using Kernel = Reverse<K, form>;
    launch(reverse<K, form>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_reverse(DeltaWork const& work, int64_t blocks, void* stream) {
    dispatch_form(work.p, [&](auto form) {
        dispatch_width<form>(work.p.K, [&](auto K) { run<K, form.value>(work, blocks, stream); });
    });
}

}  // namespace lsm::delta
