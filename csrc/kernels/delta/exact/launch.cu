// The exact recurrence's entry points: memory handed out, types dispatched.
#include "kernels/delta/exact/launch.h"

#include <algorithm>

#include "kernels/delta/cuts.cuh"
#include "kernels/delta/exact/plan.h"
#include "kernels/delta/exact/row_gradients.cuh"

namespace lsm {
namespace delta::exact {

constexpr i64 kLeastWindow = 1024;  // tokens

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
    i64 const state = p.HV * p.K * p.V;
    auto const values = [&] { return p.B * window * p.n * p.HV * p.V; };
    window = p.T > 1 ? p.T : 1;
    if (p.cu_seqlens == nullptr) {
        i64 const whole = 2 * i64(sizeof(float)) * (segments.count * state + values());
        window = ceil_div(window_of(window, kLeastWindow, whole), kSegment) * kSegment;
        if (window >= p.T) window = p.T > 1 ? p.T : 1;
        windows = std::max<i64>(1, ceil_div(p.T, window));
    }
    if (windows > 1) {
        segments = plan_segments(tokens(p, 0, window), L, nullptr, p.n);
        carried = floats((windows - 1) * p.B * state);
        grad_carried = floats(2 * p.B * state);
    }
    starts = floats(segments.count * state);
    ends = floats(segments.count * state);
    written = floats(values());
    grad_written = floats(values());
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
