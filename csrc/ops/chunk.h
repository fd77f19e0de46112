// What the chunk engine's operators share: their arguments checked and in the layout of the kernels.
#pragma once

#include "ops/layout.h"
#include "params/operators.h"

namespace lsm {
namespace {

// An operator's gates, of which it has none, g, or g and gv. What one of them acts on is a Decay of its own.
struct Gates {
    OptionalTensor g, gv;

    template <class F>
    Gates map(Decay decay, F const& f) const {
        Gates to;
        if (g) to.g = f(decay == Decay::both ? Decay::key : decay, *g);
        if (gv) to.gv = f(Decay::value, *gv);
        return to;
    }
};

inline void check_gate(Checks const& c, Decay decay, char const* arg, Tensor const& g,
                       Tensor const& q, Tensor const& v, bool one_token) {
    int64_t const B = q.size(0), T = one_token ? 0 : q.size(1), HV = v.size(v.dim() - 2);
    int64_t const channels = decay == Decay::value ? v.size(v.dim() - 1) : q.size(q.dim() - 1);
    if (decay == Decay::scalar) {
        if (one_token) {
            c.shape(g, arg, "[B, HV]", {B, HV});
        } else {
            c.shape(g, arg, "[B, T, HV]", {B, T, HV});
        }
    } else if (one_token) {
        c.shape(g, arg, decay == Decay::value ? "[B, HV, V]" : "[B, HV, K]", {B, HV, channels});
    } else {
        c.shape(g, arg, decay == Decay::value ? "[B, T, HV, V]" : "[B, T, HV, K]",
                {B, T, HV, channels});
    }
    check_gate_type(c, g, arg, q);
}

inline void check_inputs(Checks const& c, Decay decay, Tensor const& q, Tensor const& k,
                         Tensor const& v, Gates const& gates, bool one_token,
                         bool any_size = false) {
    char const* const q_dims = one_token ? "[B, H, K]" : "[B, T, H, K]";
    char const* const v_dims = one_token ? "[B, HV, V]" : "[B, T, HV, V]";
    int64_t const rank = one_token ? 3 : 4;
    c.rank(q, "q", q_dims, rank);
    check_floating(c, q);
    c.rank(k, "k", q_dims, rank);
    c.require(k.size(rank - 1) == q.size(rank - 1), "k must have K = ", q.size(rank - 1),
              " like q, got K = ", k.size(rank - 1));
    c.require(k.size(rank - 2) == q.size(rank - 2), "k must have H = ", q.size(rank - 2),
              " heads like q, got ", k.size(rank - 2));
    c.require(show(k.sizes()) == show(q.sizes()), "k must have shape ", q_dims, " = ",
              show(q.sizes()), " (like q), got ", show(k.sizes()));
    c.rank(v, "v", v_dims, rank);
    c.require(v.size(0) == q.size(0) && (one_token || v.size(1) == q.size(1)), "v must have shape ",
              v_dims, " with the batch and time of q = ", show(q.sizes()), ", got ",
              show(v.sizes()));
    int64_t const H = q.size(rank - 2), HV = v.size(rank - 2), K = q.size(rank - 1),
                  V = v.size(rank - 1);
    check_dims(c, H, HV, K, V, any_size ? kAnyDim : kMaxDim,
               any_size || one_token ? kAnyDim : kMaxDim);
    gates.map(decay, [&](Decay of, Tensor const& g) {
        char const* const arg = gates.gv && of == Decay::value ? "gv" : "g";
        check_gate(c, of, arg, g, q, v, one_token);
        return g;
    });
    if (gates.gv) c.dtype(*gates.gv, "gv", gates.g->scalar_type(), " like g");
    c.dtype(k, "k", q.scalar_type(), " like q");
    c.dtype(v, "v", q.scalar_type(), " like q");
    c.device(k, "k", q, "q");
    c.device(v, "v", q, "q");
}

// The tensors a call reads, in the layout the kernels want, kept alive beside the params that point into them.
struct Inputs {
    Tensor q, k, v;
    Gates gates;
    OptionalTensor initial_state, cu_seqlens;
    ChunkParams p{};
};

// Gates in the layout of the kernels: rows of channels like everything else, scalars at any strides.
inline Tensor gate_layout(Decay decay, Tensor const& g) {
    if (decay == Decay::scalar) return g;
    return g.dim() == 4 ? kernel_layout(g) : last_contiguous(g);
}

inline Rows gate_rows(Decay decay, Tensor const& g) {
    return decay == Decay::scalar ? scalar_rows(g) : rows(g);
}

// Where a kernel finds the gates, or their gradients.
inline void point_at(Decay decay, Gates const& gates, Rows& g, Rows& gv) {
    gates.map(decay, [&](Decay of, Tensor const& t) {
        (decay == Decay::both && of == Decay::value ? gv : g) = gate_rows(of, t);
        return t;
    });
}

inline ScalarType gate_type(Gates const& gates, Tensor const& q) {
    return gates.g ? gates.g->scalar_type() : q.scalar_type();
}

// What ChunkParams and StepParams have in common, from tensors in the layout of the kernels; of q and k, [B, T, H, channels]
// or [B, H, channels], features make K rows of a state.
template <class Params>
void fill_common(Params& p, ChunkOperator const& op, Tensor const& q, Tensor const& k,
                 Tensor const& v, Gates const& gates, double scale, Features features) {
    int64_t const rank = q.dim();
    p.decay = op.decay;
    p.exclusive = op.exclusive;
    p.gate = op.gate;
    p.dtype = to_dtype(q.scalar_type());
    p.gate_dtype = to_dtype(gate_type(gates, q));
    p.state_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.H = q.size(rank - 2), p.HV = v.size(rank - 2), p.V = v.size(rank - 1);
    p.features = features, p.channels = q.size(rank - 1);
    p.K = features_of(features, p.channels);
    p.scale = scale;
    p.q = rows(q), p.k = rows(k), p.v = rows(v);
    point_at(op.decay, gates, p.g, p.gv);
}

inline Inputs prepare(Checks const& c, ChunkOperator const& op, Tensor const& q, Tensor const& k,
                      Tensor const& v, Gates const& gates, OptionalTensor const& initial_state,
                      OptionalTensor const& cu_seqlens, double scale,
                      Features features = Features::none) {
    check_inputs(c, op.decay, q, k, v, gates, false, features != Features::none);
    check_cu_seqlens(c, cu_seqlens, q);
    int64_t const N = cu_seqlens ? cu_seqlens->size(0) - 1 : q.size(0);
    int64_t const K = features_of(features, q.size(3));
    check_state(c, initial_state, "initial_state", q, N, v.size(2), K, v.size(3));

    Inputs in{kernel_layout(q),
              kernel_layout(k),
              kernel_layout(v),
              gates.map(op.decay, gate_layout),
              {},
              {},
              {}};
    if (initial_state) in.initial_state = as_contiguous(*initial_state);
    if (cu_seqlens) in.cu_seqlens = as_contiguous(*cu_seqlens);
    ChunkParams& p = in.p;
    fill_common(p, op, in.q, in.k, in.v, in.gates, scale, features);
    p.T = q.size(1), p.N = N;
    if (in.initial_state) p.initial_state = in.initial_state->const_data_ptr();
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    return in;
}

// The tensors of a step in the layout of the kernels, kept alive beside the params that point into them.
struct StepInputs {
    Tensor q, k, v, o;
    Gates gates;
    StepParams p{};
    OptionalTensor more[2] = {};  // what an operator has of its own

    Tensor run() {
        DeviceScope const scope(q);
        int64_t const bytes = step_workspace(p);
        OptionalTensor scratch;
        if (bytes > 0) scratch = workspace(bytes, q);
        step(p, scratch ? scratch->mutable_data_ptr() : nullptr, scope.stream());
        return o;
    }
};

// Which way a step's state lies in memory; `turned`: it is called [B, H, P, N] as Mamba-2's are, with values first.
inline bool values_lie_first(Checks const& c, Tensor const& state, char const* arg, Tensor const& q,
                             int64_t HV, int64_t K, int64_t V, bool turned) {
    int64_t const B = q.size(0);
    // of states with one row or one column, either is right
    bool const transposed = state.dim() == 4 && !state.is_contiguous() && is_transposed(state);
    if (turned) {
        check_in_place(c, state, arg, "[B, H, P, N]", {B, HV, V, K}, q, transposed);
    } else {
        check_in_place(c, state, arg, "[B, HV, K, V]", {B, HV, K, V}, q, transposed);
    }
    return transposed != turned;
}

// Tokens that are checked already, and their state.
inline StepInputs prepare_step(Checks const& c, ChunkOperator const& op, Tensor const& q,
                               Tensor const& k, Tensor const& v, Gates const& gates,
                               Tensor const& state, char const* state_arg, double scale,
                               Features features = Features::none, bool turned = false) {
    int64_t const HV = v.size(1), V = v.size(2), K = features_of(features, q.size(2));
    bool const values_first = values_lie_first(c, state, state_arg, q, HV, K, V, turned);
    DeviceScope const scope(q);
    StepInputs in{last_contiguous(q), last_contiguous(k), last_contiguous(v),
                  empty({q.size(0), HV, V}, q.scalar_type(), q), gates.map(op.decay, gate_layout)};
    StepParams& p = in.p;
    fill_common(p, op, in.q, in.k, in.v, in.gates, scale, features);
    p.o = rows(in.o);
    p.values_first = values_first;
    p.state = const_cast<void*>(state.const_data_ptr());
    return in;
}

// A parameter of heads, [HV] or [HV, D], with D contiguous.
inline TypedRows head_rows(Tensor const& t) {
    return {{const_cast<void*>(t.const_data_ptr()), 0, 0, t.stride(0)}, to_dtype(t.scalar_type())};
}

}  // namespace
}  // namespace lsm
