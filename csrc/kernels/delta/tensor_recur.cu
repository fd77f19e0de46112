// The chain of states on tensor cores, and the pass that joins its pieces.
#include "kernels/delta/join.cuh"
#include "kernels/delta/recur.cuh"
#include "kernels/delta/tensor_kernels.h"

namespace lsm::delta {

template <int K, RecurKind Kind, Form form>
void run(DeltaWork const& work, int64_t blocks, void* stream) {
    using Kernel = Recur<K, Kind, form>;
    launch(recur<K, Kind, form>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, work);
}

void run_recur(DeltaWork const& work, bool states, int64_t blocks, void* stream) {
    dispatch_form(work.p, [&](auto form) {
        dispatch_width<form>(work.p.K, [&](auto K) {
            states ? run<K, RecurKind::states, form.value>(work, blocks, stream)
                   : run<K, RecurKind::output, form.value>(work, blocks, stream);
        });
    });
}

void run_join(DeltaWork const& work, bool reverse, int64_t chains, void* stream) {
    constexpr int kColumns = Join<false>::kColumns;
    int64_t const blocks = chains * ((work.p.V + kColumns - 1) / kColumns);
    launch(reverse ? join<true> : join<false>, dim3(static_cast<unsigned>(blocks)),
           dim3(Join<false>::kThreads), sizeof(typename Join<false>::SharedStorage), stream, work);
}

}  // namespace lsm::delta
