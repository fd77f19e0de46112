// The delta engine on CUDA.
#include "params/delta.h"

#include <stdexcept>

namespace lsm {

int64_t delta_fwd_workspace(DeltaParams const&) {
    throw std::runtime_error("the delta engine has no CUDA kernels yet");
}
int64_t delta_bwd_workspace(DeltaParams const&) {
    throw std::runtime_error("the delta engine has no CUDA kernels yet");
}
void delta_fwd(DeltaParams const&, void*, void*) {}
void delta_bwd(DeltaParams const&, void*, void*) {}
void delta_step(DeltaStepParams const&, void*) {
    throw std::runtime_error("the delta engine has no CUDA kernels yet");
}

}  // namespace lsm
