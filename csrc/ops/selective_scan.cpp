// The selective scan's operators: check, allocate, fill the params, run. Compiled once per backend.
#include "params/selective_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "layout.h"

namespace lsm {
namespace {

// The tensors of a call, by the names of the schemas; without the T dimension in a step.
struct Arguments {
    Tensor u, dt, A, B, C;
    OptionalTensor skip, z, dt_bias, initial_state, cu_seqlens, order;
    bool softplus = false;
};

bool is_complex(Tensor const& t) {
    return t.scalar_type() == ScalarType::ComplexFloat ||
           t.scalar_type() == ScalarType::ComplexDouble;
}

// Of A, of B and C of channels, and of states.
ScalarType number_type(Arguments const& in) {
    bool const f64 = in.u.scalar_type() == ScalarType::Double;
    if (is_complex(in.A)) return f64 ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
    return f64 ? ScalarType::Double : ScalarType::Float;
}

// Of B and C of tokens.
ScalarType token_number_type(Arguments const& in) {
    return is_complex(in.A) ? number_type(in) : in.u.scalar_type();
}

void check_tokens(Checks const& c, Tensor const& t, char const* arg, Tensor const& u) {
    if (u.dim() == 2) {
        c.shape(t, arg, "[B, D]", {u.size(0), u.size(1)}, " like u");
    } else {
        c.shape(t, arg, "[B, T, D]", {u.size(0), u.size(1), u.size(2)}, " like u");
    }
    c.dtype(t, arg, u.scalar_type(), " like u");
    c.device(t, arg, u, "u");
}

void check_channels(Checks const& c, OptionalTensor const& t, char const* arg,
                    Arguments const& in) {
    if (!t) return;
    c.shape(*t, arg, "[D]", {in.u.size(in.u.dim() - 1)});
    c.dtype(*t, arg, state_type(in.u));
    c.device(*t, arg, in.u, "u");
}

// Where u is a single token, B and C are too, [B, G, S] or [B, S].
bool by_channel(Tensor const& t, Tensor const& u) {
    return t.dim() == 2 && u.dim() == 3;
}

// B or C.
void check_projection(Checks const& c, Tensor const& t, char const* arg, Arguments const& in) {
    int64_t const last = in.u.dim() - 1, D = in.u.size(last), S = in.A.size(1);
    if (by_channel(t, in.u)) {
        c.shape(t, arg, "[D, S]", {D, S}, " like A");
        c.dtype(t, arg, number_type(in));
    } else if (t.dim() == 2) {
        c.shape(t, arg, "[B, S]", {in.u.size(0), S});
        c.dtype(t, arg, token_number_type(in), is_complex(in.A) ? " for complex A" : " like u");
    } else {
        char const* const dims = last == 1 ? "[B, G, S]" : "[B, T, G, S]";
        c.rank(t, arg, dims, last + 2);
        int64_t const G = t.size(last);
        c.require(G > 0 && D % G == 0, arg, " must have groups that divide D = ", D,
                  ", got G = ", G);
        if (last == 1) {
            c.shape(t, arg, dims, {in.u.size(0), G, S});
        } else {
            c.shape(t, arg, dims, {in.u.size(0), in.u.size(1), G, S});
        }
        c.dtype(t, arg, token_number_type(in), is_complex(in.A) ? " for complex A" : " like u");
    }
    c.device(t, arg, in.u, "u");
}

// Of B or C of tokens, whose states are last: groups are before them, or there is one.
int64_t groups(Tensor const& t) {
    return t.dim() == 2 ? 1 : t.size(t.dim() - 2);
}

void check_inputs(Checks const& c, Arguments const& in, bool one_token) {
    c.rank(in.u, "u", one_token ? "[B, D]" : "[B, T, D]", one_token ? 2 : 3);
    auto const type = in.u.scalar_type();
    c.require(is_floating(type), "u must be bfloat16, float16",
              kTensorCores ? " or float32" : ", float32 or float64", ", got ", name(type));
    c.require(!kTensorCores || type != ScalarType::Double,
              "u is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
              "float32); it runs on CPU tensors");
    check_tokens(c, in.dt, "dt", in.u);
    if (in.z) check_tokens(c, *in.z, "z", in.u);
    int64_t const D = in.u.size(in.u.dim() - 1);
    c.require(in.A.dim() == 2 && in.A.size(0) == D && in.A.size(1) > 0 && D > 0,
              "A must have shape [D, S] with D = ", D, ", got ", show(in.A.sizes()));
    c.dtype(in.A, "A", number_type(in));
    c.device(in.A, "A", in.u, "u");
    c.require(!is_complex(in.A) || type == ScalarType::Float || type == ScalarType::Double,
              "u must be float32 or float64 for complex A, got ", name(type));
    check_projection(c, in.B, "B", in);
    check_projection(c, in.C, "C", in);
    c.require(by_channel(in.B, in.u) || by_channel(in.C, in.u) || groups(in.B) == groups(in.C),
              "B and C must have the same groups, got ", show(in.B.sizes()), " and ",
              show(in.C.sizes()));
    check_channels(c, in.skip, "skip", in);
    check_channels(c, in.dt_bias, "dt_bias", in);
}

int64_t sequences(Arguments const& in) {
    return in.cu_seqlens ? in.cu_seqlens->size(0) - 1 : in.u.size(0);
}

void check_states(Checks const& c, OptionalTensor const& state, char const* arg,
                  Arguments const& in) {
    if (!state) return;
    c.shape(*state, arg, "[N, D, S]", {sequences(in), in.A.size(0), in.A.size(1)});
    c.dtype(*state, arg, number_type(in));
    c.device(*state, arg, in.u, "u");
}

// Whether a tensor [B, T, D] lies channels first.
bool channels_first(Tensor const& t) {
    return t.dim() == 3 && t.stride(1) == 1 && t.stride(2) != 1;
}

// Channels first or last, without a copy where kernels allow it: each as it came, but on CUDA all last where u is.
Tensor token_layout(Tensor const& t, Arguments const& in) {
    if (in.order || !channels_first(kTensorCores ? in.u : t)) return kernel_layout(t);
    if (t.stride(1) == 1 || t.stride(2) == 1) return t;
    return torch::stable::transpose(contiguous_copy(torch::stable::transpose(t, 1, 2)), 1, 2);
}

Rows channel_rows(Tensor const& t) {
    Rows r = token_rows(t);
    r.head = channels_first(t) ? t.stride(2) : 1;
    return r;
}

// A tensor like u, in its order of dimensions.
Tensor empty_like_tokens(Tensor const& u) {
    if (!channels_first(u)) return empty(u.sizes(), u.scalar_type(), u);
    return torch::stable::transpose(empty({u.size(0), u.size(2), u.size(1)}, u.scalar_type(), u), 1,
                                    2);
}

// B or C; on CUDA tokens may lie side by side in them, as mamba_ssm has it.
Tensor projection_layout(Tensor const& t, Arguments const& in) {
    if (by_channel(t, in.u)) return as_contiguous(t);
    bool const tokens = kTensorCores && !in.order && t.dim() == 4 && t.stride(1) == 1;
    return tokens ? t : kernel_layout(t);
}

// [B, T, G, S], [B, G, S], [B, S] or [D, S].
Projection projection_rows(Tensor const& t, Tensor const& u) {
    if (t.dim() > 2) return {rows(t), t.stride(t.dim() - 1)};
    return {{const_cast<void*>(t.const_data_ptr()), by_channel(t, u) ? 0 : t.stride(0), 0, 0}};
}

// Puts every argument into the layout of the kernels; the tensors live in `in`.
SelectiveParams prepare(Arguments& in, bool one_token) {
    in.B = projection_layout(in.B, in), in.C = projection_layout(in.C, in);
    in.u = token_layout(in.u, in), in.dt = token_layout(in.dt, in);
    if (in.z) in.z = token_layout(*in.z, in);
    in.A = as_contiguous(in.A);
    in.skip = contiguous_or_none(in.skip), in.dt_bias = contiguous_or_none(in.dt_bias);
    in.initial_state = contiguous_or_none(in.initial_state);
    in.cu_seqlens = contiguous_or_none(in.cu_seqlens);
    SelectiveParams p{};
    p.is_complex = is_complex(in.A), p.softplus = in.softplus;
    p.channel_B = by_channel(in.B, in.u), p.channel_C = by_channel(in.C, in.u);
    p.dtype = to_dtype(in.u.scalar_type());
    p.state_dtype = to_dtype(state_type(in.u));
    p.B = in.u.size(0), p.T = one_token ? 1 : in.u.size(1);
    p.D = in.A.size(0), p.S = in.A.size(1);
    p.G = !p.channel_B ? groups(in.B) : !p.channel_C ? groups(in.C) : 1;
    p.N = sequences(in);
    if (in.cu_seqlens) {
        p.cu_seqlens = in.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = in.cu_seqlens->scalar_type() == ScalarType::Long;
    }
    p.order = static_cast<int32_t const*>(data_or_null(in.order));
    p.u = channel_rows(in.u), p.dt = channel_rows(in.dt);
    if (in.z) p.z = channel_rows(*in.z);
    p.b = projection_rows(in.B, in.u), p.c = projection_rows(in.C, in.u);
    p.A = in.A.const_data_ptr();
    p.skip = data_or_null(in.skip), p.dt_bias = data_or_null(in.dt_bias);
    p.initial_state = data_or_null(in.initial_state);
    return p;
}

void run_forward(SelectiveParams const& p, Tensor const& like, void* stream) {
    Scratch const scratch(selective_fwd_workspace(p), like);
    selective_fwd(p, scratch.data(), stream);
}

std::tuple<Tensor, Tensor, Tensor> forward_op(
    Tensor const& u, Tensor const& dt, Tensor const& A, Tensor const& B, Tensor const& C,
    OptionalTensor const& skip, OptionalTensor const& z, OptionalTensor const& dt_bias,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    OptionalTensor const& order, bool softplus, bool save_states, bool output_final_state) {
    Checks const c("selective_scan_fwd");
    Arguments in{u, dt, A, B, C, skip, z, dt_bias, initial_state, cu_seqlens, order, softplus};
    check_inputs(c, in, false);
    check_cu_seqlens(c, cu_seqlens, u, "u");
    in.order = prepare_order(c, order, u, "u");
    check_states(c, initial_state, "initial_state", in);
    SelectiveParams p = prepare(in, false);
    DeviceScope const scope(u);
    Tensor y = empty_like_tokens(in.u);
    Tensor state = output_final_state ? empty({p.N, p.D, p.S}, number_type(in), u)
                                      : empty({0}, number_type(in), u);
    p.y = channel_rows(y);
    if (output_final_state) p.final_state = state.mutable_data_ptr();
    Tensor states = empty({save_states ? selective_saved_states(p) : 0}, number_type(in), u);
    if (save_states) p.saved_states = states.mutable_data_ptr();
    run_forward(p, u, scope.stream());
    return {y, state, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_op(
    Tensor const& u, Tensor const& dt, Tensor const& A, Tensor const& B, Tensor const& C,
    OptionalTensor const& skip, OptionalTensor const& z, OptionalTensor const& dt_bias,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    OptionalTensor const& order, bool softplus, Tensor const& states, Tensor const& grad_y,
    OptionalTensor const& grad_final_state) {
    Checks const c("selective_scan_bwd");
    Arguments in{u, dt, A, B, C, skip, z, dt_bias, initial_state, cu_seqlens, order, softplus};
    check_inputs(c, in, false);
    check_cu_seqlens(c, cu_seqlens, u, "u");
    in.order = prepare_order(c, order, u, "u");
    check_states(c, initial_state, "initial_state", in);
    check_tokens(c, grad_y, "grad_y", u);
    check_states(c, grad_final_state, "grad_final_state", in);
    SelectiveParams p = prepare(in, false);
    c.shape(states, "states", "[tiles D S] that a forward saved", {selective_saved_states(p)});
    c.dtype(states, "states", number_type(in));
    c.device(states, "states", u, "u");
    DeviceScope const scope(u);
    Tensor const grad_rows = token_layout(grad_y, in);
    OptionalTensor const grad_final = contiguous_or_none(grad_final_state);
    auto const type = u.scalar_type(), wide = state_type(u), number = number_type(in);
    auto const channels = [&](bool wanted) {
        return wanted ? empty({p.D}, wide, u) : empty({0}, wide, u);
    };
    auto const projection = [&](bool of_channel) {
        return of_channel ? empty({p.D, p.S}, number, u) : empty({p.B, p.T, p.G, p.S}, number, u);
    };
    Tensor du = empty_like_tokens(in.u), ddt = empty_like_tokens(in.u);
    Tensor dz = z ? empty_like_tokens(in.u) : empty({0}, type, u);
    Tensor dA = empty({p.D, p.S}, number, u);
    Tensor db = projection(p.channel_B), dc = projection(p.channel_C);
    Tensor dskip = channels(skip.has_value()), dbias = channels(dt_bias.has_value());
    Tensor dh0 = initial_state ? empty({p.N, p.D, p.S}, number, u) : empty({0}, number, u);
    p.saved_states = const_cast<void*>(states.const_data_ptr());
    p.grad_y = channel_rows(grad_rows);
    p.grad_final_state = data_or_null(grad_final);
    p.du = channel_rows(du), p.ddt = channel_rows(ddt);
    if (z) p.dz = channel_rows(dz);
    p.db = db.mutable_data_ptr(), p.dc = dc.mutable_data_ptr(), p.dA = dA.mutable_data_ptr();
    if (skip) p.dskip = dskip.mutable_data_ptr();
    if (dt_bias) p.ddt_bias = dbias.mutable_data_ptr();
    if (initial_state) p.grad_initial_state = dh0.mutable_data_ptr();
    Scratch const scratch(selective_bwd_workspace(p), u);
    selective_bwd(p, scratch.data(), scope.stream());
    auto const rounded = [&](Tensor const& t, bool of_channel) {
        return of_channel || is_complex(A) || type == wide ? t : torch::stable::to(t, type);
    };
    return {du, ddt, dA, rounded(db, p.channel_B), rounded(dc, p.channel_C), dskip, dz, dbias, dh0};
}

// A forward over one token that starts and ends in the same memory.
Tensor step_op(Tensor const& u, Tensor const& dt, Tensor const& A, Tensor const& B, Tensor const& C,
               OptionalTensor const& skip, OptionalTensor const& z, OptionalTensor const& dt_bias,
               Tensor const& state, bool softplus) {
    Checks const c("selective_scan_step");
    Arguments in{u, dt, A, B, C, skip, z, dt_bias, {}, {}, {}, softplus};
    check_inputs(c, in, true);
    check_states(c, state, "state", in);
    c.require(state.is_contiguous(),
              "state is updated in place and must be contiguous, got strides ",
              show(state.strides()));
    SelectiveParams p = prepare(in, true);
    DeviceScope const scope(u);
    Tensor y = empty({p.B, p.D}, u.scalar_type(), u);
    p.y = channel_rows(y);
    p.initial_state = state.const_data_ptr();
    p.final_state = const_cast<void*>(state.const_data_ptr());
    run_forward(p, u, scope.stream());
    return y;
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    m.impl("selective_scan_fwd", TORCH_BOX(&lsm::forward_op));
    m.impl("selective_scan_bwd", TORCH_BOX(&lsm::backward_op));
    m.impl("selective_scan_step", TORCH_BOX(&lsm::step_op));
}
