// The recurrence's passes: how time is cut, the workspace, and which kernels make a forward and a
// backward.
//
// Forward: one sweep where whole sequences fill the card; else what each segment leaves from zero,
// the join of segments, and the sweep of all segments at once. Backward: segments of at most
// kRowSegment tokens always, joined in both directions, then dv and the gradient of the initial
// state by columns, dq, dk and dg by rows.
#include "kernels/recurrence/launch.h"

#include <algorithm>

#include "kernels/chunk/join.cuh"
#include "kernels/dispatch.h"
#include "kernels/policy/decay.cuh"
#include "kernels/recurrence/row_gradients.cuh"
#include "kernels/recurrence/sweep.cuh"

namespace lsm {
namespace {

using namespace recurrence;

constexpr i64 kLeastSegment = 64;  // tokens; below that the join costs more than it frees

// Boundary states of all segments in one direction; null where sequences are not cut.
struct Boundary {
    float* states = nullptr;     // [records, HV, K, V]
    float* gate_sums = nullptr;  // [records, HV, K], log2
};

struct Plan {
    bool cut;  // sequences may have several segments
    Segments segments;
    Boundary forward, reverse;
    i64 bytes = 0;

    Plan(ChunkParams const& p, bool backward, void* workspace) {
        // About eight warps of a sweep keep a multiprocessor busy; a sweep has K threads. Packed
        // sequences: one row.
        i64 const chains = (p.cu_seqlens != nullptr ? 1 : p.B) * p.HV * sweep_tiles(p.V);
        i64 const slots = multiprocessors() * (256 / std::max<i64>(p.K, 32));
        i64 L = segment_length(p.T, chains, slots, kLeastSegment);
        if (backward) L = std::min<i64>(L, kRowSegment);
        cut = L < p.T;

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
};

States per_sequence(void const* data) {
    return {static_cast<float*>(const_cast<void*>(data)), false};
}

SweepParams forward_params(ChunkParams const& p) {
    SweepParams s{};
    s.query = p.q, s.key = p.k, s.value = p.v, s.out = p.o;
    s.start = per_sequence(p.initial_state), s.end = per_sequence(p.final_state);
    s.HV = static_cast<int>(p.HV), s.heads_per_group = static_cast<int>(p.HV / p.H);
    s.K = static_cast<int>(p.K), s.V = static_cast<int>(p.V);
    s.value_scale = 1.f, s.out_scale = static_cast<float>(p.scale);
    return s;
}

SweepParams reverse_params(ChunkParams const& p) {
    SweepParams s = forward_params(p);
    s.query = p.k, s.key = p.q, s.value = p.grad_o, s.out = p.dv;
    s.start = per_sequence(p.grad_final_state), s.end = per_sequence(p.grad_initial_state);
    std::swap(s.value_scale, s.out_scale);
    return s;
}

template <class T, Walk walk, bool Local, class Decay>
void sweep_over_k(SweepParams const& s, Decay const& gate, Segments const& segments, void* stream) {
    dispatch(Buckets<32, 64, 128, 256>{}, s.K,
             [&](auto K) { run_sweep<T, K, walk, Local>(s, gate, segments, stream); });
}

// Points s.start at what every segment starts from, computing it first if there is more than one
// per sequence.
template <class T, Walk walk, class Decay>
void join_boundaries(SweepParams& s, Boundary const& boundary, Decay const& gate,
                     Segments const& segments, void* stream) {
    if (boundary.states == nullptr) return;
    SweepParams local = s;
    local.end = {boundary.states, true};
    local.gate_sum = boundary.gate_sums;
    sweep_over_k<T, walk, true>(local, gate, segments, stream);
    run_join(
        {boundary.states, boundary.gate_sums, s.start.data, s.HV, s.K, s.V, walk == Walk::reverse},
        segments, stream);
    s.start = {boundary.states, true};
}

template <class T, class Decay>
void forward(ChunkParams const& p, Plan const& plan, Decay const& gate, void* stream) {
    SweepParams s = forward_params(p);
    join_boundaries<T, Walk::forward>(s, plan.forward, gate, plan.segments, stream);
    sweep_over_k<T, Walk::forward, false>(s, gate, plan.segments, stream);
}

template <class T, class Decay>
void backward(ChunkParams const& p, Plan const& plan, Decay const& gate, void* stream) {
    SweepParams s = forward_params(p), d = reverse_params(p);
    join_boundaries<T, Walk::forward>(s, plan.forward, gate, plan.segments, stream);
    join_boundaries<T, Walk::reverse>(d, plan.reverse, gate, plan.segments, stream);
    sweep_over_k<T, Walk::reverse, false>(d, gate, plan.segments, stream);
    RowParams r{};
    r.q = p.q, r.k = p.k, r.v = p.v, r.grad_o = p.grad_o, r.dq = p.dq, r.dk = p.dk, r.dg = p.dg;
    r.start = s.start, r.end = d.start;
    r.HV = s.HV, r.heads_per_group = s.heads_per_group, r.K = s.K, r.V = s.V;
    r.scale = static_cast<float>(p.scale);
    dispatch(Buckets<64, 128, 256>{}, p.V,
             [&](auto V) { run_row_gradients<T, V>(r, gate, plan.segments, stream); });
}

}  // namespace

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
    forward<float>(p, plan, VectorDecay<float>{p.g}, stream);
}

void recurrence_bwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.segments.count == 0) return;
    build_segments(p, plan.segments, stream);
    backward<float>(p, plan, VectorDecay<float>{p.g}, stream);
}

}  // namespace lsm
