// The decode step's instances: dtype, key channels, value channels of a block, how the state lies.
#include "kernels/dispatch.h"
#include "kernels/polynomial/launch.h"
#include "kernels/step/step.cuh"

namespace lsm {
namespace {

template <class T>
void step_typed(StepParams const& p, void* workspace, void* stream) {
    auto* const factors =
        p.normaliser.on ? static_cast<step_kernel::HeadFactors*>(workspace) : nullptr;
    if (factors != nullptr) step_kernel::run_normaliser<T>(p, factors, stream);
    bool const few = p.B * p.HV * ((p.V + 31) / 32) < multiprocessors();
    dispatch(Buckets<64, 128, 256>{}, p.K, [&](auto K) {
        dispatch(Buckets<16, 32>{}, few ? 16 : 32, [&](auto V) {
            if (p.values_first) {
                step_kernel::run_step<T, K, V, true>(p, factors, stream);
            } else {
                step_kernel::run_step<T, K, V, false>(p, factors, stream);
            }
        });
    });
}

}  // namespace

int64_t step_workspace(StepParams const& p) {
    return p.features != Features::none ? 0 : step_kernel::workspace_bytes(p);
}

void step(StepParams const& p, void* workspace, void* stream) {
    if (p.B == 0) return;
    if (p.features != Features::none) return polynomial_step(p, stream);
    switch (p.dtype) {
        case Dtype::bf16:
            return step_typed<bf16>(p, workspace, stream);
        case Dtype::f16:
            return step_typed<half>(p, workspace, stream);
        default:
            return step_typed<float>(p, workspace, stream);
    }
}

}  // namespace lsm
