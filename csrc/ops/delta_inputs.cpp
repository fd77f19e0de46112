// What comes before the delta rules: check, allocate, fill the params, run. Compiled once per backend.
#include "params/delta_inputs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/layout.h"

namespace lsm {
namespace {

// The tensors of a call by the names of the schemas.
struct Arguments {
    OptionalTensor q, k, g, beta, A_log, dt_bias;
    bool by_channel;
    std::optional<double> lower_bound;
    double strength, eps;
};

Tensor nothing(Tensor const& like) {
    return empty({0}, like.scalar_type(), like);
}

void check_rows(Checks const& c, OptionalTensor const& x, char const* arg) {
    if (!x) return;
    c.require(x->dim() == 3 || x->dim() == 4, arg,
              " must have shape [B, H, K] or [B, T, H, K], got ", show(x->sizes()));
    check_floating(c, *x, arg);
}

void check_parameter(Checks const& c, OptionalTensor const& x, char const* arg, char const* dims,
                     int64_t count, Tensor const& g) {
    if (!x) return;
    c.shape(*x, arg, dims, {count});
    c.dtype(*x, arg, state_type(g));
    c.device(*x, arg, g, "g");
}

void check(Checks const& c, Arguments const& a) {
    check_rows(c, a.q, "q");
    check_rows(c, a.k, "k");
    if (a.beta) {
        c.require(a.beta->dim() >= 1, "beta must have shape [..., HV], got []");
        check_floating(c, *a.beta, "beta");
    }
    c.require(a.g || (!a.A_log && !a.dt_bias), "A_log and dt_bias need g");
    if (!a.g) return;
    Tensor const& g = *a.g;
    int64_t const rank = g.dim(), heads = a.by_channel ? 2 : 1;
    c.require(rank >= heads, "g must have shape ", a.by_channel ? "[..., HV, K]" : "[..., HV]",
              ", got ", show(g.sizes()));
    check_floating(c, g, "g");
    int64_t const HV = g.size(rank - heads), K = a.by_channel ? g.size(rank - 1) : 1;
    check_parameter(c, a.A_log, "A_log", "[HV]", HV, g);
    check_parameter(c, a.dt_bias, "dt_bias", a.by_channel ? "[HV * K]" : "[HV]", HV * K, g);
    c.require(a.lower_bound || a.A_log, "A_log must be given where lower_bound is not");
    c.require(!a.lower_bound || *a.lower_bound < 0, "lower_bound must be below 0, got ",
              a.lower_bound.value_or(0));
}

// Of a tensor with heads, or of one whose last `columns` numbers are a row.
DeltaInput input(Tensor const& x) {
    DeltaInput part;
    bool const one_token = x.dim() == 3;
    part.x = rows(x);
    part.B = x.size(0), part.T = one_token ? 1 : x.size(1);
    part.H = x.size(x.dim() - 2), part.D = x.size(x.dim() - 1);
    part.dtype = to_dtype(x.scalar_type());
    if (part.H * part.D == 0) part.B = 0;
    return part;
}

Rows flat_rows(Tensor const& x, int64_t H, int64_t D) {
    return {const_cast<void*>(x.const_data_ptr()), 0, H * D, D};
}

DeltaInput flat_input(Tensor const& x, int64_t H, int64_t D) {
    DeltaInput part;
    part.x = flat_rows(x, H, D);
    part.H = H, part.D = D;
    part.B = H * D == 0 ? 0 : 1;
    part.T = part.B == 0 ? 0 : x.numel() / (H * D);
    part.dtype = to_dtype(x.scalar_type());
    return part;
}

// In the layouts of the kernels; the tensors live in `a`.
DeltaInputsParams prepare(Arguments& a) {
    DeltaInputsParams p{};
    p.eps = a.eps, p.strength = a.strength, p.by_channel = a.by_channel;
    p.bounded = a.lower_bound.has_value(), p.lower_bound = a.lower_bound.value_or(0);
    if (a.q) a.q = last_contiguous(*a.q), p.q = input(*a.q);
    if (a.k) a.k = last_contiguous(*a.k), p.k = input(*a.k);
    a.A_log = contiguous_or_none(a.A_log), a.dt_bias = contiguous_or_none(a.dt_bias);
    p.A_log = data_or_null(a.A_log), p.dt_bias = data_or_null(a.dt_bias);
    if (a.g) {
        a.g = as_contiguous(*a.g);
        int64_t const last = a.g->size(a.g->dim() - 1);
        p.g = flat_input(*a.g, a.by_channel ? a.g->size(a.g->dim() - 2) : 1, last);
    }
    if (a.beta) {
        a.beta = as_contiguous(*a.beta);
        p.beta = flat_input(*a.beta, 1, a.beta->size(a.beta->dim() - 1));
    }
    return p;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor const& any_of(Arguments const& a) {
    return a.q ? *a.q : a.k ? *a.k : a.g ? *a.g : *a.beta;
}

Results forward(Checks const& c, Arguments a) {
    c.require(a.q || a.k || a.g || a.beta, "needs one of q, k, g and beta");
    check(c, a);
    DeltaInputsParams p = prepare(a);
    Tensor const like = any_of(a);
    DeviceScope const scope(like);
    auto const rows_like = [&](OptionalTensor const& x, DeltaInput& part) {
        if (!x) return nothing(like);
        Tensor const y = empty(x->sizes(), x->scalar_type(), *x);
        part.y = rows(y);
        return y;
    };
    auto const wide_like = [&](OptionalTensor const& x, DeltaInput& part) {
        if (!x) return nothing(like);
        Tensor const y = empty(x->sizes(), state_type(*x), *x);
        part.y = flat_rows(y, part.H, part.D);
        return y;
    };
    Results const results{rows_like(a.q, p.q), rows_like(a.k, p.k), wide_like(a.g, p.g),
                          wide_like(a.beta, p.beta)};
    delta_inputs_fwd(p, scope.stream());
    return results;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Upstream {
    OptionalTensor q, k, g, beta;
};

// What has no gradient is left out.
Gradients backward(Checks const& c, Arguments a, Upstream up) {
    c.require(a.q || a.k || a.g || a.beta, "needs one of q, k, g and beta");
    check(c, a);
    auto const check_grad = [&](OptionalTensor const& grad, OptionalTensor const& x,
                                char const* arg, bool wide) {
        if (!grad) return;
        c.require(x && show(grad->sizes()) == show(x->sizes()), arg,
                  " must have the shape of what it is the gradient of, got ", show(grad->sizes()));
        c.dtype(*grad, arg, wide ? state_type(*x) : x->scalar_type());
        c.device(*grad, arg, *x, arg + 5);
    };
    check_grad(up.q, a.q, "grad_q", false);
    check_grad(up.k, a.k, "grad_k", false);
    check_grad(up.g, a.g, "grad_g", true);
    check_grad(up.beta, a.beta, "grad_beta", true);
    Tensor const like = any_of(a);
    if (!up.q) a.q.reset();
    if (!up.k) a.k.reset();
    if (!up.beta) a.beta.reset();
    if (!up.g) a.g.reset(), a.A_log.reset(), a.dt_bias.reset();
    DeltaInputsParams p = prepare(a);
    DeviceScope const scope(like);
    auto const rows_grad = [&](OptionalTensor& grad, OptionalTensor const& x, DeltaInput& part) {
        if (!x) return nothing(like);
        grad = last_contiguous(*grad);
        Tensor const dx = empty(x->sizes(), x->scalar_type(), *x);
        part.grad_y = rows(*grad), part.dx = rows(dx);
        return dx;
    };
    auto const flat_grad = [&](OptionalTensor& grad, OptionalTensor const& x, DeltaInput& part) {
        if (!x) return nothing(like);
        grad = as_contiguous(*grad);
        Tensor const dx = empty(x->sizes(), x->scalar_type(), *x);
        part.grad_y = flat_rows(*grad, part.H, part.D), part.dx = flat_rows(dx, part.H, part.D);
        return dx;
    };
    auto const parameter_grad = [&](OptionalTensor const& x, void*& to) {
        if (!x) return nothing(like);
        Tensor const dx = empty(x->sizes(), x->scalar_type(), *x);
        to = dx.mutable_data_ptr();
        return dx;
    };
    Gradients const results{
        rows_grad(up.q, a.q, p.q),         rows_grad(up.k, a.k, p.k),
        flat_grad(up.g, a.g, p.g),         flat_grad(up.beta, a.beta, p.beta),
        parameter_grad(a.A_log, p.dA_log), parameter_grad(a.dt_bias, p.ddt_bias)};
    Tensor scratch = workspace(delta_inputs_bwd_workspace(p), like);
    delta_inputs_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return results;
}

Results forward_op(OptionalTensor const& q, OptionalTensor const& k, OptionalTensor const& g,
                   OptionalTensor const& beta, OptionalTensor const& A_log,
                   OptionalTensor const& dt_bias, bool by_channel,
                   std::optional<double> const& lower_bound, double strength, double eps) {
    return forward(Checks("delta_inputs_fwd"),
                   {q, k, g, beta, A_log, dt_bias, by_channel, lower_bound, strength, eps});
}

Gradients backward_op(OptionalTensor const& q, OptionalTensor const& k, OptionalTensor const& g,
                      OptionalTensor const& beta, OptionalTensor const& A_log,
                      OptionalTensor const& dt_bias, bool by_channel,
                      std::optional<double> const& lower_bound, double strength, double eps,
                      OptionalTensor const& grad_q, OptionalTensor const& grad_k,
                      OptionalTensor const& grad_g, OptionalTensor const& grad_beta) {
    return backward(Checks("delta_inputs_bwd"),
                    {q, k, g, beta, A_log, dt_bias, by_channel, lower_bound, strength, eps},
                    {grad_q, grad_k, grad_g, grad_beta});
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    m.impl("delta_inputs_fwd", TORCH_BOX(&lsm::forward_op));
    m.impl("delta_inputs_bwd", TORCH_BOX(&lsm::backward_op));
}
