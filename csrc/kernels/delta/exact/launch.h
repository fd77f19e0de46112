// The exact recurrence of the delta engine on CUDA cores: every transition, type, size and gate.
#pragma once

#include "params/delta.h"

namespace lsm {

int64_t exact_fwd_workspace(DeltaParams const& p);
int64_t exact_bwd_workspace(DeltaParams const& p);
void exact_fwd(DeltaParams const& p, void* workspace, void* stream);
void exact_bwd(DeltaParams const& p, void* workspace, void* stream);

}  // namespace lsm
