// The exact token-by-token recurrence on CUDA cores: any decay, any gate.
#pragma once

#include "params/chunk.h"

namespace lsm {

int64_t recurrence_fwd_workspace(ChunkParams const& p);
int64_t recurrence_bwd_workspace(ChunkParams const& p);
void recurrence_fwd(ChunkParams const& p, void* workspace, void* stream);
void recurrence_bwd(ChunkParams const& p, void* workspace, void* stream);

}  // namespace lsm
