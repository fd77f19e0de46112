// RWKV-4's running average: check, allocate, fill the params, run. Compiled once per backend.
#include "params/wkv4.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "layout.h"

namespace lsm {
namespace {

struct State {
    OptionalTensor numerator, denominator, scale;
};

// The tensors of a call, by the names of the schemas; without the T dimension in a step.
struct Arguments {
    Tensor r, u, k, v;
    State state;
    OptionalTensor cu_seqlens;
};

void check_tokens(Checks const& c, Tensor const& t, char const* arg, Tensor const& k) {
    if (k.dim() == 2) {
        c.shape(t, arg, "[B, D]", {k.size(0), k.size(1)}, " like k");
    } else {
        c.shape(t, arg, "[B, T, D]", {k.size(0), k.size(1), k.size(2)}, " like k");
    }
    c.dtype(t, arg, k.scalar_type(), " like k");
    c.device(t, arg, k, "k");
}

void check_channels(Checks const& c, Tensor const& t, char const* arg, Tensor const& k) {
    c.shape(t, arg, "[D]", {k.size(k.dim() - 1)});
    c.dtype(t, arg, state_type(k));
    c.device(t, arg, k, "k");
}

int64_t sequences(Arguments const& in) {
    return in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : in.k.size(0);
}

void check_states(Checks const& c, OptionalTensor const& t, char const* arg, Arguments const& in) {
    if (!t) return;
    c.shape(*t, arg, "[N, D]", {sequences(in), in.k.size(in.k.dim() - 1)});
    c.dtype(*t, arg, state_type(in.k));
    c.device(*t, arg, in.k, "k");
}

void check_inputs(Checks const& c, Arguments const& in, bool one_token) {
    c.rank(in.k, "k", one_token ? "[B, D]" : "[B, T, D]", one_token ? 2 : 3);
    auto const type = in.k.scalar_type();
    c.require(is_floating(type), "k must be bfloat16, float16",
              kTensorCores ? " or float32" : ", float32 or float64", ", got ", name(type));
    c.require(!kTensorCores || type != ScalarType::Double,
              "k is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
              "float32); it runs on CPU tensors");
    c.require(in.k.size(in.k.dim() - 1) > 0, "D must be at least 1, got ", show(in.k.sizes()));
    check_tokens(c, in.v, "v", in.k);
    check_channels(c, in.r, "r", in.k);
    check_channels(c, in.u, "u", in.k);
    if (!one_token) check_cu_seqlens(c, in.cu_seqlens, in.k, "k");
    c.require(in.state.numerator.has_value() == in.state.denominator.has_value() &&
                  in.state.numerator.has_value() == in.state.scale.has_value(),
              "numerator, denominator and scale of a state must come together");
    check_states(c, in.state.numerator, "numerator", in);
    check_states(c, in.state.denominator, "denominator", in);
    check_states(c, in.state.scale, "scale", in);
}

// Odd sizes on CUDA: zero-filled up to whole 16-byte rows, then cut back.
int64_t missing_channels(Arguments const& in) {
    return kTensorCores ? padding(in.k) : 0;
}

State pad_all(State const& state, int64_t columns) {
    return {pad_last(state.numerator, columns), pad_last(state.denominator, columns),
            pad_last(state.scale, columns)};
}

Arguments pad_all(Arguments const& in, int64_t columns) {
    return {pad_last(in.r, columns), pad_last(in.u, columns),    pad_last(in.k, columns),
            pad_last(in.v, columns), pad_all(in.state, columns), in.cu_seqlens};
}

// Puts every argument into the layout of the kernels; the tensors live in `in`.
Wkv4Params prepare(Arguments& in, bool one_token) {
    in.k = kernel_layout(in.k), in.v = kernel_layout(in.v);
    in.r = kernel_layout(in.r), in.u = kernel_layout(in.u);
    for (auto* t : {&in.state.numerator, &in.state.denominator, &in.state.scale, &in.cu_seqlens})
        *t = contiguous_or_none(*t);
    Wkv4Params p{};
    p.dtype = to_dtype(in.k.scalar_type()), p.gate_dtype = p.dtype;
    p.state_dtype = to_dtype(state_type(in.k));
    p.B = in.k.size(0), p.T = one_token ? 1 : in.k.size(1), p.D = in.k.size(in.k.dim() - 1);
    p.N = sequences(in);
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    p.a = token_rows(in.k), p.x = token_rows(in.v);
    p.channel = in.r.const_data_ptr(), p.bonus = in.u.const_data_ptr();
    p.initial_state = data_or_null(in.state.numerator);
    p.initial_denominator = data_or_null(in.state.denominator);
    p.initial_scale = data_or_null(in.state.scale);
    return p;
}

void run_forward(Wkv4Params const& p, Tensor const& like, void* stream) {
    Scratch const scratch(wkv4_fwd_workspace(p), like);
    wkv4_fwd(p, scratch.data(), stream);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward forward(Checks const& c, Arguments in, bool save_states, bool output_final_state) {
    check_inputs(c, in, false);
    if (int64_t const columns = missing_channels(in); columns != 0) {
        int64_t const D = in.k.size(2);
        auto [o, numerator, denominator, scale, states] =
            forward(c, pad_all(in, columns), save_states, output_final_state);
        return {cut_channels(o, D), cut_channels(numerator, D), cut_channels(denominator, D),
                cut_channels(scale, D), states};
    }
    Wkv4Params p = prepare(in, false);
    DeviceScope const scope(in.k);
    auto const type = state_type(in.k);
    auto const final_state = [&] {
        return output_final_state ? empty({p.N, p.D}, type, in.k) : empty({0}, type, in.k);
    };
    Tensor o = empty({p.B, p.T, p.D}, in.v.scalar_type(), in.k);
    Tensor numerator = final_state(), denominator = final_state(), scale = final_state();
    // Flat, and as wide as CUDA's rows everywhere: nobody but the backward looks into it.
    int64_t const width = (p.D + 7) / 8 * 8;
    Tensor states = empty({save_states ? wkv4_tiles(p) * 3 * width : 0}, type, in.k);
    p.h = token_rows(o);
    if (save_states) p.states = states.mutable_data_ptr();
    if (output_final_state) {
        p.final_state = numerator.mutable_data_ptr();
        p.final_denominator = denominator.mutable_data_ptr();
        p.final_scale = scale.mutable_data_ptr();
    }
    run_forward(p, in.k, scope.stream());
    return {o, numerator, denominator, scale, states};
}

Forward forward_op(Tensor const& r, Tensor const& u, Tensor const& k, Tensor const& v,
                   OptionalTensor const& numerator, OptionalTensor const& denominator,
                   OptionalTensor const& scale, OptionalTensor const& cu_seqlens, bool save_states,
                   bool output_final_state) {
    return forward(Checks("wkv4_fwd"), {r, u, k, v, {numerator, denominator, scale}, cu_seqlens},
                   save_states, output_final_state);
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// `last`: the gradients of the final numerator and denominator, and the final scale.
Backward backward(Checks const& c, Arguments in, Tensor const& states, Tensor const& grad_o,
                  State const& last) {
    check_inputs(c, in, false);
    check_tokens(c, grad_o, "grad_o", in.k);
    check_states(c, last.numerator, "grad_numerator", in);
    check_states(c, last.denominator, "grad_denominator", in);
    check_states(c, last.scale, "final_scale", in);
    c.require(last.numerator.has_value() == last.denominator.has_value() &&
                  (!last.numerator || last.scale),
              "grad_numerator and grad_denominator must come together, and with final_scale");
    c.dtype(states, "states", state_type(in.k));
    c.device(states, "states", in.k, "k");
    if (int64_t const columns = missing_channels(in); columns != 0) {
        int64_t const D = in.k.size(2);
        auto [channels, dk, dv, numerator, denominator] = backward(
            c, pad_all(in, columns), states, pad_last(grad_o, columns), pad_all(last, columns));
        return {cut(channels, D), cut(dk, D), cut(dv, D), cut_channels(numerator, D),
                cut_channels(denominator, D)};
    }
    Wkv4Params p = prepare(in, false);
    int64_t const expected = wkv4_tiles(p) * 3 * ((p.D + 7) / 8 * 8);
    c.shape(states, "states", "[tiles * 3 * D]", {expected});
    DeviceScope const scope(in.k);
    Tensor const saved = as_contiguous(states), grad_rows = kernel_layout(grad_o);
    OptionalTensor const grad_numerator = contiguous_or_none(last.numerator);
    OptionalTensor const grad_denominator = contiguous_or_none(last.denominator);
    OptionalTensor const final_scale = contiguous_or_none(last.scale);
    auto const type = state_type(in.k);
    auto const tokens = [&] { return empty({p.B, p.T, p.D}, in.k.scalar_type(), in.k); };
    auto const first = [&] {
        return in.state.numerator ? empty({p.N, p.D}, type, in.k) : empty({0}, type, in.k);
    };
    Tensor channels = empty({2, p.D}, type, in.k), dk = tokens(), dv = tokens();
    Tensor numerator = first(), denominator = first();
    p.states = const_cast<void*>(saved.const_data_ptr());
    p.grad_h = token_rows(grad_rows);
    p.grad_final_state = data_or_null(grad_numerator);
    p.grad_final_denominator = data_or_null(grad_denominator);
    p.final_scale = const_cast<void*>(data_or_null(final_scale));
    p.da = token_rows(dk), p.dx = token_rows(dv);
    p.channel_grad = channels.mutable_data_ptr();
    if (in.state.numerator) {
        p.grad_initial_state = numerator.mutable_data_ptr();
        p.grad_initial_denominator = denominator.mutable_data_ptr();
    }
    Scratch const scratch(wkv4_bwd_workspace(p), in.k);
    wkv4_bwd(p, scratch.data(), scope.stream());
    return {channels, dk, dv, numerator, denominator};
}

Backward backward_op(Tensor const& r, Tensor const& u, Tensor const& k, Tensor const& v,
                     OptionalTensor const& numerator, OptionalTensor const& denominator,
                     OptionalTensor const& scale, OptionalTensor const& cu_seqlens,
                     Tensor const& states, OptionalTensor const& final_scale, Tensor const& grad_o,
                     OptionalTensor const& grad_numerator, OptionalTensor const& grad_denominator) {
    return backward(Checks("wkv4_bwd"), {r, u, k, v, {numerator, denominator, scale}, cu_seqlens},
                    states, grad_o, {grad_numerator, grad_denominator, final_scale});
}

// Both directions.
Tensor both_forward(Checks const& c, Arguments in) {
    check_inputs(c, in, false);
    if (int64_t const columns = missing_channels(in); columns != 0)
        return cut_channels(both_forward(c, pad_all(in, columns)), in.k.size(2));
    Wkv4Params p = prepare(in, false);
    DeviceScope const scope(in.k);
    Tensor o = empty({p.B, p.T, p.D}, in.v.scalar_type(), in.k);
    p.h = token_rows(o);
    Scratch const scratch(bi_wkv_fwd_workspace(p), in.k);
    bi_wkv_fwd(p, scratch.data(), scope.stream());
    return o;
}

Tensor both_forward_op(Tensor const& r, Tensor const& u, Tensor const& k, Tensor const& v) {
    return both_forward(Checks("bi_wkv_fwd"), {r, u, k, v, {}, {}});
}

using BothGradients = std::tuple<Tensor, Tensor, Tensor>;

BothGradients both_backward(Checks const& c, Arguments in, Tensor const& grad_o) {
    check_inputs(c, in, false);
    check_tokens(c, grad_o, "grad_o", in.k);
    if (int64_t const columns = missing_channels(in); columns != 0) {
        int64_t const D = in.k.size(2);
        auto [channels, dk, dv] = both_backward(c, pad_all(in, columns), pad_last(grad_o, columns));
        return {cut(channels, D), cut(dk, D), cut(dv, D)};
    }
    Wkv4Params p = prepare(in, false);
    DeviceScope const scope(in.k);
    Tensor const grad_rows = kernel_layout(grad_o);
    auto const tokens = [&] { return empty({p.B, p.T, p.D}, in.k.scalar_type(), in.k); };
    Tensor channels = empty({2, p.D}, state_type(in.k), in.k), dk = tokens(), dv = tokens();
    p.grad_h = token_rows(grad_rows);
    p.da = token_rows(dk), p.dx = token_rows(dv);
    p.channel_grad = channels.mutable_data_ptr();
    Scratch const scratch(bi_wkv_bwd_workspace(p), in.k);
    bi_wkv_bwd(p, scratch.data(), scope.stream());
    return {channels, dk, dv};
}

BothGradients both_backward_op(Tensor const& r, Tensor const& u, Tensor const& k, Tensor const& v,
                               Tensor const& grad_o) {
    return both_backward(Checks("bi_wkv_bwd"), {r, u, k, v, {}, {}}, grad_o);
}

// A forward over one token that starts and ends in the same memory.
Tensor one_step(Checks const& c, Arguments in) {
    check_inputs(c, in, true);
    auto const in_place = [&](Tensor const& t, char const* arg) {
        c.require(t.is_contiguous(), arg,
                  " is updated in place and must be contiguous, got strides ", show(t.strides()));
    };
    in_place(*in.state.numerator, "numerator");
    in_place(*in.state.denominator, "denominator");
    in_place(*in.state.scale, "scale");
    if (int64_t const columns = missing_channels(in); columns != 0) {
        int64_t const D = in.k.size(1);
        Arguments const wide = pad_all(in, columns);
        Tensor const o = one_step(c, wide);
        auto const put_back = [&](OptionalTensor const& from, OptionalTensor const& to) {
            Tensor original = *to;
            torch::stable::copy_(original, cut(*from, D));
        };
        put_back(wide.state.numerator, in.state.numerator);
        put_back(wide.state.denominator, in.state.denominator);
        put_back(wide.state.scale, in.state.scale);
        return cut(o, D);
    }
    Wkv4Params p = prepare(in, true);
    DeviceScope const scope(in.k);
    Tensor o = empty({p.B, p.D}, in.v.scalar_type(), in.k);
    p.h = token_rows(o);
    p.final_state = const_cast<void*>(p.initial_state);
    p.final_denominator = const_cast<void*>(p.initial_denominator);
    p.final_scale = const_cast<void*>(p.initial_scale);
    run_forward(p, in.k, scope.stream());
    return o;
}

Tensor step_op(Tensor const& r, Tensor const& u, Tensor const& k, Tensor const& v,
               Tensor const& numerator, Tensor const& denominator, Tensor const& scale) {
    return one_step(Checks("wkv4_step"), {r, u, k, v, {numerator, denominator, scale}, {}});
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    m.impl("wkv4_fwd", TORCH_BOX(&lsm::forward_op));
    m.impl("wkv4_bwd", TORCH_BOX(&lsm::backward_op));
    m.impl("wkv4_step", TORCH_BOX(&lsm::step_op));
    m.impl("bi_wkv_fwd", TORCH_BOX(&lsm::both_forward_op));
    m.impl("bi_wkv_bwd", TORCH_BOX(&lsm::both_backward_op));
}
