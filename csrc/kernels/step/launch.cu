// The decode step's instances: dtype, gate dtype, rows of the state, width of a block.
#include "kernels/dispatch.h"
#include "kernels/policy/decay.cuh"
#include "kernels/step/step.cuh"

namespace lsm {
namespace {

template <class T, class Gate>
void step_typed(StepParams const& p, void* stream) {
    VectorDecay<Gate> const gate{p.g};
    bool const few = p.B * p.HV * ((p.V + 31) / 32) < multiprocessors();
    dispatch(Buckets<64, 128, 256>{}, p.K, [&](auto K) {
        if (few) {
            step_kernel::run_step<T, K, 16>(p, gate, stream);
        } else {
            step_kernel::run_step<T, K, 32>(p, gate, stream);
        }
    });
}

}  // namespace

void step(StepParams const& p, void* stream) {
    if (p.B == 0) return;
    bool const wide_gate = p.gate_dtype == Dtype::f32;
    switch (p.dtype) {
        case Dtype::bf16:
            return wide_gate ? step_typed<bf16, float>(p, stream)
                             : step_typed<bf16, bf16>(p, stream);
        case Dtype::f16:
            return wide_gate ? step_typed<half, float>(p, stream)
                             : step_typed<half, half>(p, stream);
        default:
            return step_typed<float, float>(p, stream);
    }
}

}  // namespace lsm
