// The scan engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include "params/scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "layout.h"

namespace lsm {
namespace {

// The tensors of a call, by the names of the schemas. `a` is r in RG-LRU, `channel` its c.
struct Arguments {
    Scan kind;
    Tensor x;
    OptionalTensor i, a, channel;
    OptionalTensor initial_state, cu_seqlens, order;
    bool log = false, reverse = false;

    char const* gate_name() const { return kind == Scan::rg_lru ? "r" : "a"; }
};

bool is_complex(ScalarType type) {
    return type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
}

Dtype component_dtype(ScalarType type) {
    return type == ScalarType::ComplexFloat    ? Dtype::f32
           : type == ScalarType::ComplexDouble ? Dtype::f64
                                               : to_dtype(type);
}

// Of states and of what is per channel.
ScalarType number_type(Tensor const& x) {
    auto const type = x.scalar_type();
    return is_complex(type) || type == ScalarType::Double ? type : ScalarType::Float;
}

void check_dtype(Checks const& c, Arguments const& in) {
    auto const type = in.x.scalar_type();
    bool const complex_too = in.kind != Scan::rg_lru;
    c.require(is_floating(type) || (complex_too && is_complex(type)), "x must be bfloat16, float16",
              kTensorCores ? "" : ", float32, float64", kTensorCores ? " or float32" : "",
              complex_too ? (kTensorCores ? ", or complex64" : ", complex64 or complex128") : "",
              ", got ", name(type));
    c.require(!kTensorCores || component_dtype(type) != Dtype::f64, "x is ", name(type),
              ", which the CUDA kernels do not take (supported: bfloat16, float16, float32",
              complex_too ? ", complex64" : "", "); it runs on CPU tensors");
}

void check_token_tensor(Checks const& c, Tensor const& t, char const* arg, Tensor const& x,
                        bool float32_too) {
    if (x.dim() == 2) {
        c.shape(t, arg, "[B, D]", {x.size(0), x.size(1)}, " like x");
    } else {
        c.shape(t, arg, "[B, T, D]", {x.size(0), x.size(1), x.size(2)}, " like x");
    }
    float32_too =
        float32_too && is_floating(x.scalar_type()) && x.scalar_type() != ScalarType::Double;
    c.require(
        t.scalar_type() == x.scalar_type() || (float32_too && t.scalar_type() == ScalarType::Float),
        arg, " must have dtype ", name(x.scalar_type()), " like x",
        float32_too ? ", or float32" : "", ", got ", name(t.scalar_type()));
    c.device(t, arg, x, "x");
}

void check_inputs(Checks const& c, Arguments const& in, bool one_token) {
    c.rank(in.x, "x", one_token ? "[B, D]" : "[B, T, D]", one_token ? 2 : 3);
    check_dtype(c, in);
    int64_t const D = in.x.size(in.x.dim() - 1);
    c.require(D > 0, "D must be at least 1, got ", show(in.x.sizes()));
    if (in.i) check_token_tensor(c, *in.i, "i", in.x, false);
    if (in.a) check_token_tensor(c, *in.a, in.gate_name(), in.x, in.kind == Scan::token);
    if (in.channel) {
        char const* const arg = in.kind == Scan::rg_lru ? "c" : "a";
        c.shape(*in.channel, arg, "[D]", {D});
        c.dtype(*in.channel, arg, number_type(in.x));
        c.device(*in.channel, arg, in.x, "x");
    }
}

void check_state(Checks const& c, OptionalTensor const& state, char const* arg, Tensor const& x,
                 int64_t N) {
    if (!state) return;
    c.shape(*state, arg, "[N, D]", {N, x.size(x.dim() - 1)});
    c.dtype(*state, arg, number_type(x));
    c.device(*state, arg, x, "x");
}

// Puts every argument, checked, into the layout of the kernels.
ScanParams prepare(Arguments& in, bool one_token) {
    in.x = kernel_layout(in.x), in.i = kernel_layout(in.i), in.a = kernel_layout(in.a);
    in.channel = contiguous_or_none(in.channel);
    in.initial_state = contiguous_or_none(in.initial_state);
    in.cu_seqlens = contiguous_or_none(in.cu_seqlens);
    ScanParams p{};
    p.kind = in.kind, p.log = in.log, p.reverse = in.reverse;
    p.is_complex = is_complex(in.x.scalar_type());
    p.dtype = component_dtype(in.x.scalar_type());
    p.gate_dtype = in.a ? component_dtype(in.a->scalar_type()) : p.dtype;
    p.state_dtype = component_dtype(number_type(in.x));
    p.B = in.x.size(0), p.T = one_token ? 1 : in.x.size(1), p.D = in.x.size(in.x.dim() - 1);
    p.N = in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : p.B;
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    p.order = static_cast<int32_t const*>(data_or_null(in.order));
    p.x = token_rows(in.x);
    if (in.i) p.i = token_rows(*in.i);
    if (in.a) p.a = token_rows(*in.a);
    p.channel = data_or_null(in.channel);
    p.initial_state = data_or_null(in.initial_state);
    return p;
}

void check_sequences(Checks const& c, Arguments& in) {
    c.rank(in.x, "x", "[B, T, D]", 3);
    check_cu_seqlens(c, in.cu_seqlens, in.x, "x");
    in.order = prepare_order(c, in.order, in.x, "x");
    check_state(c, in.initial_state, "initial_state", in.x,
                in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : in.x.size(0));
}

// Odd sizes on CUDA: zero-filled up to whole 16-byte rows (a channel of zeros stays zero), then cut back.
int64_t missing_channels(Tensor const& x) {
    return kTensorCores ? padding(x) : 0;
}

Arguments pad_all(Arguments const& in, int64_t columns) {
    Arguments wide = in;
    wide.x = pad_last(in.x, columns), wide.i = pad_last(in.i, columns);
    wide.a = pad_last(in.a, columns), wide.channel = pad_last(in.channel, columns);
    wide.initial_state = pad_last(in.initial_state, columns);
    return wide;
}

std::tuple<Tensor, Tensor> forward(char const* op, Arguments in, bool output_final_state) {
    Checks const c(op);
    check_inputs(c, in, false);
    if (int64_t const columns = missing_channels(in.x); columns != 0) {
        check_sequences(c, in);
        int64_t const D = in.x.size(2);
        auto [h, state] = forward(op, pad_all(in, columns), output_final_state);
        return {cut_channels(h, D), cut_channels(state, D)};
    }
    check_sequences(c, in);
    ScanParams p = prepare(in, false);
    DeviceScope const scope(in.x);
    Tensor h = empty({p.B, p.T, p.D}, in.x.scalar_type(), in.x);
    Tensor final_state = output_final_state ? empty({p.N, p.D}, number_type(in.x), in.x)
                                            : empty({0}, number_type(in.x), in.x);
    p.h = token_rows(h);
    if (output_final_state) p.final_state = final_state.mutable_data_ptr();
    Scratch const scratch(scan_fwd_workspace(p), in.x);
    scan_fwd(p, scratch.data(), scope.stream());
    return {h, final_state};
}

struct Gradients {
    Tensor x, i, a, channel, initial_state;
};

Gradients backward(char const* op, Arguments in, Tensor const& h, Tensor const& grad_h,
                   OptionalTensor const& grad_final_state, bool need_da) {
    Checks const c(op);
    check_inputs(c, in, false);
    check_token_tensor(c, h, "h", in.x, false);
    check_token_tensor(c, grad_h, "grad_h", in.x, false);
    check_sequences(c, in);
    check_state(c, grad_final_state, "grad_final_state", in.x,
                in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : in.x.size(0));
    if (int64_t const columns = missing_channels(in.x); columns != 0) {
        int64_t const D = in.x.size(2);
        auto [dx, di, da, dchannel, dh0] =
            backward(op, pad_all(in, columns), pad_last(h, columns), pad_last(grad_h, columns),
                     pad_last(grad_final_state, columns), need_da);
        return {cut_channels(dx, D), cut_channels(di, D), cut_channels(da, D),
                cut_channels(dchannel, D), cut_channels(dh0, D)};
    }
    ScanParams p = prepare(in, false);
    DeviceScope const scope(in.x);
    Tensor const h_rows = kernel_layout(h), grad_rows = kernel_layout(grad_h);
    OptionalTensor const grad_final = contiguous_or_none(grad_final_state);
    auto const type = in.x.scalar_type();
    auto const nothing = [&](ScalarType t) { return empty({0}, t, in.x); };
    auto const tokens = [&](ScalarType t) { return empty({p.B, p.T, p.D}, t, in.x); };
    Tensor dx = tokens(type), di = in.i ? tokens(type) : nothing(type);
    Tensor da = in.a && need_da ? tokens(in.a->scalar_type()) : nothing(type);
    Tensor dchannel =
        in.channel && need_da ? empty({p.D}, number_type(in.x), in.x) : nothing(number_type(in.x));
    Tensor dh0 =
        in.initial_state ? empty({p.N, p.D}, number_type(in.x), in.x) : nothing(number_type(in.x));
    p.h = token_rows(h_rows), p.grad_h = token_rows(grad_rows);
    p.grad_final_state = data_or_null(grad_final);
    p.dx = token_rows(dx);
    if (in.i) p.di = token_rows(di);
    if (in.a && need_da) p.da = token_rows(da);
    if (in.channel && need_da) p.channel_grad = dchannel.mutable_data_ptr();
    if (in.initial_state) p.grad_initial_state = dh0.mutable_data_ptr();
    Scratch const scratch(scan_bwd_workspace(p), in.x);
    scan_bwd(p, scratch.data(), scope.stream());
    return {dx, di, da, dchannel, dh0};
}

// A forward over one token that starts and ends in the same memory.
Tensor one_step(char const* op, Arguments in, Tensor const& state) {
    Checks const c(op);
    check_inputs(c, in, true);
    check_state(c, state, "state", in.x, in.x.size(0));
    c.require(state.is_contiguous(),
              "state is updated in place and must be contiguous, got strides ",
              show(state.strides()));
    if (int64_t const columns = missing_channels(in.x); columns != 0) {
        int64_t const D = in.x.size(1);
        Tensor wide = pad_last(state, columns);
        Tensor const h = one_step(op, pad_all(in, columns), wide);
        Tensor original = state;
        torch::stable::copy_(original, cut_channels(wide, D));
        return cut_channels(h, D);
    }
    ScanParams p = prepare(in, true);
    DeviceScope const scope(in.x);
    Tensor h = empty({p.B, p.D}, in.x.scalar_type(), in.x);
    p.h = token_rows(h);
    p.initial_state = state.const_data_ptr();
    p.final_state = const_cast<void*>(state.const_data_ptr());
    Scratch const scratch(scan_fwd_workspace(p), in.x);
    scan_fwd(p, scratch.data(), scope.stream());
    return h;
}

Arguments gated(Tensor const& x, Tensor const& a, OptionalTensor const& initial_state,
                OptionalTensor const& cu_seqlens, OptionalTensor const& order, bool log,
                bool reverse) {
    Arguments in{a.dim() == 1 ? Scan::constant : Scan::token,
                 x,
                 {},
                 {},
                 {},
                 initial_state,
                 cu_seqlens,
                 order,
                 log,
                 reverse};
    (a.dim() == 1 ? in.channel : in.a) = a;
    return in;
}

std::tuple<Tensor, Tensor> scan_fwd_op(Tensor const& x, Tensor const& a,
                                       OptionalTensor const& initial_state,
                                       OptionalTensor const& cu_seqlens,
                                       OptionalTensor const& order, bool log, bool reverse,
                                       bool output_final_state) {
    return forward("scan_fwd", gated(x, a, initial_state, cu_seqlens, order, log, reverse),
                   output_final_state);
}

std::tuple<Tensor, Tensor, Tensor> scan_bwd_op(
    Tensor const& x, Tensor const& a, OptionalTensor const& initial_state,
    OptionalTensor const& cu_seqlens, OptionalTensor const& order, bool log, bool reverse,
    Tensor const& h, Tensor const& grad_h, OptionalTensor const& grad_final_state, bool need_da) {
    auto const grads =
        backward("scan_bwd", gated(x, a, initial_state, cu_seqlens, order, log, reverse), h, grad_h,
                 grad_final_state, need_da);
    return {grads.x, a.dim() == 1 ? grads.channel : grads.a, grads.initial_state};
}

Tensor scan_step_op(Tensor const& x, Tensor const& a, Tensor const& state, bool log) {
    Arguments in = gated(x, a, {}, {}, {}, log, false);
    return one_step("scan_step", in, state);
}

Arguments rg_lru(Tensor const& x, Tensor const& i, Tensor const& r, Tensor const& c,
                 OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
                 OptionalTensor const& order, bool reverse) {
    return {Scan::rg_lru, x, i, r, c, initial_state, cu_seqlens, order, true, reverse};
}

std::tuple<Tensor, Tensor> rg_lru_fwd_op(Tensor const& x, Tensor const& i, Tensor const& r,
                                         Tensor const& c, OptionalTensor const& initial_state,
                                         OptionalTensor const& cu_seqlens,
                                         OptionalTensor const& order, bool reverse,
                                         bool output_final_state) {
    return forward("rg_lru_fwd", rg_lru(x, i, r, c, initial_state, cu_seqlens, order, reverse),
                   output_final_state);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rg_lru_bwd_op(
    Tensor const& x, Tensor const& i, Tensor const& r, Tensor const& c,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    OptionalTensor const& order, bool reverse, Tensor const& h, Tensor const& grad_h,
    OptionalTensor const& grad_final_state) {
    auto const grads =
        backward("rg_lru_bwd", rg_lru(x, i, r, c, initial_state, cu_seqlens, order, reverse), h,
                 grad_h, grad_final_state, true);
    return {grads.x, grads.i, grads.a, grads.channel, grads.initial_state};
}

Tensor rg_lru_step_op(Tensor const& x, Tensor const& i, Tensor const& r, Tensor const& c,
                      Tensor const& state) {
    return one_step("rg_lru_step", rg_lru(x, i, r, c, {}, {}, {}, false), state);
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("scan_fwd", TORCH_BOX(&scan_fwd_op));
    m.impl("scan_bwd", TORCH_BOX(&scan_bwd_op));
    m.impl("scan_step", TORCH_BOX(&scan_step_op));
    m.impl("rg_lru_fwd", TORCH_BOX(&rg_lru_fwd_op));
    m.impl("rg_lru_bwd", TORCH_BOX(&rg_lru_bwd_op));
    m.impl("rg_lru_step", TORCH_BOX(&rg_lru_step_op));
}
