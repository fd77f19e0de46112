// The decode step's instances: dtype, rows of the state, width of a block.
#include "kernels/delta/step.cuh"

#include "kernels/dispatch.h"

namespace lsm {
namespace {

template <class T>
void step_typed(DeltaStepParams const& p, void* stream) {
    bool const few = p.B * p.HV * ((p.V + 31) / 32) < multiprocessors();
    dispatch(Buckets<64, 128, 256>{}, p.K, [&](auto K) {
        if (few) {
            delta::decode::run_step<T, K, 16>(p, stream);
        } else {
            delta::decode::run_step<T, K, 32>(p, stream);
        }
    });
}

}  // namespace

void delta_step(DeltaStepParams const& p, void* stream) {
    if (p.B == 0) return;
    switch (p.dtype) {
        case Dtype::bf16:
            return step_typed<bf16>(p, stream);
        case Dtype::f16:
            return step_typed<half>(p, stream);
        default:
            return step_typed<float>(p, stream);
    }
}

}  // namespace lsm
