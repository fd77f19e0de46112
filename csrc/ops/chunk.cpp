// The chunk engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>

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

void check_gate(Checks const& c, Decay decay, char const* arg, Tensor const& g, Tensor const& q,
                Tensor const& v, bool one_token) {
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

void check_inputs(Checks const& c, Decay decay, Tensor const& q, Tensor const& k, Tensor const& v,
                  Gates const& gates, bool one_token) {
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

// mLSTM's, before their activation.
void check_input_gates(Checks const& c, Tensor const& i, Tensor const& f, Tensor const& q,
                       Tensor const& v, bool one_token) {
    check_gate(c, Decay::scalar, "i", i, q, v, one_token);
    check_gate(c, Decay::scalar, "f", f, q, v, one_token);
    c.dtype(f, "f", i.scalar_type(), " like i");
}

Normaliser input_gates(Tensor const& i, Tensor const& f, bool exponential, bool divides,
                       double eps) {
    Normaliser own{};
    own.on = own.gated = true;
    own.i = scalar_rows(i), own.f = scalar_rows(f);
    own.dtype = to_dtype(i.scalar_type());
    own.exponential = exponential, own.divides = divides, own.eps = eps;
    return own;
}

// The tensors a call reads, in the layout the kernels want, kept alive beside the params that point into them.
struct Inputs {
    Tensor q, k, v;
    Gates gates;
    OptionalTensor initial_state, cu_seqlens;
    ChunkParams p{};
};

// Gates in the layout of the kernels: rows of channels like everything else, scalars at any strides.
Tensor gate_layout(Decay decay, Tensor const& g) {
    if (decay == Decay::scalar) return g;
    return g.dim() == 4 ? kernel_layout(g) : last_contiguous(g);
}

Rows gate_rows(Decay decay, Tensor const& g) {
    return decay == Decay::scalar ? scalar_rows(g) : rows(g);
}

// Where a kernel finds the gates, or their gradients.
void point_at(Decay decay, Gates const& gates, Rows& g, Rows& gv) {
    gates.map(decay, [&](Decay of, Tensor const& t) {
        (decay == Decay::both && of == Decay::value ? gv : g) = gate_rows(of, t);
        return t;
    });
}

ScalarType gate_type(Gates const& gates, Tensor const& q) {
    return gates.g ? gates.g->scalar_type() : q.scalar_type();
}

Inputs prepare(Checks const& c, ChunkOperator const& op, Tensor const& q, Tensor const& k,
               Tensor const& v, Gates const& gates, OptionalTensor const& initial_state,
               OptionalTensor const& cu_seqlens, double scale, Features features = Features::none) {
    check_inputs(c, op.decay, q, k, v, gates, false);
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
    p.decay = op.decay;
    p.exclusive = op.exclusive;
    p.gate = op.gate;
    p.dtype = to_dtype(q.scalar_type());
    p.gate_dtype = to_dtype(gate_type(gates, q));
    p.state_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.T = q.size(1), p.H = q.size(2), p.K = K;
    p.features = features, p.channels = q.size(3);
    p.HV = v.size(2), p.V = v.size(3), p.N = N;
    p.scale = scale;
    p.q = rows(in.q), p.k = rows(in.k), p.v = rows(in.v);
    point_at(op.decay, in.gates, p.g, p.gv);
    if (in.initial_state) p.initial_state = in.initial_state->const_data_ptr();
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    return in;
}

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

#if defined(LSM_BACKEND_CPU)
// What operators with a normaliser call their tensors.
struct NormalisedNames {
    char const *o, *grad_o, *n, *grad_n, *grad_state;
};
constexpr NormalisedNames kMlstmNames{"h", "grad_h", "n", "grad_n", "grad_C"};
constexpr NormalisedNames kPolynomialNames{"o", "grad_o", "z", "grad_z", "grad_S"};

void check_sums(Checks const& c, OptionalTensor const& t, char const* arg, char const* dims,
                std::initializer_list<int64_t> shape, Tensor const& q) {
    if (!t) return;
    c.shape(*t, arg, dims, shape);
    c.dtype(*t, arg, state_type(q));
    c.device(*t, arg, q, "q");
}

// Each token's decay and weight are in a row of `tokens`, which the kernels fill or, in the backward, find.
void point_at_tokens(ChunkParams& p, void* tokens) {
    p.decay = Decay::scalar;
    p.g = {tokens, p.HV * p.T, 1, p.T};
    p.gate_dtype = p.state_dtype;
    p.normaliser.on = true;
    p.normaliser.tokens = tokens;
}

// simple_gla of values that the gates in p.normaliser weigh, whose outputs are divided by what it makes of the weights
// alone: o, the last states of both, the tokens' rows.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalised_forward(Checks const& c,
                                                              NormalisedNames const& names,
                                                              Inputs& in, Tensor const& q,
                                                              OptionalTensor const& n,
                                                              bool output_final_state) {
    ChunkParams& p = in.p;
    check_sums(c, n, names.n, "[N, HV, K]", {p.N, p.HV, p.K}, q);
    DeviceScope const scope(q);
    ScalarType const wide = state_type(q);
    OptionalTensor const n0 = contiguous_or_none(n);
    Tensor o = empty({p.B, p.T, p.HV, p.V}, q.scalar_type(), q);
    Tensor state = output_final_state ? empty({p.N, p.HV, p.K, p.V}, wide, q) : empty({0}, wide, q);
    Tensor n_last = output_final_state ? empty({p.N, p.HV, p.K}, wide, q) : empty({0}, wide, q);
    Tensor tokens = empty({kGateRows, p.B, p.HV, p.T}, wide, q);
    p.o = rows(o);
    point_at_tokens(p, tokens.mutable_data_ptr());
    p.normaliser.n0 = data_or_null(n0);
    if (output_final_state) {
        p.final_state = state.mutable_data_ptr();
        p.normaliser.n = n_last.mutable_data_ptr();
    }
    Tensor scratch = workspace(chunk_fwd_workspace(p), q);
    chunk_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {o, state, n_last, tokens};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_fwd(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& i, Tensor const& f,
    OptionalTensor const& C, OptionalTensor const& n, OptionalTensor const& m,
    OptionalTensor const& cu_seqlens, double scale, double eps, bool exponential, bool normalize,
    bool output_final_state) {
    Checks const c("mlstm_fwd");
    static constexpr ChunkOperator op{"mlstm", Decay::none, false};
    Inputs in = prepare(c, op, q, k, v, {}, C, cu_seqlens, scale);
    ChunkParams& p = in.p;
    check_input_gates(c, i, f, q, v, false);
    check_sums(c, m, "m", "[N, HV]", {p.N, p.HV}, q);
    OptionalTensor const m0 = contiguous_or_none(m);
    Tensor m_last =
        output_final_state ? empty({p.N, p.HV}, state_type(q), q) : empty({0}, state_type(q), q);
    p.normaliser = input_gates(i, f, exponential, normalize, eps);
    p.normaliser.m0 = data_or_null(m0);
    if (output_final_state) p.normaliser.m = m_last.mutable_data_ptr();
    auto [h, C_last, n_last, tokens] =
        normalised_forward(c, kMlstmNames, in, q, n, output_final_state);
    return {h, C_last, n_last, m_last, tokens};
}

// linear_attn of features (policy/features.h), divided by the sum of its weights.
constexpr ChunkOperator kPolynomial{"polynomial_attn", Decay::none, false};

Features polynomial(bool taylor) {
    return taylor ? Features::taylor : Features::squares;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> polynomial_attn_fwd(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& S,
    OptionalTensor const& z, OptionalTensor const& cu_seqlens, double scale, double eps,
    bool taylor, bool normalize, bool output_final_state) {
    Checks const c("polynomial_attn_fwd");
    Inputs in = prepare(c, kPolynomial, q, k, v, {}, S, cu_seqlens, scale, polynomial(taylor));
    in.p.normaliser.divides = normalize, in.p.normaliser.eps = eps;
    return normalised_forward(c, kPolynomialNames, in, q, z, output_final_state);
}
#endif

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

#if defined(LSM_BACKEND_CPU)
struct NormalisedGradients {
    Tensor q, k, v, state, n;
};

// Of everything but gates, whose gradients are elementwise ones of p.dg and p.normaliser.dweight.
NormalisedGradients normalised_backward(Checks const& c, NormalisedNames const& names, Inputs& in,
                                        Tensor const& q, OptionalTensor const& n, Tensor const& o,
                                        Tensor const& tokens, Tensor const& grad_o,
                                        OptionalTensor const& grad_state,
                                        OptionalTensor const& grad_n) {
    ChunkParams& p = in.p;
    auto const like_outputs = [&](Tensor const& t, char const* arg) {
        c.shape(t, arg, "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
        c.dtype(t, arg, q.scalar_type(), " like q");
        c.device(t, arg, q, "q");
    };
    like_outputs(o, names.o);
    like_outputs(grad_o, names.grad_o);
    check_sums(c, tokens, "tokens", "[4, B, HV, T]", {kGateRows, p.B, p.HV, p.T}, q);
    check_state(c, grad_state, names.grad_state, q, p.N, p.HV, p.K, p.V);
    check_sums(c, n, names.n, "[N, HV, K]", {p.N, p.HV, p.K}, q);
    check_sums(c, grad_n, names.grad_n, "[N, HV, K]", {p.N, p.HV, p.K}, q);
    DeviceScope const scope(q);
    ScalarType const type = q.scalar_type(), wide = state_type(q);
    Tensor const o_rows = kernel_layout(o), grad_rows = kernel_layout(grad_o),
                 gates = as_contiguous(tokens);
    OptionalTensor const n0 = contiguous_or_none(n), d_last = contiguous_or_none(grad_state),
                         dn_last = contiguous_or_none(grad_n);
    auto const key_type = p.HV == p.H ? type : wide;
    Tensor dq = empty({p.B, p.T, p.HV, p.channels}, key_type, q);
    Tensor dk = empty({p.B, p.T, p.HV, p.channels}, key_type, q);
    Tensor dv = empty({p.B, p.T, p.HV, p.V}, type, q);
    Tensor d_state = in.initial_state ? empty({p.N, p.HV, p.K, p.V}, wide, q) : empty({0}, wide, q);
    Tensor dn = n ? empty({p.N, p.HV, p.K}, wide, q) : empty({0}, wide, q);
    point_at_tokens(p, const_cast<void*>(gates.const_data_ptr()));
    Normaliser& own = p.normaliser;
    own.n0 = data_or_null(n0), own.grad_n = data_or_null(dn_last);
    if (n) own.grad_n0 = dn.mutable_data_ptr();
    p.o = rows(o_rows), p.grad_o = rows(grad_rows);
    p.grad_final_state = data_or_null(d_last);
    p.key_grad_dtype = to_dtype(key_type);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    if (in.initial_state) p.grad_initial_state = d_state.mutable_data_ptr();
    Tensor scratch = workspace(chunk_bwd_workspace(p), q);
    chunk_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {sum_groups(dq, p.H, type), sum_groups(dk, p.H, type), dv, d_state, dn};
}

// Gradients of the gates are left as those of log decay and log weight, [B, T, HV].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_bwd(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& C,
    OptionalTensor const& n, OptionalTensor const& cu_seqlens, double scale, double eps,
    bool normalize, Tensor const& h, Tensor const& tokens, Tensor const& grad_h,
    OptionalTensor const& grad_C, OptionalTensor const& grad_n) {
    Checks const c("mlstm_bwd");
    static constexpr ChunkOperator op{"mlstm", Decay::none, false};
    Inputs in = prepare(c, op, q, k, v, {}, C, cu_seqlens, scale);
    ChunkParams& p = in.p;
    p.normaliser.gated = true;
    Tensor dlog_decay = empty({p.B, p.T, p.HV}, state_type(q), q);
    Tensor dlog_weight = empty({p.B, p.T, p.HV}, state_type(q), q);
    p.dg = scalar_rows(dlog_decay);
    p.normaliser.divides = normalize, p.normaliser.eps = eps;
    p.normaliser.dweight = scalar_rows(dlog_weight);
    auto const d = normalised_backward(c, kMlstmNames, in, q, n, h, tokens, grad_h, grad_C, grad_n);
    return {d.q, d.k, d.v, dlog_decay, dlog_weight, d.state, d.n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> polynomial_attn_bwd(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& S,
    OptionalTensor const& z, OptionalTensor const& cu_seqlens, double scale, double eps,
    bool taylor, bool normalize, Tensor const& o, Tensor const& tokens, Tensor const& grad_o,
    OptionalTensor const& grad_S, OptionalTensor const& grad_z) {
    Checks const c("polynomial_attn_bwd");
    Inputs in = prepare(c, kPolynomial, q, k, v, {}, S, cu_seqlens, scale, polynomial(taylor));
    in.p.normaliser.divides = normalize, in.p.normaliser.eps = eps;
    auto const d =
        normalised_backward(c, kPolynomialNames, in, q, z, o, tokens, grad_o, grad_S, grad_z);
    return {d.q, d.k, d.v, d.state, d.n};
}
#endif

// The tensors of a step in the layout of the kernels, kept alive beside the params that point into them.
struct StepInputs {
    Tensor q, k, v, o;
    Gates gates;
    StepParams p{};
    OptionalTensor u;

    Tensor run() {
        DeviceScope const scope(q);
        int64_t const bytes = step_workspace(p);
        OptionalTensor scratch;
        if (bytes > 0) scratch = workspace(bytes, q);
        step(p, scratch ? scratch->mutable_data_ptr() : nullptr, scope.stream());
        return o;
    }
};

// Tokens that are checked already, and their state.
StepInputs prepare_step(Checks const& c, ChunkOperator const& op, Tensor const& q, Tensor const& k,
                        Tensor const& v, Gates const& gates, Tensor const& state,
                        char const* state_arg, double scale, Features features = Features::none) {
    int64_t const B = q.size(0), H = q.size(1), HV = v.size(1), V = v.size(2);
    int64_t const K = features_of(features, q.size(2));
    // of states with one row or one column, either is right
    bool const values_first = state.dim() == 4 && !state.is_contiguous() && is_transposed(state);
    check_in_place(c, state, state_arg, "[B, HV, K, V]", {B, HV, K, V}, q, values_first);
    DeviceScope const scope(q);
    StepInputs in{last_contiguous(q),
                  last_contiguous(k),
                  last_contiguous(v),
                  empty({B, HV, V}, q.scalar_type(), q),
                  gates.map(op.decay, gate_layout),
                  {},
                  {}};
    StepParams& p = in.p;
    p.decay = op.decay;
    p.exclusive = op.exclusive;
    p.gate = op.gate;
    p.dtype = to_dtype(q.scalar_type());
    p.gate_dtype = to_dtype(gate_type(gates, q));
    p.state_dtype = to_dtype(state_type(q));
    p.B = B, p.H = H, p.HV = HV, p.K = K, p.V = V;
    p.features = features, p.channels = q.size(2);
    p.scale = scale;
    p.q = rows(in.q), p.k = rows(in.k), p.v = rows(in.v), p.o = rows(in.o);
    point_at(op.decay, in.gates, p.g, p.gv);
    p.values_first = values_first;
    p.state = const_cast<void*>(state.const_data_ptr());
    return in;
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
        in.u = last_contiguous(*u);
        int64_t const head = in.u->dim() - 2;
        in.p.u = {const_cast<void*>(in.u->const_data_ptr()), head == 1 ? in.u->stride(0) : 0, 0,
                  in.u->stride(head)};
        in.p.u_dtype = to_dtype(in.u->scalar_type());
    }
    return in.run();
}

// A step of one decay per head with an input gate and a normaliser beside the state.
Tensor mlstm_step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& i,
                  Tensor const& f, Tensor const& C, Tensor const& n, Tensor const& m, double scale,
                  double eps, bool exponential, bool normalize) {
    Checks const c("mlstm_step");
    check_inputs(c, Decay::none, q, k, v, {}, true);
    int64_t const B = q.size(0), K = q.size(2), HV = v.size(1);
    check_input_gates(c, i, f, q, v, true);
    check_in_place(c, n, "n", "[B, HV, K]", {B, HV, K}, q);
    check_in_place(c, m, "m", "[B, HV]", {B, HV}, q);
    static constexpr ChunkOperator op{"mlstm", Decay::none, false};
    StepInputs in = prepare_step(c, op, q, k, v, {}, C, "C", scale);
    Normaliser& own = in.p.normaliser;
    own = input_gates(i, f, exponential, normalize, eps);
    own.n0 = own.n = const_cast<void*>(n.const_data_ptr());
    own.m0 = own.m = const_cast<void*>(m.const_data_ptr());
    return in.run();
}

#if defined(LSM_BACKEND_CPU)
Tensor polynomial_attn_step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& S,
                            Tensor const& z, double scale, double eps, bool taylor,
                            bool normalize) {
    Checks const c("polynomial_attn_step");
    check_inputs(c, Decay::none, q, k, v, {}, true);
    StepInputs in = prepare_step(c, kPolynomial, q, k, v, {}, S, "S", scale, polynomial(taylor));
    check_in_place(c, z, "z", "[B, HV, K]", {in.p.B, in.p.HV, in.p.K}, q);
    Normaliser& own = in.p.normaliser;
    own.on = true, own.divides = normalize, own.eps = eps;
    own.n0 = own.n = const_cast<void*>(z.const_data_ptr());
    return in.run();
}
#endif

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
#if defined(LSM_BACKEND_CPU)
    m.impl("mlstm_fwd", TORCH_BOX(&lsm::mlstm_fwd));
    m.impl("mlstm_bwd", TORCH_BOX(&lsm::mlstm_bwd));
    m.impl("polynomial_attn_fwd", TORCH_BOX(&lsm::polynomial_attn_fwd));
    m.impl("polynomial_attn_bwd", TORCH_BOX(&lsm::polynomial_attn_bwd));
    m.impl("polynomial_attn_step", TORCH_BOX(&lsm::polynomial_attn_step));
#endif
    m.impl("mlstm_step", TORCH_BOX(&lsm::mlstm_step));
}
