// The short convolution's operators: check, allocate, fill the params, run. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/layout.h"
#include "params/conv.h"

namespace lsm {
namespace {

constexpr int64_t kMaxTaps = kTensorCores ? 8 : 128;
constexpr char const* kFwd = "causal_conv1d_fwd";
constexpr char const* kBwd = "causal_conv1d_bwd";
constexpr char const* kStep = "causal_conv1d_step";

// The kernels want channels or tokens side by side; anything else is copied.
bool is_channel_first(Tensor const& x) {
    return x.stride(2) != 1 && x.stride(1) == 1 && x.size(1) > 1 && x.size(2) > 1;
}

// With a norm, which is one of channels, they want channels.
Tensor channel_layout(Tensor const& x, int64_t norm) {
    if (norm == 0 && is_channel_first(x)) return x;
    return x.stride(2) == 1 ? x : contiguous_copy(x);
}

// [B, T, D] with channels side by side, or tokens.
Tensor like_layout(Tensor const& x) {
    if (!is_channel_first(x)) return empty(x.sizes(), x.scalar_type(), x);
    return torch::stable::transpose(empty({x.size(0), x.size(2), x.size(1)}, x.scalar_type(), x), 1,
                                    2);
}

// Of a dimension of size 1 the stride has no meaning; the kernels tell the layout by the channels'.
Strided strided(Tensor const& x) {
    int64_t const channel = is_channel_first(x) ? x.stride(2) : 1;
    return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), channel};
}

void check_weight(Checks const& c, Tensor const& x, Tensor const& weight,
                  OptionalTensor const& bias) {
    int64_t const D = x.size(2);
    c.require(is_floating(x.scalar_type()), "x must be bfloat16, float16",
              kTensorCores ? " or float32" : ", float32 or float64", ", got ",
              name(x.scalar_type()));
    c.require(!kTensorCores || x.scalar_type() != ScalarType::Double,
              "x is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
              "float32); it runs on CPU tensors");
    c.rank(weight, "weight", "[D, W]", 2);
    c.require(weight.size(0) == D, "weight must have D = ", D, " rows like x, got ",
              show(weight.sizes()));
    int64_t const W = weight.size(1);
    c.require(W >= 1 && W <= kMaxTaps, "weight must have 1 to ", kMaxTaps, " taps",
              kTensorCores ? " on CUDA (up to 128 on CPU tensors)" : "", ", got W = ", W);
    auto const type = weight.scalar_type();
    c.require(type == x.scalar_type() ||
                  (type == ScalarType::Float && x.scalar_type() != ScalarType::Double),
              "weight must have dtype ", name(x.scalar_type()), " like x",
              x.scalar_type() == ScalarType::Double ? "" : ", or float32", ", got ", name(type));
    c.device(weight, "weight", x, "x");
    if (bias) {
        c.shape(*bias, "bias", "[D]", {D});
        c.dtype(*bias, "bias", type, " like weight");
        c.device(*bias, "bias", x, "x");
    }
}

void check_state(Checks const& c, OptionalTensor const& state, char const* arg, Tensor const& x,
                 int64_t N, int64_t S) {
    if (!state) return;
    c.shape(*state, arg, "[N, D, S]", {N, x.size(2), S});
    c.dtype(*state, arg, x.scalar_type(), " like x");
    c.device(*state, arg, x, "x");
}

// Heads of so many channels, the first `channels` of all, or all.
struct Norm {
    int64_t head;
    double eps;
    std::optional<int64_t> channels;
};

// On CUDA a head's channels are those of some lanes of one warp.
void check_norm(Checks const& c, Tensor const& x, Tensor const& weight, Norm const& norm) {
    int64_t const D = x.size(2), least = weight.size(1) <= 4 ? 4 : 2, n = norm.head;
    bool const fits =
        !kTensorCores || n == 0 || (n >= least && n <= 32 * least && (n & (n - 1)) == 0);
    int64_t const channels = norm.channels.value_or(D);
    c.require(channels >= 0 && channels <= D, "norm_channels must be 0 to D = ", D, ", got ",
              channels);
    c.require(n >= 0 && (n == 0 || channels % n == 0) && fits, "norm must be 0 or ",
              kTensorCores
                  ? "a power of two from 4 to 128 (2 to 64 for more than 4 taps) that divides"
                  : "a divisor of",
              norm.channels ? " norm_channels = " : " D = ", channels, ", got ", n);
}

// The tensors a call reads, in the layout the kernels want, kept alive beside the params that point into them.
struct Inputs {
    Tensor x, weight;
    OptionalTensor bias, initial_state, cu_seqlens, seq_idx;
    ConvParams p{};
};

OptionalTensor as_contiguous(OptionalTensor const& t) {
    return t ? OptionalTensor(lsm::as_contiguous(*t)) : t;
}

void const* pointer(OptionalTensor const& t) {
    return t ? t->const_data_ptr() : nullptr;
}

Inputs prepare(Checks const& c, Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
               OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
               OptionalTensor const& seq_idx, bool silu, int64_t state_size, Norm const& norm) {
    c.rank(x, "x", "[B, T, D]", 3);
    check_weight(c, x, weight, bias);
    check_norm(c, x, weight, norm);
    check_cu_seqlens(c, cu_seqlens, x);
    int64_t const N = cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0), W = weight.size(1);
    int64_t S = state_size;
    if (initial_state) {
        c.rank(*initial_state, "initial_state", "[N, D, S]", 3);
        S = initial_state->size(2);
        c.require(S >= W - 1, "initial_state must hold the last W - 1 = ", W - 1,
                  " inputs or more, got ", show(initial_state->sizes()));
        c.require(state_size == 0 || state_size == S,
                  "the final state must be of the initial state's size S = ", S, ", got ",
                  state_size);
        check_state(c, initial_state, "initial_state", x, N, S);
    }
    c.require(state_size >= 0, "state_size must not be negative, got ", state_size);
    if (seq_idx) {
        c.shape(*seq_idx, "seq_idx", "[B, T]", {x.size(0), x.size(1)});
        c.dtype(*seq_idx, "seq_idx", ScalarType::Int);
        c.device(*seq_idx, "seq_idx", x, "x");
        c.require(!cu_seqlens && !initial_state && state_size == 0,
                  "seq_idx comes without states and without cu_seqlens; pass cu_seqlens instead of "
                  "it to start from states or to return them");
    }
    Inputs in{channel_layout(x, norm.head),
              lsm::as_contiguous(weight),
              as_contiguous(bias),
              as_contiguous(initial_state),
              as_contiguous(cu_seqlens),
              as_contiguous(seq_idx),
              {}};
    ConvParams& p = in.p;
    p.silu = silu;
    p.dtype = to_dtype(x.scalar_type());
    p.weight_dtype = to_dtype(weight.scalar_type());
    p.B = x.size(0), p.T = x.size(1), p.D = x.size(2), p.W = W, p.S = S, p.N = N;
    p.norm = norm.head, p.norm_eps = norm.eps;
    p.normed = norm.head > 0 ? norm.channels.value_or(p.D) : 0;
    p.x = strided(in.x);
    p.weight = in.weight.const_data_ptr();
    p.bias = pointer(in.bias);
    p.initial_state = pointer(in.initial_state);
    p.seq_idx = static_cast<int32_t const*>(pointer(in.seq_idx));
    p.cu_seqlens = pointer(in.cu_seqlens);
    p.cu_seqlens_is_64bit = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
    return in;
}

std::tuple<Tensor, Tensor> forward(Tensor const& x, Tensor const& weight,
                                   OptionalTensor const& bias, OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, OptionalTensor const& seq_idx,
                                   bool silu, int64_t state_size, int64_t norm, double norm_eps,
                                   std::optional<int64_t> norm_channels) {
    Checks const c(kFwd);
    Inputs in = prepare(c, x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, state_size,
                        {norm, norm_eps, norm_channels});
    ConvParams& p = in.p;
    DeviceScope const scope(x);
    Tensor y = like_layout(in.x);
    Tensor final_state = state_size > 0 ? empty({p.N, p.D, p.S}, x.scalar_type(), x)
                                        : empty({0}, x.scalar_type(), x);
    p.y = strided(y);
    if (state_size > 0) p.final_state = final_state.mutable_data_ptr();
    Tensor scratch = workspace(conv_fwd_workspace(p), x);
    conv_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor const& x, Tensor const& weight, OptionalTensor const& bias,
    OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    OptionalTensor const& seq_idx, bool silu, Tensor const& grad_y,
    OptionalTensor const& grad_final_state, bool need_dweight, int64_t norm, double norm_eps,
    std::optional<int64_t> norm_channels) {
    Checks const c(kBwd);
    if (grad_final_state) c.rank(*grad_final_state, "grad_final_state", "[N, D, S]", 3);
    int64_t const state_size = grad_final_state ? grad_final_state->size(2) : 0;
    Inputs in = prepare(c, x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, state_size,
                        {norm, norm_eps, norm_channels});
    ConvParams& p = in.p;
    c.shape(grad_y, "grad_y", "[B, T, D]", {p.B, p.T, p.D}, " (like x)");
    c.dtype(grad_y, "grad_y", x.scalar_type(), " like x");
    c.device(grad_y, "grad_y", x, "x");
    check_state(c, grad_final_state, "grad_final_state", x, p.N, p.S);
    DeviceScope const scope(x);
    Tensor dx = like_layout(in.x);
    Tensor dy = grad_y;
    if (is_channel_first(in.x) != is_channel_first(dy) ||
        (!is_channel_first(dy) && dy.stride(2) != 1)) {
        dy = like_layout(in.x);
        torch::stable::copy_(dy, grad_y);
    }
    OptionalTensor const dfinal = as_contiguous(grad_final_state);
    auto const type = weight.scalar_type();
    Tensor dweight = need_dweight ? empty({p.D, p.W}, type, x) : empty({0}, type, x);
    Tensor dbias = need_dweight && bias ? empty({p.D}, type, x) : empty({0}, type, x);
    Tensor dstate =
        initial_state ? empty({p.N, p.D, p.S}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
    p.grad_y = strided(dy), p.dx = strided(dx);
    p.grad_final_state = pointer(dfinal);
    if (initial_state) p.grad_initial_state = dstate.mutable_data_ptr();
    if (need_dweight) p.dweight = dweight.mutable_data_ptr();
    if (need_dweight && bias) p.dbias = dbias.mutable_data_ptr();
    Tensor scratch = workspace(conv_bwd_workspace(p), x);
    conv_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {dx, dweight, dbias, dstate};
}

OptionalTensor check_rows(Checks const& c, OptionalTensor const& rows, char const* arg,
                          Tensor const& x) {
    if (!rows) return rows;
    c.shape(*rows, arg, "[B]", {x.size(0)});
    c.dtype(*rows, arg, ScalarType::Int);
    c.device(*rows, arg, x, "x");
    return as_contiguous(rows);
}

Tensor update(Tensor const& x, Tensor const& state, Tensor const& weight,
              OptionalTensor const& bias, OptionalTensor const& cache_seqlens,
              OptionalTensor const& conv_state_indices, bool silu) {
    Checks const c(kStep);
    c.rank(x, "x", "[B, T, D]", 3);
    check_weight(c, x, weight, bias);
    c.rank(state, "conv_state", "[N, D, S]", 3);
    int64_t const B = x.size(0), T = x.size(1), D = x.size(2), W = weight.size(1);
    int64_t const S = state.size(2);
    c.require(state.size(1) == D && (conv_state_indices || state.size(0) == B),
              "conv_state must have shape [N, D, S] = ",
              show(std::vector<int64_t>{conv_state_indices ? state.size(0) : B, D, S}), ", got ",
              show(state.sizes()));
    // A ring takes the tokens in first, and must then still hold the inputs of the first of them.
    int64_t const least = cache_seqlens ? (W - 1 > 0 || T > 0 ? W - 1 + (T > 0) : 0) : W - 1;
    c.require(S >= least, "conv_state must hold the last W - 1 = ", W - 1, " inputs or more",
              cache_seqlens ? ", with cache_seqlens W" : "", ", got ", show(state.sizes()));
    c.dtype(state, "conv_state", x.scalar_type(), " like x");
    c.device(state, "conv_state", x, "x");
    OptionalTensor const seen = check_rows(c, cache_seqlens, "cache_seqlens", x);
    OptionalTensor const rows = check_rows(c, conv_state_indices, "conv_state_indices", x);
    if (!kTensorCores && rows) {
        auto const* const at = static_cast<int32_t const*>(rows->const_data_ptr());
        for (int64_t b = 0; b < B; ++b)
            c.require(at[b] < state.size(0), "conv_state_indices must be below N = ", state.size(0),
                      ", got ", at[b]);
    }
    Tensor const packed_weight = lsm::as_contiguous(weight);
    OptionalTensor const packed_bias = as_contiguous(bias);
    DeviceScope const scope(x);
    Tensor y = empty(x.sizes(), x.scalar_type(), x);
    ConvStepParams p{};
    p.silu = silu;
    p.dtype = to_dtype(x.scalar_type());
    p.weight_dtype = to_dtype(weight.scalar_type());
    p.B = B, p.T = T, p.D = D, p.W = W, p.S = S;
    p.x = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
    p.y = {y.mutable_data_ptr(), y.stride(0), y.stride(1), y.stride(2)};
    p.weight = packed_weight.const_data_ptr();
    p.bias = pointer(packed_bias);
    p.state = state.mutable_data_ptr();
    p.state_row = state.stride(0), p.state_channel = state.stride(1);
    p.state_time = state.stride(2);
    p.seen = static_cast<int32_t const*>(pointer(seen));
    p.rows = static_cast<int32_t const*>(pointer(rows));
    if (B > 0 && T > 0 && D > 0) conv_step(p, scope.stream());
    return y;
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl(kFwd, TORCH_BOX(&forward));
    m.impl(kBwd, TORCH_BOX(&backward));
    m.impl(kStep, TORCH_BOX(&update));
}
