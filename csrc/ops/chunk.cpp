// The chunk engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/layout.h"

namespace lsm {
namespace {

// What sets one operator of the engine apart; its name is the schema's.
struct Variant {
    char const *fwd, *bwd, *step;
    Decay decay;
    bool exclusive;
};
constexpr Variant kLinearAttn{"linear_attn_fwd", "linear_attn_bwd", "linear_attn_step", Decay::none,
                              false};
constexpr Variant kSimpleGla{"simple_gla_fwd", "simple_gla_bwd", "simple_gla_step", Decay::scalar,
                             false};
constexpr Variant kGla{"gla_fwd", "gla_bwd", "gla_step", Decay::key, false};
constexpr Variant kGlaValue{"gla_value_fwd", "gla_value_bwd", "gla_value_step", Decay::value,
                            false};
constexpr Variant kRwkv6{"rwkv6_fwd", "rwkv6_bwd", "rwkv6_step", Decay::key, true};

void check_gate(Checks const& c, Decay decay, Tensor const& g, Tensor const& q, Tensor const& v,
                bool one_token) {
    int64_t const B = q.size(0), T = one_token ? 0 : q.size(1), HV = v.size(v.dim() - 2);
    int64_t const channels = decay == Decay::value ? v.size(v.dim() - 1) : q.size(q.dim() - 1);
    if (decay == Decay::scalar) {
        if (one_token) {
            c.shape(g, "g", "[B, HV]", {B, HV});
        } else {
            c.shape(g, "g", "[B, T, HV]", {B, T, HV});
        }
    } else if (one_token) {
        c.shape(g, "g", decay == Decay::value ? "[B, HV, V]" : "[B, HV, K]", {B, HV, channels});
    } else {
        c.shape(g, "g", decay == Decay::value ? "[B, T, HV, V]" : "[B, T, HV, K]",
                {B, T, HV, channels});
    }
    check_gate_type(c, g, "g", q);
}

void check_inputs(Checks const& c, Decay decay, Tensor const& q, Tensor const& k, Tensor const& v,
                  OptionalTensor const& g, bool one_token) {
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
    check_dims(c, H, HV, K, V);
    if (g) check_gate(c, decay, *g, q, v, one_token);
    c.dtype(k, "k", q.scalar_type(), " like q");
    c.dtype(v, "v", q.scalar_type(), " like q");
    c.device(k, "k", q, "q");
    c.device(v, "v", q, "q");
}

// The tensors a call reads, in the layout the kernels want, kept alive beside the params that point into them.
struct Inputs {
    Tensor q, k, v;
    OptionalTensor g, initial_state, cu_seqlens;
    ChunkParams p{};
};

// Gates in the layout of the kernels: rows of channels like everything else, scalars at any strides.
OptionalTensor gate_layout(Decay decay, OptionalTensor const& g) {
    if (!g || decay == Decay::scalar) return g;
    return g->dim() == 4 ? kernel_layout(*g) : last_contiguous(*g);
}

Rows gate_rows(Decay decay, Tensor const& g) {
    return decay == Decay::scalar ? scalar_rows(g) : rows(g);
}

ScalarType gate_type(OptionalTensor const& g, Tensor const& q) {
    return g ? g->scalar_type() : q.scalar_type();
}

Inputs prepare(Checks const& c, Variant const& variant, Tensor const& q, Tensor const& k,
               Tensor const& v, OptionalTensor const& g, OptionalTensor const& initial_state,
               OptionalTensor const& cu_seqlens, double scale) {
    check_inputs(c, variant.decay, q, k, v, g, false);
    check_cu_seqlens(c, cu_seqlens, q);
    int64_t const N = cu_seqlens ? cu_seqlens->size(0) - 1 : q.size(0);
    check_state(c, initial_state, "initial_state", q, N, v.size(2), q.size(3), v.size(3));

    Inputs in{kernel_layout(q),
              kernel_layout(k),
              kernel_layout(v),
              gate_layout(variant.decay, g),
              {},
              {},
              {}};
    if (initial_state) in.initial_state = as_contiguous(*initial_state);
    if (cu_seqlens) in.cu_seqlens = as_contiguous(*cu_seqlens);
    ChunkParams& p = in.p;
    p.decay = variant.decay;
    p.exclusive = variant.exclusive;
    p.dtype = to_dtype(q.scalar_type());
    p.gate_dtype = to_dtype(gate_type(g, q));
    p.state_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.T = q.size(1), p.H = q.size(2), p.K = q.size(3);
    p.HV = v.size(2), p.V = v.size(3), p.N = N;
    p.scale = scale;
    p.q = rows(in.q), p.k = rows(in.k), p.v = rows(in.v);
    if (in.g) p.g = gate_rows(variant.decay, *in.g);
    if (in.initial_state) p.initial_state = in.initial_state->const_data_ptr();
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    return in;
}

OptionalTensor pad_gate(Decay decay, OptionalTensor const& g, int64_t dK, int64_t dV) {
    if (!g || decay == Decay::scalar) return g;
    return pad_last(*g, decay == Decay::value ? dV : dK);
}

Tensor cut_gate(Decay decay, Tensor const& dg, int64_t K, int64_t V) {
    if (dg.dim() != 4) return dg;
    return cut(dg, decay == Decay::value ? V : K);
}

std::tuple<Tensor, Tensor> forward(Variant const& variant, Tensor const& q, Tensor const& k,
                                   Tensor const& v, OptionalTensor const& g,
                                   OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, double scale,
                                   bool output_final_state) {
    Checks const c(variant.fwd);
    Inputs in = prepare(c, variant, q, k, v, g, initial_state, cu_seqlens, scale);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, state] =
            forward(variant, pad_last(q, dK), pad_last(k, dK), pad_last(v, dV),
                    pad_gate(variant.decay, g, dK, dV), pad_state(initial_state, dK, dV),
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

Tensor empty_gate_gradient(ChunkParams const& p, OptionalTensor const& g, Tensor const& q,
                           bool wanted) {
    ScalarType const type = gate_type(g, q);
    if (!wanted) return empty({0}, type, q);
    if (p.decay == Decay::scalar) return empty({p.B, p.T, p.HV}, type, q);
    return empty({p.B, p.T, p.HV, p.decay == Decay::value ? p.V : p.K}, type, q);
}

struct Gradients {
    Tensor q, k, v, g, initial_state;
};

Gradients backward(Variant const& variant, Tensor const& q, Tensor const& k, Tensor const& v,
                   OptionalTensor const& g, OptionalTensor const& initial_state,
                   OptionalTensor const& cu_seqlens, double scale, Tensor const& grad_o,
                   OptionalTensor const& grad_final_state, bool need_dg) {
    Checks const c(variant.bwd);
    Inputs in = prepare(c, variant, q, k, v, g, initial_state, cu_seqlens, scale);
    ChunkParams& p = in.p;
    c.shape(grad_o, "grad_o", "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
    c.dtype(grad_o, "grad_o", q.scalar_type(), " like q");
    c.device(grad_o, "grad_o", q, "q");
    check_state(c, grad_final_state, "grad_final_state", q, p.N, p.HV, p.K, p.V);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [dq, dk, dv, dg, dh0] = backward(
            variant, pad_last(q, dK), pad_last(k, dK), pad_last(v, dV),
            pad_gate(variant.decay, g, dK, dV), pad_state(initial_state, dK, dV), cu_seqlens, scale,
            pad_last(grad_o, dV), pad_state(grad_final_state, dK, dV), need_dg);
        return {cut(dq, p.K), cut(dk, p.K), cut(dv, p.V), cut_gate(variant.decay, dg, p.K, p.V),
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
    Tensor dg = empty_gate_gradient(p, g, q, need_dg);
    Tensor dh0 = initial_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                               : empty({0}, state_type(q), q);
    p.grad_o = rows(grad_o_rows);
    if (grad_final) p.grad_final_state = grad_final->const_data_ptr();
    p.key_grad_dtype = to_dtype(key_type);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    if (need_dg) p.dg = gate_rows(variant.decay, dg);
    if (initial_state) p.grad_initial_state = dh0.mutable_data_ptr();
    Tensor scratch = workspace(chunk_bwd_workspace(p), q);
    chunk_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {sum_groups(dq, p.H, type), sum_groups(dk, p.H, type), dv, dg, dh0};
}

Tensor one_step(Variant const& variant, Tensor const& q, Tensor const& k, Tensor const& v,
                OptionalTensor const& g, Tensor const& state, double scale) {
    Checks const c(variant.step);
    check_inputs(c, variant.decay, q, k, v, g, true);
    int64_t const B = q.size(0), H = q.size(1), K = q.size(2), HV = v.size(1), V = v.size(2);
    check_step_state(c, state, q, HV, K, V);
    DeviceScope const scope(q);
    Tensor const qr = last_contiguous(q), kr = last_contiguous(k), vr = last_contiguous(v);
    OptionalTensor const gr = gate_layout(variant.decay, g);
    Tensor o = empty({B, HV, V}, q.scalar_type(), q);
    StepParams p{};
    p.decay = variant.decay;
    p.exclusive = variant.exclusive;
    p.dtype = to_dtype(q.scalar_type());
    p.gate_dtype = to_dtype(gate_type(g, q));
    p.state_dtype = to_dtype(state_type(q));
    p.B = B, p.H = H, p.HV = HV, p.K = K, p.V = V;
    p.scale = scale;
    p.q = rows(qr), p.k = rows(kr), p.v = rows(vr), p.o = rows(o);
    if (gr) p.g = gate_rows(variant.decay, *gr);
    p.state = const_cast<void*>(state.const_data_ptr());
    step(p, scope.stream());
    return o;
}

// The dispatcher wants plain functions; here they are, with a gate and without.
template <Variant const& variant>
struct Gated {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          Tensor const& g, OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state) {
        return forward(variant, q, k, v, g, initial_state, cu_seqlens, scale, output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g,
        OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
        Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg) {
        auto [dq, dk, dv, dg, dh0] = backward(variant, q, k, v, g, initial_state, cu_seqlens, scale,
                                              grad_o, grad_final_state, need_dg);
        return {dq, dk, dv, dg, dh0};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g,
                       Tensor const& state, double scale) {
        return one_step(variant, q, k, v, g, state, scale);
    }
};

template <Variant const& variant>
struct Ungated {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state) {
        return forward(variant, q, k, v, {}, initial_state, cu_seqlens, scale, output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(Tensor const& q, Tensor const& k,
                                                          Tensor const& v,
                                                          OptionalTensor const& initial_state,
                                                          OptionalTensor const& cu_seqlens,
                                                          double scale, Tensor const& grad_o,
                                                          OptionalTensor const& grad_final_state) {
        auto [dq, dk, dv, dg, dh0] = backward(variant, q, k, v, {}, initial_state, cu_seqlens,
                                              scale, grad_o, grad_final_state, false);
        return {dq, dk, dv, dh0};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& state,
                       double scale) {
        return one_step(variant, q, k, v, {}, state, scale);
    }
};

template <class Op>
void implement(torch::stable::detail::StableLibrary& m, Variant const& variant) {
    m.impl(variant.fwd, TORCH_BOX(&Op::fwd));
    m.impl(variant.bwd, TORCH_BOX(&Op::bwd));
    m.impl(variant.step, TORCH_BOX(&Op::step));
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    implement<Ungated<kLinearAttn>>(m, kLinearAttn);
    implement<Gated<kSimpleGla>>(m, kSimpleGla);
    implement<Gated<kGla>>(m, kGla);
    implement<Gated<kGlaValue>>(m, kGlaValue);
    implement<Gated<kRwkv6>>(m, kRwkv6);
}
