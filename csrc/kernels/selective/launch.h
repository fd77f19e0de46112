// The selective scan's launchers by element type; selective.cu picks one. Plain C++.
#pragma once

#include "params/selective_scan.h"

namespace lsm::selective_kernel {

enum class Direction { forward, backward };

// One per file selective_*.cu, so that they compile in parallel. A null workspace: only counts its bytes.
int64_t launch_bf16(SelectiveParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_f16(SelectiveParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_f32(SelectiveParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_complex(SelectiveParams const& p, Direction direction, void* workspace,
                       void* stream);

}  // namespace lsm::selective_kernel
