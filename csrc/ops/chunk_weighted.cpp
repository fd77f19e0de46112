// Operators of the chunk engine whose tokens weigh what they write, or whose outputs are divided or finished: mLSTM,
// Based and ReBased, and Mamba-2. Compiled once per backend.
#include "ops/chunk.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace lsm {
namespace {

// Of what CUDA kernels have for tensor cores alone.
void check_on_tensor_cores(Checks const& c, Tensor const& q) {
    c.require(!kTensorCores || q.scalar_type() == ScalarType::BFloat16,
              "q must be bfloat16, which goes to tensor cores, got ", name(q.scalar_type()));
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

// What operators with a normaliser call their tensors.
struct NormalisedNames {
    char const *o, *grad_o, *n, *grad_n, *grad_state;
};
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
    bool const keep_n = output_final_state && !p.normaliser.weights_only;
    Tensor n_last = keep_n ? empty({p.N, p.HV, p.K}, wide, q) : empty({0}, wide, q);
    Tensor tokens = empty({kGateRows, p.B, p.HV, p.T}, wide, q);
    p.o = rows(o);
    point_at_tokens(p, tokens.mutable_data_ptr());
    p.normaliser.n0 = data_or_null(n0);
    if (output_final_state) p.final_state = state.mutable_data_ptr();
    if (keep_n) p.normaliser.n = n_last.mutable_data_ptr();
    Tensor scratch = workspace(chunk_fwd_workspace(p), q);
    chunk_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {o, state, n_last, tokens};
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

// What a backward has of its forward and of gradients.
void check_outputs(Checks const& c, NormalisedNames const& names, ChunkParams const& p,
                   Tensor const& q, Tensor const& o, Tensor const& tokens, Tensor const& grad_o,
                   OptionalTensor const& grad_state, OptionalTensor const& grad_n) {
    auto const like_outputs = [&](Tensor const& t, char const* arg) {
        c.shape(t, arg, "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
        c.dtype(t, arg, q.scalar_type(), " like q");
        c.device(t, arg, q, "q");
    };
    like_outputs(o, names.o);
    like_outputs(grad_o, names.grad_o);
    check_sums(c, tokens, "tokens", "[4, B, HV, T]", {kGateRows, p.B, p.HV, p.T}, q);
    check_state(c, grad_state, names.grad_state, q, p.N, p.HV, p.K, p.V);
    check_sums(c, grad_n, names.grad_n, "[N, HV, K]", {p.N, p.HV, p.K}, q);
}

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
    check_outputs(c, names, p, q, o, tokens, grad_o, grad_state, grad_n);
    check_sums(c, n, names.n, "[N, HV, K]", {p.N, p.HV, p.K}, q);
    DeviceScope const scope(q);
    ScalarType const type = q.scalar_type(), wide = state_type(q);
    Tensor const o_rows = kernel_layout(o), grad_rows = kernel_layout(grad_o),
                 gates = as_contiguous(tokens);
    OptionalTensor const n0 = contiguous_or_none(n), d_last = contiguous_or_none(grad_state),
                         dn_last = contiguous_or_none(grad_n);
    bool const swept =
        kTensorCores && p.features == Features::none;  // gradients are like keys then
    auto const key_type = swept || p.HV == p.H ? type : wide;
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

constexpr NormalisedNames kMlstmNames{"h", "grad_h", "n", "grad_n", "grad_C"};

Inputs prepare_mlstm(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                     OptionalTensor const& C, OptionalTensor const& n,
                     OptionalTensor const& cu_seqlens, double scale) {
    static constexpr ChunkOperator op{"mlstm", Decay::none, false};
    Inputs in = prepare(c, op, q, k, v, {}, C, cu_seqlens, scale);
    check_on_tensor_cores(c, q);
    check_sums(c, n, kMlstmNames.n, "[N, HV, K]", {in.p.N, in.p.HV, in.p.K}, q);
    return in;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_fwd(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& i, Tensor const& f,
    OptionalTensor const& C, OptionalTensor const& n, OptionalTensor const& m,
    OptionalTensor const& cu_seqlens, double scale, double eps, bool exponential, bool normalize,
    bool output_final_state) {
    Checks const c("mlstm_fwd");
    Inputs in = prepare_mlstm(c, q, k, v, C, n, cu_seqlens, scale);
    ChunkParams& p = in.p;
    check_input_gates(c, i, f, q, v, false);
    check_sums(c, m, "m", "[N, HV]", {p.N, p.HV}, q);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [h, C_last, n_last, m_last, tokens] = mlstm_fwd(
            pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), i, f, pad_state(C, dK, dV),
            pad_last(n, dK), m, cu_seqlens, scale, eps, exponential, normalize, output_final_state);
        return {cut(h, p.V), cut_state(C_last, p.K, p.V), cut_channels(n_last, p.K), m_last,
                tokens};
    }
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

// Gradients of the gates are left as those of log decay and log weight, [B, T, HV].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_bwd(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& C,
    OptionalTensor const& n, OptionalTensor const& cu_seqlens, double scale, double eps,
    bool normalize, Tensor const& h, Tensor const& tokens, Tensor const& grad_h,
    OptionalTensor const& grad_C, OptionalTensor const& grad_n) {
    Checks const c("mlstm_bwd");
    Inputs in = prepare_mlstm(c, q, k, v, C, n, cu_seqlens, scale);
    ChunkParams& p = in.p;
    check_outputs(c, kMlstmNames, p, q, h, tokens, grad_h, grad_C, grad_n);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [dq, dk, dv, dlog_decay, dlog_weight, dC, dn] =
            mlstm_bwd(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), pad_state(C, dK, dV),
                      pad_last(n, dK), cu_seqlens, scale, eps, normalize, pad_last(h, dV), tokens,
                      pad_last(grad_h, dV), pad_state(grad_C, dK, dV), pad_last(grad_n, dK));
        return {cut(dq, p.K),         cut(dk, p.K), cut(dv, p.V),
                dlog_decay,           dlog_weight,  cut_state(dC, p.K, p.V),
                cut_channels(dn, p.K)};
    }
    p.normaliser.gated = true;
    Tensor dlog_decay = empty({p.B, p.T, p.HV}, state_type(q), q);
    Tensor dlog_weight = empty({p.B, p.T, p.HV}, state_type(q), q);
    p.dg = scalar_rows(dlog_decay);
    p.normaliser.divides = normalize, p.normaliser.eps = eps;
    p.normaliser.dweight = scalar_rows(dlog_weight);
    auto const d = normalised_backward(c, kMlstmNames, in, q, n, h, tokens, grad_h, grad_C, grad_n);
    return {d.q, d.k, d.v, dlog_decay, dlog_weight, d.state, d.n};
}

#if defined(LSM_BACKEND_CPU)
// simple_gla of weighted values; its names are its own arguments'.
// The backward needs no outputs; grad_o stands in their place.
constexpr NormalisedNames kWeightedNames{"grad_o", "grad_o", "n", "grad_n", "grad_final_state"};

Inputs weighted(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& w,
                Tensor const& g, OptionalTensor const& initial_state,
                OptionalTensor const& cu_seqlens, double scale) {
    static constexpr ChunkOperator op{"weighted_gla", Decay::none, false};
    Inputs in = prepare(c, op, q, k, v, {}, initial_state, cu_seqlens, scale);
    check_sums(c, w, "w", "[B, T, HV]", {in.p.B, in.p.T, in.p.HV}, q);
    check_sums(c, g, "g", "[B, T, HV]", {in.p.B, in.p.T, in.p.HV}, q);
    in.p.normaliser = input_gates(w, g, false, false, 0);
    in.p.normaliser.weights_only = true;
    return in;
}

std::tuple<Tensor, Tensor> weighted_gla_fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                            Tensor const& w, Tensor const& g,
                                            OptionalTensor const& initial_state,
                                            OptionalTensor const& cu_seqlens, double scale,
                                            bool output_final_state) {
    Checks const c("weighted_gla_fwd");
    Inputs in = weighted(c, q, k, v, w, g, initial_state, cu_seqlens, scale);
    auto [o, state, n, tokens] =
        normalised_forward(c, kWeightedNames, in, q, {}, output_final_state);
    return {o, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_gla_bwd(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& w, Tensor const& g,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
    Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg) {
    Checks const c("weighted_gla_bwd");
    Inputs in = weighted(c, q, k, v, w, g, initial_state, cu_seqlens, scale);
    ChunkParams& p = in.p;
    ScalarType const wide = state_type(q);
    Tensor dw = empty({p.B, p.T, p.HV}, wide, q);
    Tensor dg = need_dg ? empty({p.B, p.T, p.HV}, wide, q) : empty({0}, wide, q);
    Tensor const tokens = empty({kGateRows, p.B, p.HV, p.T}, wide, q);
    if (need_dg) p.dg = scalar_rows(dg);
    p.normaliser.dweight = scalar_rows(dw);
    auto const d = normalised_backward(c, kWeightedNames, in, q, {}, grad_o, tokens, grad_o,
                                       grad_final_state, {});
    return {d.q, d.k, d.v, dw, dg, d.state};
}
#else
// The same on tensor cores, with D v beside what is read and the gate silu(z) behind.
struct SsdInputs {
    Inputs in;
    OptionalTensor D, z;
};

SsdInputs prepare_ssd(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                      Tensor const& w, Tensor const& g, OptionalTensor const& D,
                      OptionalTensor const& z, OptionalTensor const& initial_state,
                      OptionalTensor const& cu_seqlens, double scale) {
    static constexpr ChunkOperator op{"ssd", Decay::none, false};
    SsdInputs own{prepare(c, op, q, k, v, {}, initial_state, cu_seqlens, scale), D, z};
    ChunkParams& p = own.in.p;
    check_on_tensor_cores(c, q);
    check_sums(c, w, "w", "[B, T, HV]", {p.B, p.T, p.HV}, q);
    check_sums(c, g, "g", "[B, T, HV]", {p.B, p.T, p.HV}, q);
    p.decay = Decay::scalar;
    p.g = scalar_rows(g), p.w = scalar_rows(w);
    p.gate_dtype = p.state_dtype;
    if (D) {
        bool const channels = D->dim() == 2;
        if (channels) c.shape(*D, "D", "[HV, V]", {p.HV, p.V});
        if (!channels) c.shape(*D, "D", "[HV]", {p.HV});
        check_gate_type(c, *D, "D", q);
        if (channels) own.D = last_contiguous(*D);
        p.finish.skip = head_rows(*own.D), p.finish.skip_channels = channels;
    }
    if (z) {
        c.shape(*z, "z", "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
        c.dtype(*z, "z", q.scalar_type(), " like q");
        c.device(*z, "z", q, "q");
        own.z = kernel_layout(*z);
        p.finish.z = rows(*own.z);
    }
    return own;
}

OptionalTensor pad_skip(OptionalTensor const& D, int64_t columns) {
    return D && D->dim() == 2 ? pad_last(D, columns) : D;
}

std::tuple<Tensor, Tensor, Tensor> ssd_fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                           Tensor const& w, Tensor const& g,
                                           OptionalTensor const& D, OptionalTensor const& z,
                                           OptionalTensor const& initial_state,
                                           OptionalTensor const& cu_seqlens, double scale,
                                           bool output_final_state, bool keep_ungated) {
    Checks const c("ssd_fwd");
    SsdInputs own = prepare_ssd(c, q, k, v, w, g, D, z, initial_state, cu_seqlens, scale);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, state, ungated] =
            ssd_fwd(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), w, g, pad_skip(D, dV),
                    pad_last(z, dV), pad_state(initial_state, dK, dV), cu_seqlens, scale,
                    output_final_state, keep_ungated);
        return {cut(o, v.size(3)), cut_state(state, q.size(3), v.size(3)),
                cut_channels(ungated, v.size(3))};
    }
    ChunkParams& p = own.in.p;
    DeviceScope const scope(q);
    Tensor o = empty({p.B, p.T, p.HV, p.V}, q.scalar_type(), q);
    Tensor state = output_final_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                                      : empty({0}, state_type(q), q);
    Tensor ungated = z && keep_ungated ? empty({p.B, p.T, p.HV, p.V}, q.scalar_type(), q)
                                       : empty({0}, q.scalar_type(), q);
    p.o = rows(o);
    if (output_final_state) p.final_state = state.mutable_data_ptr();
    if (z && keep_ungated) p.finish.ungated = rows(ungated);
    Tensor scratch = workspace(chunk_fwd_workspace(p), q);
    chunk_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {o, state, ungated};
}

// Sums of what finish_gradient left, in the shape and dtype of D.
Tensor sum_pieces(Tensor const& pieces, Tensor const& D) {
    std::vector<int64_t> over{0};
    if (D.dim() == 1) over.push_back(2);
    return torch::stable::to(
        torch::stable::sum(
            pieces, torch::headeronly::IntHeaderOnlyArrayRef(over.data(), over.size()), false),
        D.scalar_type());
}

// Gradients of w and g are always made; those of D and z are empty where these are absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_bwd(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& w, Tensor const& g,
    OptionalTensor const& D, OptionalTensor const& z, OptionalTensor const& ungated,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
    Tensor const& grad_o, OptionalTensor const& grad_final_state) {
    Checks const c("ssd_bwd");
    SsdInputs own = prepare_ssd(c, q, k, v, w, g, D, z, initial_state, cu_seqlens, scale);
    ChunkParams& p = own.in.p;
    auto const like_outputs = [&](Tensor const& t, char const* arg) {
        c.shape(t, arg, "[B, T, HV, V]", {p.B, p.T, p.HV, p.V});
        c.dtype(t, arg, q.scalar_type(), " like q");
        c.device(t, arg, q, "q");
    };
    like_outputs(grad_o, "grad_o");
    c.require(bool(z) == bool(ungated), "ungated is what z gates: both or neither are given");
    if (ungated) like_outputs(*ungated, "ungated");
    check_state(c, grad_final_state, "grad_final_state", q, p.N, p.HV, p.K, p.V);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v), K = q.size(3), V = v.size(3);
        auto [dq, dk, dv, dw, dg, dD, dz, dh0] =
            ssd_bwd(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), w, g, pad_skip(D, dV),
                    pad_last(z, dV), pad_last(ungated, dV), pad_state(initial_state, dK, dV),
                    cu_seqlens, scale, pad_last(grad_o, dV), pad_state(grad_final_state, dK, dV));
        return {cut(dq, K),
                cut(dk, K),
                cut(dv, V),
                dw,
                dg,
                dD.dim() == 2 ? cut(dD, V) : dD,
                cut_channels(dz, V),
                cut_state(dh0, K, V)};
    }
    DeviceScope const scope(q);
    ScalarType const type = q.scalar_type(), wide = state_type(q);
    Tensor const grad_rows = kernel_layout(grad_o);
    OptionalTensor const ungated_rows = kernel_layout(ungated),
                         d_last = contiguous_or_none(grad_final_state);
    Tensor dq = empty({p.B, p.T, p.HV, p.K}, type, q), dk = empty({p.B, p.T, p.HV, p.K}, type, q);
    Tensor dv = empty({p.B, p.T, p.HV, p.V}, type, q);
    Tensor dw = empty({p.B, p.T, p.HV}, wide, q), dg = empty({p.B, p.T, p.HV}, wide, q);
    Tensor dz = z ? empty({p.B, p.T, p.HV, p.V}, type, q) : empty({0}, type, q);
    Tensor dD = D ? empty({finish_gradient_pieces(p), p.HV, p.V}, wide, q) : empty({0}, wide, q);
    Tensor dh0 = initial_state ? empty({p.N, p.HV, p.K, p.V}, wide, q) : empty({0}, wide, q);
    p.grad_o = rows(grad_rows);
    p.grad_final_state = data_or_null(d_last);
    p.key_grad_dtype = to_dtype(type);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    p.dg = scalar_rows(dg), p.dw = scalar_rows(dw);
    if (z) p.finish.ungated = rows(*ungated_rows), p.finish.dz = rows(dz);
    if (D) p.finish.dskip = static_cast<float*>(dD.mutable_data_ptr());
    if (initial_state) p.grad_initial_state = dh0.mutable_data_ptr();
    Tensor scratch = workspace(chunk_bwd_workspace(p), q);
    chunk_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {sum_groups(dq, p.H, type),
            sum_groups(dk, p.H, type),
            dv,
            dw,
            dg,
            D ? sum_pieces(dD, *D) : dD,
            dz,
            dh0};
}
#endif

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

Tensor polynomial_attn_step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& S,
                            Tensor const& z, double scale, double eps, bool taylor,
                            bool normalize) {
    Checks const c("polynomial_attn_step");
    check_inputs(c, Decay::none, q, k, v, {}, true, true);
    StepInputs in = prepare_step(c, kPolynomial, q, k, v, {}, S, "S", scale, polynomial(taylor));
    check_in_place(c, z, "z", "[B, HV, K]", {in.p.B, in.p.HV, in.p.K}, q);
    Normaliser& own = in.p.normaliser;
    own.on = true, own.divides = normalize, own.eps = eps;
    own.n0 = own.n = const_cast<void*>(z.const_data_ptr());
    return in.run();
}

void check_ssd_step(Checks const& c, Tensor const& x, Tensor const& dt, Tensor const& A,
                    Tensor const& B, Tensor const& C, OptionalTensor const& D,
                    OptionalTensor const& z, OptionalTensor const& dt_bias) {
    c.rank(x, "x", "[B, H, P]", 3);
    check_floating(c, x, "x");
    int64_t const batch = x.size(0), H = x.size(1), P = x.size(2);
    c.rank(B, "B", "[B, G, N]", 3);
    int64_t const G = B.size(1), N = B.size(2);
    c.shape(B, "B", "[B, G, N]", {batch, G, N});
    c.require(G > 0 && H > 0 && H % G == 0, "x must have a multiple of the G = ", G,
              " groups of B, got H = ", H);
    check_dims(c, G, H, N, P, kMaxDim, kAnyDim);
    c.shape(C, "C", "[B, G, N]", {batch, G, N});
    c.shape(dt, "dt", "[B, H]", {batch, H});
    c.shape(A, "A", "[H]", {H});
    if (dt_bias) c.shape(*dt_bias, "dt_bias", "[H]", {H});
    if (D && D->dim() == 2) c.shape(*D, "D", "[H, P]", {H, P});
    if (D && D->dim() != 2) c.shape(*D, "D", "[H]", {H});
    if (z) c.shape(*z, "z", "[B, H, P]", {batch, H, P});
    auto const like_x = [&](Tensor const& t, char const* arg) {
        c.dtype(t, arg, x.scalar_type(), " like x");
        c.device(t, arg, x, "x");
    };
    like_x(B, "B"), like_x(C, "C");
    if (z) like_x(*z, "z");
    check_gate_type(c, dt, "dt", x, "x");
    check_gate_type(c, A, "A", x, "x");
    if (dt_bias) check_gate_type(c, *dt_bias, "dt_bias", x, "x");
    if (D) check_gate_type(c, *D, "D", x, "x");
}

// A step of one decay per head, from step sizes, with all that Mamba-2 has around it.
Tensor ssd_step(Tensor const& x, Tensor const& dt, Tensor const& A, Tensor const& B,
                Tensor const& C, Tensor const& state, OptionalTensor const& D,
                OptionalTensor const& z, OptionalTensor const& dt_bias, bool dt_softplus) {
    Checks const c("ssd_step");
    check_ssd_step(c, x, dt, A, B, C, D, z, dt_bias);
    static constexpr ChunkOperator op{"ssd", Decay::none, false};
    StepInputs in = prepare_step(c, op, C, B, x, {}, state, "state", 1, Features::none, true);
    StepParams& p = in.p;
    p.sizes = {{scalar_rows(dt), to_dtype(dt.scalar_type())}, head_rows(A), {}, dt_softplus};
    if (dt_bias) p.sizes.bias = head_rows(*dt_bias);
    if (D) {
        in.more[0] = D->dim() == 2 ? last_contiguous(*D) : *D;
        p.finish.skip = head_rows(*in.more[0]), p.finish.skip_channels = D->dim() == 2;
    }
    if (z) {
        in.more[1] = last_contiguous(*z);
        p.finish.z = rows(*in.more[1]);
    }
    return in.run();
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    m.impl("mlstm_fwd", TORCH_BOX(&lsm::mlstm_fwd));
    m.impl("mlstm_bwd", TORCH_BOX(&lsm::mlstm_bwd));
#if defined(LSM_BACKEND_CPU)
    m.impl("weighted_gla_fwd", TORCH_BOX(&lsm::weighted_gla_fwd));
    m.impl("weighted_gla_bwd", TORCH_BOX(&lsm::weighted_gla_bwd));
#else
    m.impl("ssd_fwd", TORCH_BOX(&lsm::ssd_fwd));
    m.impl("ssd_bwd", TORCH_BOX(&lsm::ssd_bwd));
#endif
    m.impl("polynomial_attn_fwd", TORCH_BOX(&lsm::polynomial_attn_fwd));
    m.impl("polynomial_attn_bwd", TORCH_BOX(&lsm::polynomial_attn_bwd));
    m.impl("polynomial_attn_step", TORCH_BOX(&lsm::polynomial_attn_step));
    m.impl("mlstm_step", TORCH_BOX(&lsm::mlstm_step));
    m.impl("ssd_step", TORCH_BOX(&lsm::ssd_step));
}
