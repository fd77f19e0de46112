// The sLSTM cell's operators: check, allocate, fill the params, run. Compiled once per backend.
#include "params/slstm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/layout.h"

namespace lsm {
namespace {

constexpr int64_t kMaxWidth = 1024;  // of a head on a GPU

struct Call {
    OptionalTensor initial_state, cu_seqlens;
    SlstmParams p{};
};

void check_tensor(Checks const& c, Tensor const& t, char const* arg, ScalarType type,
                  Tensor const& like, char const* like_arg) {
    c.dtype(t, arg, type);
    c.device(t, arg, like, like_arg);
}

// `x` is [B, T, 4, H, D], named `arg`.
Call prepare(Checks const& c, Tensor const& x, char const* arg, Tensor const& R, char const* R_arg,
             bool transposed, OptionalTensor const& initial_state,
             OptionalTensor const& cu_seqlens) {
    c.rank(x, arg, "[B, T, 4, H, D]", 5);
    c.require(x.size(2) == 4, arg, " must have four gates, [B, T, 4, H, D], got ", show(x.sizes()));
    c.require(is_floating(x.scalar_type()), arg, " must be bfloat16, float16",
              kTensorCores ? " or float32" : ", float32 or float64", ", got ",
              name(x.scalar_type()));
    c.require(!kTensorCores || x.scalar_type() != ScalarType::Double, arg,
              " is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
              "float32); it runs on CPU tensors");
    int64_t const H = x.size(3), D = x.size(4);
    c.require(H > 0 && D > 0, "H and D must be at least 1, got ", show(x.sizes()));
    c.require(!kTensorCores || D <= kMaxWidth, "D = ", D,
              " is beyond the CUDA kernels (supported: D <= ", kMaxWidth,
              "); it runs on CPU tensors, or split the heads");
    if (transposed) {
        c.shape(R, R_arg, "[H, 4, D, D]", {H, 4, D, D});
    } else {
        c.shape(R, R_arg, "[H, D, 4, D]", {H, D, 4, D});
    }
    check_tensor(c, R, R_arg, state_type(x), x, arg);
    check_cu_seqlens(c, cu_seqlens, x);
    Call call;
    SlstmParams& p = call.p;
    p.dtype = to_dtype(x.scalar_type()), p.state_dtype = to_dtype(state_type(x));
    p.B = x.size(0), p.T = x.size(1), p.H = H, p.D = D;
    p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
    if (initial_state) {
        c.shape(*initial_state, "initial_state", "[N, 4, H, D]", {p.N, 4, H, D});
        check_tensor(c, *initial_state, "initial_state", state_type(x), x, arg);
        call.initial_state = as_contiguous(*initial_state);
        p.initial_state = call.initial_state->const_data_ptr();
    }
    if (cu_seqlens) {
        call.cu_seqlens = as_contiguous(*cu_seqlens);
        p.cu_seqlens = call.cu_seqlens->const_data_ptr();
        p.cu_seqlens_is_64bit = cu_seqlens->scalar_type() == ScalarType::Long;
    }
    return call;
}

std::tuple<Tensor, Tensor, Tensor> slstm_forward(Tensor const& x, Tensor const& R,
                                                 OptionalTensor const& initial_state,
                                                 OptionalTensor const& cu_seqlens, bool save_cells,
                                                 bool output_final_state) {
    Checks const c("slstm_fwd");
    Call call = prepare(c, x, "x", R, "R", false, initial_state, cu_seqlens);
    SlstmParams& p = call.p;
    DeviceScope const scope(x);
    auto const type = state_type(x);
    Tensor const packed = as_contiguous(x), weights = as_contiguous(R);
    Tensor y = empty({p.B, p.T, p.H, p.D}, x.scalar_type(), x);
    Tensor cells = save_cells ? empty({p.B, p.T, 4, p.H, p.D}, type, x) : empty({0}, type, x);
    Tensor last = output_final_state ? empty({p.N, 4, p.H, p.D}, type, x) : empty({0}, type, x);
    p.x = packed.const_data_ptr(), p.R = weights.const_data_ptr(), p.y = y.mutable_data_ptr();
    if (save_cells) p.cells = cells.mutable_data_ptr();
    if (output_final_state) p.final_state = last.mutable_data_ptr();
    Tensor scratch = workspace(slstm_workspace(p), x);
    slstm_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {y, cells, last};
}

std::tuple<Tensor, Tensor> slstm_backward(Tensor const& raw, Tensor const& R_transposed,
                                          Tensor const& cells, OptionalTensor const& initial_state,
                                          OptionalTensor const& cu_seqlens, Tensor const& grad_y,
                                          OptionalTensor const& grad_final_state) {
    Checks const c("slstm_bwd");
    Call call =
        prepare(c, raw, "raw", R_transposed, "R_transposed", true, initial_state, cu_seqlens);
    SlstmParams& p = call.p;
    auto const type = raw.scalar_type();
    c.dtype(raw, "raw", state_type(raw));
    c.shape(cells, "cells", "[B, T, 4, H, D]", {p.B, p.T, 4, p.H, p.D});
    check_tensor(c, cells, "cells", type, raw, "raw");
    c.shape(grad_y, "grad_y", "[B, T, H, D]", {p.B, p.T, p.H, p.D});
    check_tensor(c, grad_y, "grad_y", type, raw, "raw");
    DeviceScope const scope(raw);
    Tensor const rows = as_contiguous(raw), weights = as_contiguous(R_transposed),
                 states = as_contiguous(cells), dy = as_contiguous(grad_y);
    OptionalTensor last;
    if (grad_final_state) {
        c.shape(*grad_final_state, "grad_final_state", "[N, 4, H, D]", {p.N, 4, p.H, p.D});
        check_tensor(c, *grad_final_state, "grad_final_state", type, raw, "raw");
        last = as_contiguous(*grad_final_state);
        p.grad_final_state = last->const_data_ptr();
    }
    Tensor draw = empty({p.B, p.T, 4, p.H, p.D}, type, raw);
    Tensor first = initial_state ? empty({p.N, 4, p.H, p.D}, type, raw) : empty({0}, type, raw);
    p.raw = rows.const_data_ptr(), p.R_transposed = weights.const_data_ptr();
    p.states = states.const_data_ptr(), p.grad_y = dy.const_data_ptr();
    p.draw = draw.mutable_data_ptr();
    if (initial_state) p.grad_initial_state = first.mutable_data_ptr();
    Tensor scratch = workspace(slstm_workspace(p), raw);
    slstm_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {draw, first};
}

Tensor slstm_one_step(Tensor const& x, Tensor const& R, Tensor const& state) {
    Checks const c("slstm_step");
    c.rank(x, "x", "[B, 4, H, D]", 4);
    Tensor const token =
        torch::stable::view(as_contiguous(x), {x.size(0), 1, x.size(1), x.size(2), x.size(3)});
    Call call = prepare(c, token, "x", R, "R", false, {}, {});
    SlstmParams& p = call.p;
    c.shape(state, "state", "[B, 4, H, D]", {p.B, 4, p.H, p.D});
    check_tensor(c, state, "state", state_type(x), x, "x");
    c.require(state.is_contiguous(),
              "state is updated in place and must be contiguous, got strides ",
              show(state.strides()));
    DeviceScope const scope(x);
    Tensor const weights = as_contiguous(R);
    Tensor y = empty({p.B, p.H, p.D}, x.scalar_type(), x);
    p.x = token.const_data_ptr(), p.R = weights.const_data_ptr(), p.y = y.mutable_data_ptr();
    p.final_state = state.mutable_data_ptr();
    p.initial_state = p.final_state;
    Tensor scratch = workspace(slstm_workspace(p), x);
    slstm_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return y;
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("slstm_fwd", TORCH_BOX(&slstm_forward));
    m.impl("slstm_bwd", TORCH_BOX(&slstm_backward));
    m.impl("slstm_step", TORCH_BOX(&slstm_one_step));
}
