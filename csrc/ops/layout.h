// What the operators of all engines share: checks of types, states and boundaries, and the layouts kernels want.
#pragma once

#include <algorithm>
#include <vector>

#include "backend.h"

namespace lsm {
namespace {

// The most that CUDA kernels take of K and V: on tensor cores, and where a few are taken at a time.
constexpr int64_t kMaxDim = 256, kAnyDim = int64_t{1} << 40;

inline ScalarType state_type(Tensor const& q) {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_floating(Checks const& c, Tensor const& q, char const* arg = "q") {
    c.require(is_floating(q.scalar_type()), arg, " must be bfloat16, float16",
              kTensorCores ? " or float32" : ", float32 or float64", ", got ",
              name(q.scalar_type()));
    c.require(!kTensorCores || q.scalar_type() != ScalarType::Double, arg,
              " is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
              "float32); it runs on CPU tensors");
}

inline void check_dims(Checks const& c, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t most_K,
                       int64_t most_V) {
    c.require(H > 0 && HV > 0 && HV % H == 0, "v must have a multiple of the H = ", H,
              " heads of q and k, got HV = ", HV);
    c.require(K > 0 && V > 0, "K and V must be at least 1, got K = ", K, ", V = ", V);
    auto const require_most = [&](char const* dim, int64_t n, int64_t most) {
        c.require(!kTensorCores || n <= most, dim, " = ", n,
                  " is beyond the CUDA kernels (supported: ", dim, " <= ", most,
                  "); it runs on CPU tensors, or split the heads");
    };
    require_most("K", K, most_K), require_most("V", V, most_V);
}

// Gates come in the dtype of q, or in float32.
inline void check_gate_type(Checks const& c, Tensor const& g, char const* arg, Tensor const& q,
                            char const* like = "q") {
    c.require(g.scalar_type() == q.scalar_type() ||
                  (g.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double),
              arg, " must have dtype ", name(q.scalar_type()), " like ", like,
              q.scalar_type() == ScalarType::Double ? "" : ", or float32", ", got ",
              name(g.scalar_type()));
    c.device(g, arg, q, like);
}

inline void check_state(Checks const& c, OptionalTensor const& state, char const* arg,
                        Tensor const& q, int64_t N, int64_t HV, int64_t K, int64_t V) {
    if (!state) return;
    c.shape(*state, arg, "[N, HV, K, V]", {N, HV, K, V});
    c.dtype(*state, arg, state_type(q));
    c.device(*state, arg, q, "q");
}

// A state of a step, which is updated in place.
inline void check_in_place(Checks const& c, Tensor const& state, char const* arg, char const* dims,
                           std::initializer_list<int64_t> shape, Tensor const& q,
                           bool or_transposed = false) {
    c.shape(state, arg, dims, shape);
    c.dtype(state, arg, state_type(q));
    c.device(state, arg, q, "q");
    c.require(state.is_contiguous() || or_transposed, arg,
              " is updated in place and must be contiguous, got strides ", show(state.strides()));
}

inline void check_step_state(Checks const& c, Tensor const& state, Tensor const& q, int64_t HV,
                             int64_t K, int64_t V) {
    check_in_place(c, state, "state", "[B, HV, K, V]", {q.size(0), HV, K, V}, q);
}

// Whether a [B, HV, K, V] tensor lies in memory as [B, HV, V, K].
inline bool is_transposed(Tensor const& t) {
    int64_t const HV = t.size(1), K = t.size(2), V = t.size(3);
    return t.stride(2) == 1 && t.stride(3) == K && (HV == 1 || t.stride(1) == K * V) &&
           (t.size(0) == 1 || t.stride(0) == HV * K * V);
}

// Values of cu_seqlens are read here only where that costs no synchronisation; the CUDA kernels check them on the
// device (kernels/segments.cuh).
template <class Int>
void check_boundaries(Checks const& c, Int const* cu, int64_t N, int64_t T, char const* arg) {
    c.require(cu[0] == 0, arg, " must start at 0, got ", cu[0]);
    for (int64_t n = 0; n < N; ++n) {
        c.require(cu[n + 1] >= cu[n], arg, " must not decrease, got ", cu[n], " before ", cu[n + 1],
                  " at position ", n + 1);
    }
    c.require(cu[N] == T, arg, " must end at T = ", T, ", got ", cu[N]);
}

inline void check_cu_seqlens(Checks const& c, OptionalTensor const& cu, Tensor const& q,
                             char const* like = "q", char const* arg = "cu_seqlens") {
    if (!cu) return;
    c.require(cu->dim() == 1 && cu->size(0) >= 1, arg, " must have shape [N + 1], got ",
              show(cu->sizes()));
    auto const type = cu->scalar_type();
    c.require(type == ScalarType::Int || type == ScalarType::Long, arg,
              " must have dtype int32 or int64, got ", name(type));
    c.device(*cu, arg, q, like);
    c.require(q.size(0) == 1, arg,
              " needs the sequences packed into one batch row, B = 1, got B = ", q.size(0));
    if (!kTensorCores) {
        Tensor const packed = as_contiguous(*cu);
        int64_t const N = cu->size(0) - 1;
        if (type == ScalarType::Long) {
            check_boundaries(c, static_cast<int64_t const*>(packed.const_data_ptr()), N, q.size(1),
                             arg);
        } else {
            check_boundaries(c, static_cast<int32_t const*>(packed.const_data_ptr()), N, q.size(1),
                             arg);
        }
    }
}

// Tensor-core kernels read rows in 16-byte pieces.
inline bool rows_are_aligned(Tensor const& t) {
    int64_t const unit = 16 / static_cast<int64_t>(t.element_size()), last = t.dim() - 1;
    bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(last) == 1;
    for (int64_t d = 0; d < last; ++d) ok = ok && t.stride(d) % unit == 0;
    return ok;
}

inline Tensor kernel_layout(Tensor const& t) {
    if (!kTensorCores) return last_contiguous(t);
    return rows_are_aligned(t) ? t : contiguous_copy(t);
}

// A [B, T, H] tensor at the strides it has; [B, H], one token, reads as T = 1.
inline Rows scalar_rows(Tensor const& t) {
    bool const one_token = t.dim() == 2;
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), one_token ? 0 : t.stride(1),
            t.stride(one_token ? 1 : 2)};
}

inline OptionalTensor kernel_layout(OptionalTensor const& t) {
    return t ? OptionalTensor(kernel_layout(*t)) : t;
}

inline OptionalTensor contiguous_or_none(OptionalTensor const& t) {
    return t ? OptionalTensor(as_contiguous(*t)) : t;
}

inline void const* data_or_null(OptionalTensor const& t) {
    return t ? t->const_data_ptr() : nullptr;
}

// [B, T, D], or [B, D] as one token.
inline Rows token_rows(Tensor const& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.dim() == 2 ? 0 : t.stride(1), 0};
}

inline bool is_index(Tensor const& t) {
    return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
}

// The order of the tokens [B, T, ..] of x as the kernels want it; on the CPU held to be a permutation.
inline OptionalTensor prepare_order(Checks const& c, OptionalTensor const& order, Tensor const& x,
                                    char const* like) {
    if (!order) return order;
    int64_t const T = x.size(1);
    c.shape(*order, "order", "[T]", {T});
    c.require(is_index(*order), "order must have dtype int32 or int64, got ",
              name(order->scalar_type()));
    c.device(*order, "order", x, like);
    Tensor const packed = as_contiguous(order->scalar_type() == ScalarType::Int
                                            ? *order
                                            : torch::stable::to(*order, ScalarType::Int));
    if (!kTensorCores) {
        std::vector<bool> seen(static_cast<size_t>(T));
        auto const* const tokens = static_cast<int32_t const*>(packed.const_data_ptr());
        for (int64_t p = 0; p < T; ++p) {
            bool const fresh = tokens[p] >= 0 && tokens[p] < T && !seen[size_t(tokens[p])];
            c.require(fresh, "order must be a permutation of 0 .. T - 1 = ", T - 1, ", got ",
                      tokens[p], " at position ", p);
            seen[size_t(tokens[p])] = true;
        }
    }
    return packed;
}

inline Tensor workspace(int64_t bytes, Tensor const& like) {
    return empty({bytes}, ScalarType::Byte, like);
}

// What a kernel works in; nothing is allocated where it asks for nothing, as a step does.
class Scratch {
  public:
    Scratch(int64_t bytes, Tensor const& like) {
        if (bytes > 0) memory_ = workspace(bytes, like);
    }
    void* data() const { return memory_ ? memory_->mutable_data_ptr() : nullptr; }

  private:
    OptionalTensor memory_;
};

// Odd sizes on tensor cores: zero-filled up to whole 16-byte rows (zero keys, queries, values and gates change
// nothing), then cut back. Rare enough to pay with a copy what would cost every kernel a second loader.
inline int64_t padding(Tensor const& t) {
    return (8 - t.size(t.dim() - 1) % 8) % 8;
}

inline bool needs_padding(Tensor const& q, Tensor const& v) {
    return kTensorCores && (padding(q) != 0 || padding(v) != 0);
}

inline Tensor pad_last(Tensor const& t, int64_t columns) {
    return columns == 0 ? t : torch::stable::pad(t, std::vector<int64_t>{0, columns});
}

inline OptionalTensor pad_last(OptionalTensor const& t, int64_t columns) {
    return t ? OptionalTensor(pad_last(*t, columns)) : t;
}

inline OptionalTensor pad_state(OptionalTensor const& s, int64_t dK, int64_t dV) {
    return s ? OptionalTensor(torch::stable::pad(*s, std::vector<int64_t>{0, dV, 0, dK})) : s;
}

inline Tensor cut(Tensor t, int64_t columns) {
    return as_contiguous(torch::stable::narrow(t, t.dim() - 1, 0, columns));
}

// The same where an absent result is an empty tensor of one dimension.
inline Tensor cut_channels(Tensor const& t, int64_t D) {
    return t.dim() == 1 && t.size(0) == 0 ? t : cut(t, D);
}

// Absent results are empty tensors of one dimension.
inline Tensor cut_state(Tensor t, int64_t K, int64_t V) {
    if (t.dim() != 4) return t;
    Tensor rows_cut = torch::stable::narrow(t, 2, 0, K);
    return as_contiguous(torch::stable::narrow(rows_cut, 3, 0, V));
}

// The launchers' gradients of q and k are per value head; value heads of one query head are added in order.
inline Tensor sum_groups(Tensor const& per_value_head, int64_t H, ScalarType type) {
    if (per_value_head.dim() != 4) return per_value_head;
    int64_t const HV = per_value_head.size(2);
    if (HV == H) return per_value_head;
    auto const view = torch::stable::view(
        per_value_head,
        {per_value_head.size(0), per_value_head.size(1), H, HV / H, per_value_head.size(3)});
    std::vector<int64_t> const over{3};
    return torch::stable::to(
        torch::stable::sum(view, torch::headeronly::IntHeaderOnlyArrayRef(over.data(), over.size()),
                           false),
        type);
}

}  // namespace
}  // namespace lsm
