// The recurrence's entry points: time is cut, memory handed out, types dispatched.
#include "kernels/recurrence/launch.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/recurrence/plan.h"
#include "kernels/recurrence/row_gradients.cuh"

namespace lsm {
namespace recurrence {

constexpr i64 kLeastSegment = 64;  // tokens; below that the join costs more than it frees

Plan::Plan(ChunkParams const& p, bool backward, void* workspace) {
    // About eight warps of a sweep keep a multiprocessor busy; a sweep has a thread per row. Packed
    // sequences: one row of tokens.
    bool const transposed = backward && p.decay == Decay::value && !either_side(p);
    i64 const rows = transposed ? p.V : p.K, columns = transposed ? p.K : p.V;
    i64 const tiles = (columns + kSweepColumns - 1) / kSweepColumns;
    i64 const chains = (p.cu_seqlens != nullptr ? 1 : p.B) * p.HV * tiles;
    i64 const slots = multiprocessors() * (256 / std::max<i64>(rows, 64));
    i64 L = segment_length(p.T, chains, slots, kLeastSegment);
    i64 const most = !backward        ? i64(1) << 30  // steps are counted in 32 bits
                     : either_side(p) ? kRowSegmentOfBoth
                                      : kRowSegment;
    L = std::min(L, most);
    bool const cut = L < p.T;  // sequences may have several segments

    auto take = [&](i64 size) {
        char* const at = static_cast<char*>(workspace) + bytes;
        bytes += (size + 255) / 256 * 256;
        return static_cast<void*>(at);
    };
    segments = plan_segments(p, L, take(segments_bytes(p, L)));
    auto floats = [&](i64 count) { return static_cast<float*>(take(count * i64(sizeof(float)))); };
    i64 const owners = segments.count * p.HV;
    for (Boundary* const boundary : {&forward, &reverse}) {
        if (!cut || (boundary == &reverse && !backward)) continue;
        boundary->states = floats(owners * p.K * p.V);
        boundary->gate_sums = floats(owners * gates_per_token(p.decay, p.K, p.V));
    }
    if (backward && p.decay == Decay::scalar && p.dg.data != nullptr)
        gate_shares = floats(row_tiles(p.K, p.V) * p.B * p.T * p.HV);
}

// Calls f with a value of the element type, or either_side where the call needs those kernels.
template <class F, class Either>
void dispatch_type(ChunkParams const& p, F const& f, Either const& either) {
    if (p.dtype == Dtype::bf16) return either(bf16{});
    if (p.dtype == Dtype::f16) return either_side(p) ? either(half{}) : f(half{});
    if (p.dtype == Dtype::f32) return either_side(p) ? either(float{}) : f(float{});
    throw std::logic_error("lsm: the recurrence is compiled for bfloat16, float16 and float32");
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
    dispatch_type(
        p, [&](auto x) { run_forward<decltype(x)>(p, plan, stream); },
        [&](auto x) { run_either_side_forward<decltype(x)>(p, plan, stream); });
}

void recurrence_bwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    dispatch_type(
        p, [&](auto x) { run_backward<decltype(x)>(p, plan, stream); },
        [&](auto x) { run_either_side_backward<decltype(x)>(p, plan, stream); });
}

}  // namespace lsm
