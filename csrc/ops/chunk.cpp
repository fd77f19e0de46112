// The operators of params/operators.h: check, allocate, fill the params, run. Compiled once per backend.
#include "ops/chunk.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>

namespace lsm {
namespace {

Gates pad_gates(Decay decay, Gates const& gates, int64_t dK, int64_t dV) {
    return gates.map(decay, [&](Decay of, Tensor const& g) {
        return of == Decay::scalar ? g : pad_last(g, of == Decay::value ? dV : dK);
    });
}

Gates cut_gates(Decay decay, Gates const& gradients, int64_t K, int64_t V) {
    return gradients.map(decay, [&](Decay of, Tensor const& dg) {
        return dg.dim() != 4 ? dg : cut(dg, of == Decay::value ? V : K);
    });
}

std::tuple<Tensor, Tensor> forward(ChunkOperator const& op, Tensor const& q, Tensor const& k,
                                   Tensor const& v, Gates const& gates,
                                   OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, double scale,
                                   bool output_final_state) {
    Checks const c(op.name, "_fwd");
    Inputs in = prepare(c, op, q, k, v, gates, initial_state, cu_seqlens, scale);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, state] =
            forward(op, pad_last(q, dK), pad_last(k, dK), pad_last(v, dV),
                    pad_gates(op.decay, gates, dK, dV), pad_state(initial_state, dK, dV),
                    cu_seqlens, scale, output_final_state);
        return {cut(o, v.size(3)), cut_state(state, q.size(3), v.size(3))};
    }
    ChunkParams& p = in.p;
    DeviceScope const scope(q);
    Tensor o = empty({p.B, p.T, p.HV, p.V}, q.scalar_type(), q);
    Tensor final_state = output_final_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                                            : empty({0}, state_type(q), q);
    p.o = rows(o);
    if (output_final_state) p.final_state = final_state.mutable_data_ptr();
    Tensor scratch = workspace(chunk_fwd_workspace(p), q);
    chunk_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {o, final_state};
}

Gates empty_gate_gradients(ChunkParams const& p, Gates const& gates, Tensor const& q, bool wanted) {
    ScalarType const type = gate_type(gates, q);
    return gates.map(p.decay, [&](Decay of, Tensor const&) {
        if (!wanted) return empty({0}, type, q);
        if (of == Decay::scalar) return empty({p.B, p.T, p.HV}, type, q);
        return empty({p.B, p.T, p.HV, of == Decay::value ? p.V : p.K}, type, q);
    });
}

struct Gradients {
    Tensor q, k, v;
    Gates gates;
    Tensor initial_state;
};

Gradients backward(ChunkOperator const& op, Tensor const& q, Tensor const& k, Tensor const& v,
                   Gates const& gates, OptionalTensor const& initial_state,
                   OptionalTensor const& cu_seqlens, double scale, Tensor const& grad_o,
                   OptionalTensor const& grad_final_state, bool need_dg) {
    Checks const c(op.name, "_bwd");
    Inputs in = prepare(c, op, q, k, v, gates, initial_state, cu_seqlens, scale);
    ChunkParams& p = in.p;
    c.shape(grad_o, "grad_o", "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
    c.dtype(grad_o, "grad_o", q.scalar_type(), " like q");
    c.device(grad_o, "grad_o", q, "q");
    check_state(c, grad_final_state, "grad_final_state", q, p.N, p.HV, p.K, p.V);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [dq, dk, dv, dg, dh0] = backward(
            op, pad_last(q, dK), pad_last(k, dK), pad_last(v, dV),
            pad_gates(op.decay, gates, dK, dV), pad_state(initial_state, dK, dV), cu_seqlens, scale,
            pad_last(grad_o, dV), pad_state(grad_final_state, dK, dV), need_dg);
        return {cut(dq, p.K), cut(dk, p.K), cut(dv, p.V), cut_gates(op.decay, dg, p.K, p.V),
                cut_state(dh0, p.K, p.V)};
    }
    DeviceScope const scope(q);
    Tensor const grad_o_rows = kernel_layout(grad_o);
    OptionalTensor grad_final;
    if (grad_final_state) grad_final = as_contiguous(*grad_final_state);
    auto const type = q.scalar_type();
    // Rounded before they are added up, gradients of value heads that cancel lose all they have.
    auto const key_type = kTensorCores || p.HV == p.H ? type : state_type(q);
    Tensor dq = empty({p.B, p.T, p.HV, p.K}, key_type, q);
    Tensor dk = empty({p.B, p.T, p.HV, p.K}, key_type, q);
    Tensor dv = empty({p.B, p.T, p.HV, p.V}, type, q);
    Gates const dg = empty_gate_gradients(p, gates, q, need_dg);
    Tensor dh0 = initial_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                               : empty({0}, state_type(q), q);
    p.grad_o = rows(grad_o_rows);
    if (grad_final) p.grad_final_state = grad_final->const_data_ptr();
    p.key_grad_dtype = to_dtype(key_type);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    if (need_dg) point_at(op.decay, dg, p.dg, p.dgv);
    if (initial_state) p.grad_initial_state = dh0.mutable_data_ptr();
    Tensor scratch = workspace(chunk_bwd_workspace(p), q);
    chunk_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {sum_groups(dq, p.H, type), sum_groups(dk, p.H, type), dv, dg, dh0};
}

// What the query of an exclusive step reads of the token's own write, [HV, K] or [B, HV, K].
void check_bonus(Checks const& c, Tensor const& u, Tensor const& q, Tensor const& v) {
    int64_t const B = q.size(0), HV = v.size(1), K = q.size(2);
    if (u.dim() == 3) {
        c.shape(u, "u", "[B, HV, K]", {B, HV, K});
    } else {
        c.shape(u, "u", "[HV, K]", {HV, K});
    }
    check_gate_type(c, u, "u", q);
}

Tensor one_step(ChunkOperator const& op, Tensor const& q, Tensor const& k, Tensor const& v,
                Gates const& gates, Tensor const& state, double scale,
                OptionalTensor const& u = {}) {
    Checks const c(op.name, "_step");
    check_inputs(c, op.decay, q, k, v, gates, true);
    if (u) check_bonus(c, *u, q, v);
    StepInputs in = prepare_step(c, op, q, k, v, gates, state, "state", scale);
    if (u) {
        in.more[0] = last_contiguous(*u);
        in.p.u = head_rows(*in.more[0]);
        if (u->dim() == 3)
            in.p.u.batch = in.more[0]->stride(0), in.p.u.head = in.more[0]->stride(1);
    }
    return in.run();
}

// The dispatcher wants plain functions; here they are for row i of the operators, with as many gates as it has.
Gates gates_of() {
    return {};
}
Gates gates_of(Tensor const& g) {
    return {g, {}};
}
Gates gates_of(Tensor const& g, Tensor const& gv) {
    return {g, gv};
}

template <size_t i, class... G>
struct Functions {
    static constexpr ChunkOperator const& op = kChunkOperators[i];

    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          G const&... g, OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state) {
        return forward(op, q, k, v, gates_of(g...), initial_state, cu_seqlens, scale,
                       output_final_state);
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, G const&... g,
                       Tensor const& state, double scale) {
        return one_step(op, q, k, v, gates_of(g...), state, scale);
    }
    static Tensor exclusive_step(Tensor const& q, Tensor const& k, Tensor const& v, G const&... g,
                                 Tensor const& state, double scale, OptionalTensor const& u) {
        return one_step(op, q, k, v, gates_of(g...), state, scale, u);
    }
};

template <size_t i>
struct Ungated : Functions<i> {
    static std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(Tensor const& q, Tensor const& k,
                                                          Tensor const& v,
                                                          OptionalTensor const& initial_state,
                                                          OptionalTensor const& cu_seqlens,
                                                          double scale, Tensor const& grad_o,
                                                          OptionalTensor const& grad_final_state) {
        Gradients d = backward(kChunkOperators[i], q, k, v, {}, initial_state, cu_seqlens, scale,
                               grad_o, grad_final_state, false);
        return {d.q, d.k, d.v, d.initial_state};
    }
};

template <size_t i>
struct Gated : Functions<i, Tensor> {
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g,
        OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
        Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg) {
        Gradients d = backward(kChunkOperators[i], q, k, v, {g, {}}, initial_state, cu_seqlens,
                               scale, grad_o, grad_final_state, need_dg);
        return {d.q, d.k, d.v, *d.gates.g, d.initial_state};
    }
};

template <size_t i>
struct GatedTwice : Functions<i, Tensor, Tensor> {
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g, Tensor const& gv,
        OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
        Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg) {
        Gradients d = backward(kChunkOperators[i], q, k, v, {g, gv}, initial_state, cu_seqlens,
                               scale, grad_o, grad_final_state, need_dg);
        return {d.q, d.k, d.v, *d.gates.g, *d.gates.gv, d.initial_state};
    }
};

template <size_t i>
void implement(torch::stable::detail::StableLibrary& m) {
    constexpr Decay decay = kChunkOperators[i].decay;
    using Op =
        std::conditional_t<decay == Decay::none, Ungated<i>,
                           std::conditional_t<decay == Decay::both, GatedTwice<i>, Gated<i>>>;
    std::string const name = kChunkOperators[i].name;
    m.impl((name + "_fwd").c_str(), TORCH_BOX(&Op::fwd));
    m.impl((name + "_bwd").c_str(), TORCH_BOX(&Op::bwd));
    if constexpr (kChunkOperators[i].exclusive) {
        m.impl((name + "_step").c_str(), TORCH_BOX(&Op::exclusive_step));
    } else {
        m.impl((name + "_step").c_str(), TORCH_BOX(&Op::step));
    }
}

template <size_t... i>
void implement_all(torch::stable::detail::StableLibrary& m, std::index_sequence<i...>) {
    (implement<i>(m), ...);
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    lsm::implement_all(m, std::make_index_sequence<lsm::kChunkOperators.size()>{});
}
