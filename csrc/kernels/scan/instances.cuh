// The passes of one element type.
#pragma once

#include "kernels/scan/launch.h"
#include "kernels/scan/passes.cuh"

namespace lsm::scan_kernel {

template <class T>
int64_t launch_typed(ScanParams const& p, Direction direction, void* workspace, void* stream) {
    bool const forward = direction == Direction::forward;
    if (p.kind == Scan::constant) {
        return forward ? run_pass<ConstantForward<T>>(p, workspace, stream)
                       : run_pass<ConstantBackward<T>>(p, workspace, stream);
    }
    if constexpr (!std::is_same_v<T, Complex>) {
        if (p.kind == Scan::rg_lru) {
            return forward ? run_pass<RgLruForward<T>>(p, workspace, stream)
                           : run_pass<RgLruBackward<T>>(p, workspace, stream);
        }
    }
    if constexpr (sizeof(T) == 2) {
        if (p.gate_dtype == Dtype::f32) {
            return forward ? run_pass<GateForward<T, float>>(p, workspace, stream)
                           : run_pass<GateBackward<T, float>>(p, workspace, stream);
        }
    }
    return forward ? run_pass<GateForward<T, T>>(p, workspace, stream)
                   : run_pass<GateBackward<T, T>>(p, workspace, stream);
}

}  // namespace lsm::scan_kernel
