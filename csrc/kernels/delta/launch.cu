// The delta engine on CUDA: tensor cores where they take the call, else the exact recurrence.
#include "kernels/delta/exact/launch.h"
#include "kernels/delta/tensor.h"

namespace lsm {

int64_t delta_fwd_workspace(DeltaParams const& p) {
    return tensor_cores_take(p) ? tensor_fwd_workspace(p) : exact_fwd_workspace(p);
}

int64_t delta_bwd_workspace(DeltaParams const& p) {
    return tensor_cores_take(p) ? tensor_bwd_workspace(p) : exact_bwd_workspace(p);
}

void delta_fwd(DeltaParams const& p, void* workspace, void* stream) {
    (tensor_cores_take(p) ? tensor_fwd : exact_fwd)(p, workspace, stream);
}

void delta_bwd(DeltaParams const& p, void* workspace, void* stream) {
    (tensor_cores_take(p) ? tensor_bwd : exact_bwd)(p, workspace, stream);
}

}  // namespace lsm
