// The reverse chain on tensor cores.
#include "kernels/delta/reverse.cuh"
#include "kernels/delta/tensor_backward.h"
#include "kernels/dispatch.h"

namespace lsm::delta {

template <int K, bool Channels>
void run(DeltaWork const& work, int64_t blocks, void* stream) {
    using Kernel = Reverse<K, Channels>;
    launch(reverse<K, Channels>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_reverse(DeltaWork const& work, int64_t blocks, void* stream) {
    dispatch(Buckets<64, 128>{}, work.p.K, [&](auto K) {
        work.p.decay == Decay::key ? run<K, true>(work, blocks, stream)
                                   : run<K, false>(work, blocks, stream);
    });
}

}  // namespace lsm::delta
