// The delta engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/layout.h"
#include "params/delta.h"

namespace lsm {
namespace {

// What sets one operator of the engine apart; its name is the schema's.
struct Variant {
    char const *fwd, *bwd, *step;
    Transition transition;
    Decay decay;  // of dplr: where there is a g
};
constexpr Variant kDeltaRule{"delta_rule_fwd", "delta_rule_bwd", "delta_rule_step",
                             Transition::householder, Decay::none};
constexpr Variant kGatedDeltaRule{"gated_delta_rule_fwd", "gated_delta_rule_bwd",
                                  "gated_delta_rule_step", Transition::householder, Decay::scalar};
constexpr Variant kKda{"kda_fwd", "kda_bwd", "kda_step", Transition::householder, Decay::key};
constexpr Variant kComba{"comba_fwd", "comba_bwd", "comba_step", Transition::comba, Decay::scalar};
constexpr Variant kDplr{"dplr_fwd", "dplr_bwd", "dplr_step", Transition::dplr, Decay::key};

// What all calls of an operator take, absent where the operator has none.
struct Arguments {
    Tensor q, k, v;
    OptionalTensor g, beta, erase, write;
    double scale;
    int64_t n = 1;  // micro-steps per token
    OptionalTensor initial_state{}, cu_seqlens{};

    bool beta_per_channel() const { return beta && beta->dim() == v.dim(); }
    Decay decay(Variant const& variant) const { return g ? variant.decay : Decay::none; }
};

// The names under which users know `erase` and `write`.
char const* erase_name(Variant const& variant) {
    return variant.transition == Transition::comba ? "p" : "a";
}

void check_like_k(Checks const& c, OptionalTensor const& x, char const* arg, Tensor const& k) {
    if (!x) return;
    c.require(show(x->sizes()) == show(k.sizes()), arg,
              " must have the shape of k = ", show(k.sizes()), ", got ", show(x->sizes()));
    c.dtype(*x, arg, k.scalar_type(), " like k");
    c.device(*x, arg, k, "k");
}

// `one_token`: no T dimension; micro-steps, if there are several, in its place.
void check(Checks const& c, Variant const& variant, Arguments const& a, bool one_token) {
    Tensor const &q = a.q, &k = a.k, &v = a.v;
    int64_t const rank = one_token ? 3 : 4;
    c.rank(q, "q", one_token ? "[B, H, K]" : "[B, T, H, K]", rank);
    check_floating(c, q);
    c.require(a.n >= 1, "num_householder must be at least 1, got ", a.n);
    bool const several = a.n > 1;
    int64_t const k_rank = one_token && !several ? 3 : 4;
    char const* const k_dims = !several    ? (one_token ? "[B, H, K]" : "[B, T, H, K]")
                               : one_token ? "[B, num_householder, H, K]"
                                           : "[B, T num_householder, H, K]";
    char const* const v_dims = !several    ? (one_token ? "[B, HV, V]" : "[B, T, HV, V]")
                               : one_token ? "[B, num_householder, HV, V]"
                                           : "[B, T num_householder, HV, V]";
    int64_t const B = q.size(0), T = one_token ? 1 : q.size(1), H = q.size(rank - 2),
                  K = q.size(rank - 1);
    auto const in_time = [&](Tensor const& x) {
        return x.size(0) == B && (k_rank == 3 || x.size(1) == T * a.n);
    };
    c.rank(k, "k", k_dims, k_rank);
    c.require(k.size(k_rank - 1) == K, "k must have K = ", K,
              " like q, got K = ", k.size(k_rank - 1));
    c.require(k.size(k_rank - 2) == H, "k must have H = ", H, " heads like q, got ",
              k.size(k_rank - 2));
    c.require(several || in_time(k), "k must have shape ", k_dims, " = ", show(q.sizes()),
              " (like q), got ", show(k.sizes()));
    c.require(in_time(k), "k must have shape ", k_dims,
              " with the batch and time of q = ", show(q.sizes()), ", num_householder = ", a.n,
              ", got ", show(k.sizes()));
    c.rank(v, "v", v_dims, k_rank);
    c.require(in_time(v), "v must have shape ", v_dims,
              " with the batch and time of q = ", show(q.sizes()),
              several ? ", num_householder = " + std::to_string(a.n) : "", ", got ",
              show(v.sizes()));
    int64_t const HV = v.size(k_rank - 2), V = v.size(k_rank - 1);
    check_dims(c, H, HV, K, V, kMaxDim, one_token ? kAnyDim : kMaxDim);
    c.dtype(k, "k", q.scalar_type(), " like q");
    c.dtype(v, "v", q.scalar_type(), " like q");
    c.device(k, "k", q, "q");
    c.device(v, "v", q, "q");
    check_like_k(c, a.erase, erase_name(variant), k);
    check_like_k(c, a.write, "b", k);
    if (a.g) {
        bool const channels = variant.decay == Decay::key;
        if (one_token && channels) c.shape(*a.g, "g", "[B, HV, K]", {B, HV, K});
        if (one_token && !channels) c.shape(*a.g, "g", "[B, HV]", {B, HV});
        if (!one_token && channels) c.shape(*a.g, "g", "[B, T, HV, K]", {B, T, HV, K});
        if (!one_token && !channels) c.shape(*a.g, "g", "[B, T, HV]", {B, T, HV});
        check_gate_type(c, *a.g, "g", q);
    }
    if (a.beta) {
        bool const per_head = a.beta->dim() == k_rank - 1;
        bool ok = per_head || a.beta->dim() == k_rank;
        for (int64_t d = 0; ok && d < a.beta->dim(); ++d) ok = a.beta->size(d) == v.size(d);
        c.require(ok, "beta must have the shape of v = ", show(v.sizes()),
                  ", with or without its last dimension, got ", show(a.beta->sizes()));
        check_gate_type(c, *a.beta, "beta", q);
    }
}

// A token's row as one of T = 1 micro-steps.
Rows step_rows(Tensor const& t, int64_t rank_with_steps) {
    Rows r;
    r.data = const_cast<void*>(t.const_data_ptr());
    r.batch = t.stride(0);
    bool const steps = t.dim() == rank_with_steps;
    r.time = steps ? t.stride(1) : 0;
    r.head = t.stride(steps ? 2 : 1);
    return r;
}

Arguments in_layout(Variant const& variant, Arguments a) {
    auto const maybe = [](OptionalTensor& t, bool rows_too) {
        if (t && rows_too) t = kernel_layout(*t);
    };
    a.q = kernel_layout(a.q), a.k = kernel_layout(a.k);
    maybe(a.beta, a.beta_per_channel());
    a.v = kernel_layout(a.v);
    maybe(a.g, variant.decay == Decay::key);
    maybe(a.erase, true), maybe(a.write, true);
    if (a.initial_state) a.initial_state = as_contiguous(*a.initial_state);
    if (a.cu_seqlens) a.cu_seqlens = as_contiguous(*a.cu_seqlens);
    return a;
}

Arguments padded(Variant const& variant, Arguments a) {
    int64_t const dK = padding(a.q), dV = padding(a.v);
    if (a.beta_per_channel()) a.beta = pad_last(a.beta, dV);
    if (variant.decay == Decay::key) a.g = pad_last(a.g, dK);
    a.q = pad_last(a.q, dK), a.k = pad_last(a.k, dK), a.v = pad_last(a.v, dV);
    a.erase = pad_last(a.erase, dK), a.write = pad_last(a.write, dK);
    a.initial_state = pad_state(a.initial_state, dK, dV);
    return a;
}

Rows rows_or_null(OptionalTensor const& t) {
    return t ? rows(*t) : Rows{};
}

Rows gate_rows(OptionalTensor const& t, bool channels) {
    return !t ? Rows{} : channels ? rows(*t) : scalar_rows(*t);
}

ScalarType type_of(OptionalTensor const& t, Tensor const& q) {
    return t ? t->scalar_type() : q.scalar_type();
}

DeltaParams params(Variant const& variant, Arguments const& a) {
    DeltaParams p{};
    p.transition = variant.transition;
    p.decay = a.decay(variant);
    p.beta_per_channel = a.beta_per_channel();
    p.dtype = to_dtype(a.q.scalar_type());
    p.gate_dtype = to_dtype(type_of(a.g, a.q));
    p.beta_dtype = to_dtype(type_of(a.beta, a.q));
    p.state_dtype = to_dtype(state_type(a.q));
    p.B = a.q.size(0), p.T = a.q.size(1), p.H = a.q.size(2), p.K = a.q.size(3);
    p.HV = a.v.size(2), p.V = a.v.size(3);
    p.N = a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : p.B;
    p.n = a.n;
    p.scale = a.scale;
    p.q = rows(a.q), p.k = rows(a.k), p.v = rows(a.v);
    p.g = gate_rows(a.g, variant.decay == Decay::key);
    p.beta = gate_rows(a.beta, p.beta_per_channel);
    p.erase = rows_or_null(a.erase), p.write = rows_or_null(a.write);
    if (a.initial_state) p.initial_state = a.initial_state->const_data_ptr();
    if (a.cu_seqlens) {
        p.cu_seqlens = a.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = a.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    return p;
}

void check_sequences(Checks const& c, Variant const& variant, Arguments const& a) {
    check(c, variant, a, false);
    check_cu_seqlens(c, a.cu_seqlens, a.q);
    int64_t const N = a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : a.q.size(0);
    check_state(c, a.initial_state, "initial_state", a.q, N, a.v.size(2), a.q.size(3), a.v.size(3));
}

std::tuple<Tensor, Tensor> forward(Variant const& variant, Arguments const& call,
                                   bool output_final_state) {
    Checks const c(variant.fwd);
    check_sequences(c, variant, call);
    Tensor const& q = call.q;
    if (needs_padding(q, call.v)) {
        auto [o, state] = forward(variant, padded(variant, call), output_final_state);
        return {cut(o, call.v.size(3)), cut_state(state, q.size(3), call.v.size(3))};
    }
    Arguments const a = in_layout(variant, call);
    DeltaParams p = params(variant, a);
    DeviceScope const scope(q);
    Tensor o = empty({p.B, p.T, p.HV, p.V}, q.scalar_type(), q);
    Tensor final_state = output_final_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                                            : empty({0}, state_type(q), q);
    p.o = rows(o);
    if (output_final_state) p.final_state = final_state.mutable_data_ptr();
    Tensor scratch = workspace(delta_fwd_workspace(p), q);
    delta_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {o, final_state};
}

struct Gradients {
    Tensor q, k, v, g, beta, erase, write, initial_state;
};

Gradients backward(Variant const& variant, Arguments const& call, Tensor const& grad_o,
                   OptionalTensor const& grad_final_state, bool need_dg) {
    Checks const c(variant.bwd);
    check_sequences(c, variant, call);
    Tensor const& q = call.q;
    int64_t const H = q.size(2), K = q.size(3), V = call.v.size(3);
    c.shape(grad_o, "grad_o", "[B, T, HV, V]", {q.size(0), q.size(1), call.v.size(2), V});
    c.dtype(grad_o, "grad_o", q.scalar_type(), " like q");
    c.device(grad_o, "grad_o", q, "q");
    int64_t const N = call.cu_seqlens ? call.cu_seqlens->size(0) - 1 : q.size(0);
    check_state(c, grad_final_state, "grad_final_state", q, N, call.v.size(2), K, V);
    if (needs_padding(q, call.v)) {
        int64_t const dK = padding(q), dV = padding(call.v);
        Gradients d = backward(variant, padded(variant, call), pad_last(grad_o, dV),
                               pad_state(grad_final_state, dK, dV), need_dg);
        auto const rows_cut = [](Tensor const& t, int64_t columns) {
            return t.dim() == 4 ? cut(t, columns) : t;  // scalars and absent results stay
        };
        return {cut(d.q, K),          cut(d.k, K),
                cut(d.v, V),          rows_cut(d.g, K),
                rows_cut(d.beta, V),  rows_cut(d.erase, K),
                rows_cut(d.write, K), cut_state(d.initial_state, K, V)};
    }
    Arguments const a = in_layout(variant, call);
    DeltaParams p = params(variant, a);
    DeviceScope const scope(q);
    Tensor const grad_o_rows = kernel_layout(grad_o);
    OptionalTensor grad_final;
    if (grad_final_state) grad_final = as_contiguous(*grad_final_state);
    auto const type = q.scalar_type();
    // Rounded before they are added up, gradients of value heads that cancel lose all they have.
    auto const key_type = p.HV == p.H ? type : state_type(q);
    auto const like_k = [&](bool wanted) {
        return wanted ? empty({p.B, p.T * p.n, p.HV, p.K}, key_type, q) : empty({0}, key_type, q);
    };
    auto const like = [&](OptionalTensor const& t, bool wanted) {
        return t && wanted ? empty(t->sizes(), t->scalar_type(), q) : empty({0}, type_of(t, q), q);
    };
    Gradients d{empty({p.B, p.T, p.HV, p.K}, key_type, q),
                like_k(true),
                empty({p.B, p.T * p.n, p.HV, p.V}, type, q),
                like(a.g, need_dg),
                like(a.beta, true),
                like_k(a.erase.has_value()),
                like_k(a.write.has_value()),
                a.initial_state ? empty({p.N, p.HV, p.K, p.V}, state_type(q), q)
                                : empty({0}, state_type(q), q)};
    p.grad_o = rows(grad_o_rows);
    if (grad_final) p.grad_final_state = grad_final->const_data_ptr();
    p.key_grad_dtype = to_dtype(key_type);
    p.dq = rows(d.q), p.dk = rows(d.k), p.dv = rows(d.v);
    if (a.g && need_dg) p.dg = gate_rows(d.g, variant.decay == Decay::key);
    if (a.beta) p.dbeta = gate_rows(d.beta, p.beta_per_channel);
    if (a.erase) p.derase = rows(d.erase);
    if (a.write) p.dwrite = rows(d.write);
    if (a.initial_state) p.grad_initial_state = d.initial_state.mutable_data_ptr();
    Tensor scratch = workspace(delta_bwd_workspace(p), q);
    delta_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    for (Tensor* const t : {&d.q, &d.k, &d.erase, &d.write}) *t = sum_groups(*t, H, type);
    return d;
}

Tensor one_step(Variant const& variant, Arguments a, Tensor const& state) {
    Checks const c(variant.step);
    check(c, variant, a, true);
    int64_t const rank = a.k.dim(), HV = a.v.size(rank - 2), V = a.v.size(rank - 1);
    int64_t const B = a.q.size(0), H = a.q.size(1), K = a.q.size(2);
    check_step_state(c, state, a.q, HV, K, V);
    DeviceScope const scope(a.q);
    bool const per_channel = a.beta_per_channel();
    for (Tensor* const t : {&a.q, &a.k, &a.v}) *t = last_contiguous(*t);
    for (OptionalTensor* const t : {&a.erase, &a.write}) {
        if (*t) *t = last_contiguous(**t);
    }
    if (a.g && variant.decay == Decay::key) a.g = last_contiguous(*a.g);
    if (per_channel) a.beta = last_contiguous(*a.beta);
    Tensor o = empty({B, HV, V}, a.q.scalar_type(), a.q);
    DeltaStepParams p{};
    p.transition = variant.transition;
    p.decay = a.decay(variant);
    p.beta_per_channel = per_channel;
    p.dtype = to_dtype(a.q.scalar_type());
    p.gate_dtype = to_dtype(type_of(a.g, a.q));
    p.beta_dtype = to_dtype(type_of(a.beta, a.q));
    p.state_dtype = to_dtype(state_type(a.q));
    p.B = B, p.H = H, p.HV = HV, p.K = K, p.V = V, p.n = a.n;
    p.scale = a.scale;
    p.q = rows(a.q), p.o = rows(o);
    p.k = step_rows(a.k, 4), p.v = step_rows(a.v, 4);
    p.g = gate_rows(a.g, variant.decay == Decay::key);
    if (a.beta) p.beta = step_rows(*a.beta, per_channel ? 4 : 3);
    if (a.erase) p.erase = step_rows(*a.erase, 4);
    if (a.write) p.write = step_rows(*a.write, 4);
    p.state = const_cast<void*>(state.const_data_ptr());
    delta_step(p, scope.stream());
    return o;
}

// The dispatcher wants plain functions; here they are, by what an operator takes.
struct DeltaRule {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          Tensor const& beta, OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state, int64_t n) {
        return forward(kDeltaRule, {q, k, v, {}, beta, {}, {}, scale, n, initial_state, cu_seqlens},
                       output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& beta,
        OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
        Tensor const& grad_o, OptionalTensor const& grad_final_state, int64_t n) {
        Gradients const d =
            backward(kDeltaRule, {q, k, v, {}, beta, {}, {}, scale, n, initial_state, cu_seqlens},
                     grad_o, grad_final_state, false);
        return {d.q, d.k, d.v, d.beta, d.initial_state};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& beta,
                       Tensor const& state, double scale, int64_t n) {
        return one_step(kDeltaRule, {q, k, v, {}, beta, {}, {}, scale, n}, state);
    }
};

template <Variant const& variant>
struct Gated {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          Tensor const& g, Tensor const& beta,
                                          OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state, int64_t n) {
        return forward(variant, {q, k, v, g, beta, {}, {}, scale, n, initial_state, cu_seqlens},
                       output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g, Tensor const& beta,
        OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens, double scale,
        Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg, int64_t n) {
        Gradients const d =
            backward(variant, {q, k, v, g, beta, {}, {}, scale, n, initial_state, cu_seqlens},
                     grad_o, grad_final_state, need_dg);
        return {d.q, d.k, d.v, d.g, d.beta, d.initial_state};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& g,
                       Tensor const& beta, Tensor const& state, double scale, int64_t n) {
        return one_step(variant, {q, k, v, g, beta, {}, {}, scale, n}, state);
    }
};

struct Comba {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          Tensor const& p, Tensor const& g, Tensor const& beta,
                                          OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state) {
        return forward(kComba, {q, k, v, g, beta, p, {}, scale, 1, initial_state, cu_seqlens},
                       output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& p, Tensor const& g,
        Tensor const& beta, OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
        double scale, Tensor const& grad_o, OptionalTensor const& grad_final_state, bool need_dg) {
        Gradients const d =
            backward(kComba, {q, k, v, g, beta, p, {}, scale, 1, initial_state, cu_seqlens}, grad_o,
                     grad_final_state, need_dg);
        return {d.q, d.k, d.v, d.erase, d.g, d.beta, d.initial_state};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& p,
                       Tensor const& g, Tensor const& beta, Tensor const& state, double scale) {
        return one_step(kComba, {q, k, v, g, beta, p, {}, scale}, state);
    }
};

struct Dplr {
    static std::tuple<Tensor, Tensor> fwd(Tensor const& q, Tensor const& k, Tensor const& v,
                                          Tensor const& a, Tensor const& b, OptionalTensor const& g,
                                          OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, double scale,
                                          bool output_final_state) {
        return forward(kDplr, {q, k, v, g, {}, a, b, scale, 1, initial_state, cu_seqlens},
                       output_final_state);
    }
    static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
        Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& a, Tensor const& b,
        OptionalTensor const& g, OptionalTensor const& initial_state,
        OptionalTensor const& cu_seqlens, double scale, Tensor const& grad_o,
        OptionalTensor const& grad_final_state, bool need_dg) {
        Gradients const d =
            backward(kDplr, {q, k, v, g, {}, a, b, scale, 1, initial_state, cu_seqlens}, grad_o,
                     grad_final_state, need_dg);
        return {d.q, d.k, d.v, d.erase, d.write, d.g, d.initial_state};
    }
    static Tensor step(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& a,
                       Tensor const& b, OptionalTensor const& g, Tensor const& state,
                       double scale) {
        return one_step(kDplr, {q, k, v, g, {}, a, b, scale}, state);
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
    implement<DeltaRule>(m, kDeltaRule);
    implement<Gated<kGatedDeltaRule>>(m, kGatedDeltaRule);
    implement<Gated<kKda>>(m, kKda);
    implement<Comba>(m, kComba);
    implement<Dplr>(m, kDplr);
}
