// The exact recurrence's entry points: memory handed out, types dispatched.
#include "kernels/delta/exact/launch.h"

#include "kernels/delta/exact/plan.h"
#include "kernels/delta/exact/row_gradients.cuh"

namespace lsm {
namespace delta::exact {

Plan::Plan(DeltaParams const& p, bool backward, void* workspace) {
    i64 const L = backward ? kSegment : p.T * p.n;
    auto take = [&](i64 size) {
        char* const at = static_cast<char*>(workspace) + bytes;
        bytes += (size + 255) / 256 * 256;
        return static_cast<void*>(at);
    };
    auto floats = [&](i64 count) { return static_cast<float*>(take(count * i64(sizeof(float)))); };
    segments = plan_segments(p, L, take(segments_bytes(p, L, p.n)), p.n);
    if (!backward) return;
    starts = floats(segments.count * p.HV * p.K * p.V);
    ends = floats(segments.count * p.HV * p.K * p.V);
    written = floats(p.B * p.T * p.n * p.HV * p.V);
    grad_written = floats(p.B * p.T * p.n * p.HV * p.V);
    if (p.decay == Decay::scalar && p.dg.data != nullptr)
        gate_shares = floats(row_tiles(p.K, p.V) * p.B * p.T * p.HV);
}

// Calls f with a value of the element type.
template <class F>
void dispatch_type(DeltaParams const& p, F const& f) {
    if (p.dtype == Dtype::f32) return f(float{});
    if (p.dtype == Dtype::f16) return f(half{});
    return f(bf16{});
}

}  // namespace delta::exact

using namespace delta::exact;

int64_t exact_fwd_workspace(DeltaParams const& p) {
    return Plan(p, false, nullptr).bytes;
}
int64_t exact_bwd_workspace(DeltaParams const& p) {
    return Plan(p, true, nullptr).bytes;
}

void exact_fwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan const plan(p, false, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    dispatch_type(p, [&](auto x) { run_forward<decltype(x)>(p, plan, stream); });
}

void exact_bwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    dispatch_type(p, [&](auto x) { run_backward<decltype(x)>(p, plan, stream); });
}

}  // namespace lsm
