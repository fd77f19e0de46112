// Attention with polynomial weights (policy/features.h), for any type: the chunk engine's calls that have features.
#pragma once

#include "params/chunk.h"

namespace lsm {

int64_t polynomial_fwd_workspace(ChunkParams const& p);
int64_t polynomial_bwd_workspace(ChunkParams const& p);
void polynomial_fwd(ChunkParams const& p, void* workspace, void* stream);
void polynomial_bwd(ChunkParams const& p, void* workspace, void* stream);
void polynomial_step(StepParams const& p, void* stream);

}  // namespace lsm
