// The delta engine on CUDA: tensor cores where they take the call, else the exact recurrence.
#include "kernels/delta/exact/launch.h"
#include "kernels/delta/tensor.h"

namespace lsm {
namespace {

// Of keys with 8 channels, or of fewer than 8 rows, most of the narrowest tile would be padding;
// and a gate's gradient of one token is a single sum over states that were rounded to bf16.
bool on_tensor_cores(DeltaParams const& p) {
    return p.K > 8 && p.T * p.n >= 8 && tensor_cores_take(p);
}

}  // namespace

int64_t delta_fwd_workspace(DeltaParams const& p) {
    return on_tensor_cores(p) ? tensor_fwd_workspace(p) : exact_fwd_workspace(p);
}

int64_t delta_bwd_workspace(DeltaParams const& p) {
    return on_tensor_cores(p) ? tensor_bwd_workspace(p) : exact_bwd_workspace(p);
}

void delta_fwd(DeltaParams const& p, void* workspace, void* stream) {
    (on_tensor_cores(p) ? tensor_fwd : exact_fwd)(p, workspace, stream);
}

void delta_bwd(DeltaParams const& p, void* workspace, void* stream) {
    (on_tensor_cores(p) ? tensor_bwd : exact_bwd)(p, workspace, stream);
}

}  // namespace lsm
