// The passes of a forward and a backward, for one pair of types.
#pragma once

#include <utility>

#include "kernels/chunk/join.cuh"
#include "kernels/dispatch.h"
#include "kernels/policy/decay.cuh"
#include "kernels/recurrence/plan.h"
#include "kernels/recurrence/row_gradients.cuh"
#include "kernels/recurrence/sweep.cuh"

namespace lsm::recurrence {

inline States per_sequence(void const* data) {
    return {static_cast<float*>(const_cast<void*>(data)), false};
}

inline SweepParams forward_params(ChunkParams const& p) {
    SweepParams s{};
    s.query = p.q, s.key = p.k, s.value = p.v, s.out = p.o;
    s.start = per_sequence(p.initial_state), s.end = per_sequence(p.final_state);
    s.HV = static_cast<int>(p.HV), s.heads_per_group = static_cast<int>(p.HV / p.H);
    s.K = static_cast<int>(p.K), s.V = static_cast<int>(p.V);
    s.value_scale = 1.f, s.out_scale = static_cast<float>(p.scale);
    return s;
}

inline SweepParams reverse_params(ChunkParams const& p) {
    SweepParams s = forward_params(p);
    s.query = p.k, s.key = p.q, s.value = p.grad_o, s.out = p.dv;
    s.start = per_sequence(p.grad_final_state), s.end = per_sequence(p.grad_initial_state);
    std::swap(s.value_scale, s.out_scale);
    return s;
}

template <class T, Walk walk, bool Local, class Decay>
void sweep_over_k(SweepParams const& s, Decay const& gate, Segments const& segments, void* stream) {
    dispatch(Buckets<64, 128, 256>{}, s.K,
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

template <class T, class Gate>
void run_forward(ChunkParams const& p, Plan const& plan, void* stream) {
    VectorDecay<Gate> const gate{p.g};
    SweepParams s = forward_params(p);
    join_boundaries<T, Walk::forward>(s, plan.forward, gate, plan.segments, stream);
    sweep_over_k<T, Walk::forward, false>(s, gate, plan.segments, stream);
}

template <class T, class Gate>
void run_backward(ChunkParams const& p, Plan const& plan, void* stream) {
    VectorDecay<Gate> const gate{p.g};
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

}  // namespace lsm::recurrence
