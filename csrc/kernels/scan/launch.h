// The scan engine's launchers by element type; scan.cu picks one. Plain C++.
#pragma once

#include "params/scan.h"

namespace lsm::scan_kernel {

enum class Direction { forward, backward };

// One per file scan_*.cu, so that they compile in parallel. A null workspace: only counts its bytes.
int64_t launch_bf16(ScanParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_f16(ScanParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_f32(ScanParams const& p, Direction direction, void* workspace, void* stream);
int64_t launch_complex(ScanParams const& p, Direction direction, void* workspace, void* stream);

}  // namespace lsm::scan_kernel
