// The passes of a forward and a backward, for one type.
#pragma once

#include "kernels/delta/exact/plan.h"
#include "kernels/delta/exact/row_gradients.cuh"
#include "kernels/delta/exact/sweep.cuh"

namespace lsm::delta::exact {

// Rows of a [B, Tn, HV, V] scratch tensor.
inline Rows value_rows(DeltaParams const& p, float* data) {
    return {data, p.T * p.n * p.HV * p.V, p.HV * p.V, p.V};
}

template <class T>
SweepParams<T> sweep_params(DeltaParams const& p, Plan const& plan, bool reverse) {
    bool const householder = p.transition == Transition::householder;
    bool const dplr = p.transition == Transition::dplr;
    Rows const &dot = householder ? p.k : p.erase, &add = dplr ? p.write : p.k;
    SweepParams<T> s{};
    s.dot = reverse ? add : dot;
    if (!householder) s.add = reverse ? dot : add;
    if (reverse || dplr) s.plain = reverse ? p.q : p.k;
    if (!reverse && p.o.data != nullptr) s.read = p.q;
    if (reverse && dplr) s.read = p.k;
    s.value = reverse ? p.grad_o : p.v;
    s.out = reverse ? p.dv : p.o;
    s.written = value_rows(p, reverse ? plan.grad_written : plan.written);
    s.gates = decay_loader<T>(p), s.betas = beta_loader<T>(p);
    s.decays_key = householder;
    s.start = static_cast<float const*>(reverse ? p.grad_final_state : p.initial_state);
    s.end = static_cast<float*>(reverse ? p.grad_initial_state : p.final_state);
    s.boundaries = reverse ? plan.ends : plan.starts;
    s.heads_per_group = static_cast<int>(p.HV / p.H), s.HV = static_cast<int>(p.HV);
    s.K = static_cast<int>(p.K), s.V = static_cast<int>(p.V);
    s.per_token = static_cast<int>(p.n);
    float const scale = static_cast<float>(p.scale);
    s.value_scale = reverse ? scale : 1.f, s.out_scale = reverse ? 1.f : scale;
    return s;
}

template <class T>
RowParams<T> row_params(DeltaParams const& p, Plan const& plan) {
    RowParams<T> r{};
    r.transition = p.transition;
    r.q = p.q, r.k = p.k, r.v = p.v, r.erase = p.erase, r.write = p.write, r.grad_o = p.grad_o;
    r.written = value_rows(p, plan.written), r.grad_written = value_rows(p, plan.grad_written);
    r.dq = p.dq, r.dk = p.dk, r.derase = p.derase, r.dwrite = p.dwrite, r.dg = p.dg;
    r.fp32_key_grads = p.key_grad_dtype == Dtype::f32;
    r.gates = decay_loader<T>(p), r.betas = beta_loader<T>(p);
    r.beta_per_channel = p.beta_per_channel;
    r.gate_shares = plan.gate_shares;
    r.starts = plan.starts, r.ends = plan.ends;
    r.heads_per_group = static_cast<int>(p.HV / p.H), r.HV = static_cast<int>(p.HV);
    r.K = static_cast<int>(p.K), r.V = static_cast<int>(p.V);
    r.per_token = static_cast<int>(p.n);
    r.scale = static_cast<float>(p.scale);
    return r;
}

template <class T>
void run_forward(DeltaParams const& p, Plan const& plan, void* stream) {
    run_sweep<T, false>(sweep_params<T>(p, plan, false), plan.segments, stream);
}

// Window w of a backward.
inline DeltaParams in_window(DeltaParams const& call, Plan const& plan, i64 w) {
    i64 const begin = w * plan.window, end = begin + plan.window, last = plan.windows - 1;
    i64 const states = call.B * call.HV * call.K * call.V;
    DeltaParams p = plan.windows == 1 ? call : tokens(call, begin, w < last ? end : call.T);
    p.o = {}, p.final_state = nullptr;
    if (w > 0) p.initial_state = plan.carried + (w - 1) * states;
    if (w > 0) p.grad_initial_state = plan.grad_carried + w % 2 * states;
    if (w < last) p.grad_final_state = plan.grad_carried + (w + 1) % 2 * states;
    return p;
}

template <class T>
void run_backward(DeltaParams const& call, Plan const& plan, void* stream) {
    auto const segments_of = [&](DeltaParams const& p) {
        return plan.windows == 1 ? plan.segments : plan_segments(p, kSegment, nullptr, p.n);
    };
    for (i64 w = 0; w + 1 < plan.windows; ++w) {
        DeltaParams p = in_window(call, plan, w);
        p.final_state = plan.carried + w * p.B * p.HV * p.K * p.V;
        SweepParams<T> s = sweep_params<T>(p, plan, false);
        s.written = {}, s.boundaries = nullptr;
        run_sweep<T, false>(s, segments_of(p), stream);
    }
    i64 const gates = call.B * call.T * call.HV;
    for (i64 w = plan.windows - 1; w >= 0; --w) {
        DeltaParams const p = in_window(call, plan, w);
        Segments const segments = segments_of(p);
        run_sweep<T, false>(sweep_params<T>(p, plan, false), segments, stream);
        run_sweep<T, true>(sweep_params<T>(p, plan, true), segments, stream);
        RowParams<T> r = row_params<T>(p, plan);
        r.gate_share_size = gates;  // of all windows, added up after the first
        if (r.gate_shares != nullptr) r.gate_shares += w * plan.window * p.HV;
        run_row_gradients<T>(r, segments, stream);
        if (w == 0) {
            run_sum_gate_shares<T>({plan.gate_shares, static_cast<int>(row_tiles(p.K, p.V)), gates,
                                    p.HV, decay_loader<T>(call), call.dg},
                                   stream);
        }
        run_beta_gradient<T>(
            {plan.written, plan.grad_written, beta_loader<T>(p), p.dbeta, p.B * p.T * p.n * p.HV,
             p.T * p.n * p.HV, static_cast<int>(p.HV), static_cast<int>(p.V), p.beta_per_channel},
            stream);
    }
}

}  // namespace lsm::delta::exact
