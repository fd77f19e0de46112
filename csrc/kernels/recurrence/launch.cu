// The recurrence's entry points: time is cut, memory handed out, types dispatched.
#include "kernels/recurrence/launch.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/recurrence/plan.h"

namespace lsm {
namespace recurrence {

constexpr i64 kLeastSegment = 64;  // tokens; below that the join costs more than it frees

Plan::Plan(ChunkParams const& p, bool backward, void* workspace) {
    // About eight warps of a sweep keep a multiprocessor busy; a sweep has K threads. Packed
    // sequences: one row.
    i64 const tiles = (p.V + kSweepColumns - 1) / kSweepColumns;
    i64 const chains = (p.cu_seqlens != nullptr ? 1 : p.B) * p.HV * tiles;
    i64 const slots = multiprocessors() * (256 / std::max<i64>(p.K, 64));
    i64 L = segment_length(p.T, chains, slots, kLeastSegment);
    if (backward) L = std::min<i64>(L, kRowSegment);
    bool const cut = L < p.T;  // sequences may have several segments

    auto take = [&](i64 size) {
        char* const at = static_cast<char*>(workspace) + bytes;
        bytes += (size + 255) / 256 * 256;
        return static_cast<void*>(at);
    };
    segments = plan_segments(p, L, take(segments_bytes(p, L)));
    i64 const rows = segments.count * p.HV * p.K * static_cast<i64>(sizeof(float));
    for (Boundary* const boundary : {&forward, &reverse}) {
        if (!cut || (boundary == &reverse && !backward)) continue;
        boundary->states = static_cast<float*>(take(rows * p.V));
        boundary->gate_sums = static_cast<float*>(take(rows));
    }
}

// Calls f with a value of the element type and one of the gate's.
template <class F>
void dispatch_types(ChunkParams const& p, F const& f) {
    if (p.dtype == Dtype::f32) return f(float{}, float{});
    if (p.dtype != Dtype::f16) {
        throw std::logic_error("lsm: the recurrence is compiled for float16 and float32");
    }
    if (p.gate_dtype == Dtype::f32) return f(half{}, float{});
    f(half{}, half{});
}

}  // namespace recurrence

using namespace recurrence;

int64_t recurrence_fwd_workspace(ChunkParams const& p) {
    return Plan(p, false, nullptr).bytes;
}
int64_t recurrence_bwd_workspace(ChunkParams const& p) {
    return Plan(p, true, nullptr).bytes;
}

void recurrence_fwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, false, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    dispatch_types(p, [&](auto element, auto gate) {
        run_forward<decltype(element), decltype(gate)>(p, plan, stream);
    });
}

void recurrence_bwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    dispatch_types(p, [&](auto element, auto gate) {
        run_backward<decltype(element), decltype(gate)>(p, plan, stream);
    });
}

}  // namespace lsm
