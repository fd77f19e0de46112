// The passes of one element type.
#pragma once

#include "kernels/scan/launch.h"
#include "kernels/scan/passes.cuh"

namespace lsm::scan_kernel {

template <class P>
int64_t run_pass(ScanParams const& p, void* workspace, void* stream) {
    if (workspace == nullptr) return Plan<P>(p, nullptr).bytes;
    run_stream<P>(p, workspace, stream);
    if constexpr (P::kChannelSums > 0) {
        using V = typename P::V;
        Plan<P> const plan(p, workspace);
        if (p.channel_grad != nullptr) {
            launch(add_shares<V>, dim3(static_cast<unsigned>((p.D + 127) / 128)), dim3(128), 0,
                   stream, plan.segments, static_cast<V const*>(plan.partial),
                   static_cast<V*>(p.channel_grad), p.D);
        }
    }
    return 0;
}

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
