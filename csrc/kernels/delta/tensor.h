// The delta engine on tensor cores: bf16, in chunks (docs/kernels/delta.md). What it does not take,
// the exact recurrence on CUDA cores does.
#pragma once

#include "params/delta.h"

namespace lsm {

bool tensor_cores_take(DeltaParams const& p);

int64_t tensor_fwd_workspace(DeltaParams const& p);
int64_t tensor_bwd_workspace(DeltaParams const& p);
void tensor_fwd(DeltaParams const& p, void* workspace, void* stream);
void tensor_bwd(DeltaParams const& p, void* workspace, void* stream);

}  // namespace lsm
