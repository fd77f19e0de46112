// The passes of a forward and a backward, for one type.
#pragma once

#include <utility>

#include "kernels/chunk/join.cuh"
#include "kernels/dispatch.h"
#include "kernels/policy/decay.cuh"
#include "kernels/recurrence/plan.h"
#include "kernels/recurrence/row_gradients.cuh"
#include "kernels/recurrence/sweep.cuh"

namespace lsm::recurrence {

// The same recurrence of the transposed state, S^T = Diag(a) S^T + v k^T if decay is by value. What
// were sums over the state's rows, o and dv, are now sums over its columns and the other way about:
// dq comes out as o, dk as dv and dv as dk.
inline ChunkParams transpose(ChunkParams p) {
    std::swap(p.K, p.V);
    std::swap(p.k, p.v);
    std::swap(p.q, p.grad_o);
    std::swap(p.dk, p.dv);
    std::swap(p.dq, p.o);
    return p;
}

template <class T>
class Passes {
  public:
    Passes(ChunkParams const& call, Plan const& plan, bool transposed, void* stream)
        : call_(call),
          p_(transposed ? transpose(call) : call),
          plan_(plan),
          gates_(gate_loaders<T>(call)),
          gate_gradients_(by_side(call.decay, call.dg, call.dgv)),
          transposed_(transposed),
          stream_(stream) {
        if (!transposed) return;
        std::swap(gates_.rows, gates_.columns);
        std::swap(gate_gradients_.rows, gate_gradients_.columns);
    }

    // o and the final state, in reverse dv and the gradient of the initial state; or what they are
    // of the transposed state.
    template <DecayOn on>
    void sweep(bool reverse) const {
        run<false, on>(params(reverse));
    }

    // Computes what every segment starts from, if there is more than one per sequence.
    template <DecayOn on>
    void join_boundaries(bool reverse) const {
        Boundary const& boundary = reverse ? plan_.reverse : plan_.forward;
        if (boundary.states == nullptr) return;
        SweepParams<T> local = params(reverse);
        local.end = states(boundary.states, true);
        local.gate_sum = boundary.gate_sums;
        run<true, on>(local);
        auto const* const initial =
            static_cast<float const*>(reverse ? call_.grad_final_state : call_.initial_state);
        run_join({boundary.states, boundary.gate_sums, initial, static_cast<int>(call_.HV),
                  static_cast<int>(call_.K), static_cast<int>(call_.V),
                  static_cast<int>(gates_per_token(call_.decay, call_.K, call_.V)), call_.decay,
                  reverse},
                 plan_.segments, stream_);
    }

    // dq, dk and the gradient of gates of rows; or the last alone.
    template <DecayOn on>
    void row_gradients(bool gates_alone = false) const {
        if (gates_alone && gate_gradients_.rows.data == nullptr) return;
        RowParams<T> r{};
        r.q = p_.q, r.k = p_.k, r.v = p_.v, r.grad_o = p_.grad_o;
        r.gates = gates_, r.dg = gate_gradients_.rows;
        if (!gates_alone) r.dq = p_.dq, r.dk = p_.dk;
        r.gate_shares = plan_.gate_shares, r.gate_share_size = p_.B * p_.T * p_.HV;
        r.start = start(false), r.end = start(true);
        r.groups = groups();
        r.HV = static_cast<int>(p_.HV), r.K = static_cast<int>(p_.K), r.V = static_cast<int>(p_.V);
        r.exclusive = p_.exclusive;
        r.scale = static_cast<float>(p_.scale);
        run_row_gradients<T, on>(r, plan_.segments, stream_);
    }

  private:
    States states(void const* data, bool per_record) const {
        return {static_cast<float*>(const_cast<void*>(data)), per_record,
                transposed_ ? 1 : static_cast<int>(p_.V), transposed_ ? static_cast<int>(p_.K) : 1};
    }

    // What segments start from in either order: joined boundaries, or what the caller gave.
    States start(bool reverse) const {
        Boundary const& boundary = reverse ? plan_.reverse : plan_.forward;
        if (boundary.states != nullptr) return states(boundary.states, true);
        return states(reverse ? p_.grad_final_state : p_.initial_state, false);
    }

    Groups groups() const {
        int const shared = static_cast<int>(p_.HV / p_.H);
        return transposed_ ? Groups{1, shared} : Groups{shared, 1};
    }

    SweepParams<T> params(bool reverse) const {
        SweepParams<T> s{};
        s.query = reverse ? p_.k : p_.q, s.key = reverse ? p_.q : p_.k;
        s.value = reverse ? p_.grad_o : p_.v, s.out = reverse ? p_.dv : p_.o;
        s.gates = gates_;
        for (Rows* const x :
             {&s.query, &s.key, &s.value, &s.out, &s.gates.rows.g, &s.gates.columns.g})
            if (reverse) x->time = -x->time;
        s.start = start(reverse);
        s.end = states(reverse ? p_.grad_initial_state : p_.final_state, false);
        s.groups = groups();
        s.HV = static_cast<int>(p_.HV), s.K = static_cast<int>(p_.K), s.V = static_cast<int>(p_.V);
        s.gate_sums = static_cast<int>(gates_per_token(call_.decay, call_.K, call_.V));
        s.row_sums = s.gate_sums;
        if (!transposed_ && decays_values(call_.decay)) s.row_sums -= s.V;
        s.reverse = reverse;
        s.decay_lag = reverse || p_.exclusive, s.write_lag = p_.exclusive;
        float const scale = static_cast<float>(p_.scale);
        s.value_scale = reverse ? scale : 1.f, s.out_scale = reverse ? 1.f : scale;
        return s;
    }

    template <bool Local, DecayOn on>
    void run(SweepParams<T> const& s) const {
        dispatch(Buckets<64, 128, 256>{}, s.K,
                 [&](auto K) { run_sweep<T, K, Local, on>(s, plan_.segments, stream_); });
    }

    ChunkParams const call_, p_;  // the call; as the kernels see it
    Plan const& plan_;
    BySide<GateLoader<T>> gates_;
    BySide<Rows> gate_gradients_;
    bool const transposed_;
    void* const stream_;
};

template <class T>
void run_forward(ChunkParams const& p, Plan const& plan, void* stream) {
    bool const by_value = p.decay == Decay::value;
    Passes<T>(p, plan, by_value, stream).template join_boundaries<DecayOn::rows>(false);
    Passes<T> const passes(p, plan, false, stream);
    by_value ? passes.template sweep<DecayOn::columns>(false)
             : passes.template sweep<DecayOn::rows>(false);
}

template <class T>
void run_backward(ChunkParams const& p, Plan const& plan, void* stream) {
    bool const by_value = p.decay == Decay::value;
    Passes<T> const passes(p, plan, by_value, stream);
    passes.template join_boundaries<DecayOn::rows>(false);
    passes.template join_boundaries<DecayOn::rows>(true);
    if (by_value) passes.template sweep<DecayOn::rows>(false);  // dq
    passes.template sweep<DecayOn::rows>(true);                 // dv, or dk
    passes.template row_gradients<DecayOn::rows>();
}

template <class T>
void run_either_side_forward(ChunkParams const& p, Plan const& plan, void* stream) {
    Passes<T> const passes(p, plan, false, stream);
    passes.template join_boundaries<DecayOn::both>(false);
    passes.template sweep<DecayOn::both>(false);
}

template <class T>
void run_either_side_backward(ChunkParams const& p, Plan const& plan, void* stream) {
    Passes<T> const passes(p, plan, false, stream);
    passes.template join_boundaries<DecayOn::both>(false);
    passes.template join_boundaries<DecayOn::both>(true);
    passes.template sweep<DecayOn::both>(true);      // dv
    passes.template row_gradients<DecayOn::both>();  // dq, dk, gates of keys
    Passes<T>(p, plan, true, stream).template row_gradients<DecayOn::both>(true);  // of values
}

}  // namespace lsm::recurrence
