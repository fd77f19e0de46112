// Named tensor checks and allocation for the launchers. Every error names the operator, the argument, what was
// expected and what came; all of them run before any memory is touched.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params/chunk.h"

// What libtorch says went wrong, where the runtime has it (torch >= 2.13); absent, not an error, before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace lsm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

template <class... Parts>
[[noreturn]] inline void fail(Parts const&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

inline char const* name(ScalarType type) {
    switch (type) {
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::ComplexFloat:
            return "complex64";
        case ScalarType::ComplexDouble:
            return "complex128";
        default:
            return "another dtype";
    }
}

// Sizes in an error's words, which are made when it is: calls that fit should not wait for them.
template <class Sizes>
struct Shown {
    Sizes sizes;
    bool operator==(Shown const& other) const {
        return std::equal(sizes.begin(), sizes.end(), other.sizes.begin(), other.sizes.end());
    }
    friend std::ostream& operator<<(std::ostream& text, Shown const& shown) {
        char const* separator = "[";
        if (shown.sizes.begin() == shown.sizes.end()) text << separator;
        for (int64_t const n : shown.sizes) {
            text << separator << n;
            separator = ", ";
        }
        return text << "]";
    }
};

template <class Sizes>
Shown<Sizes> show(Sizes const& sizes) {
    return {sizes};
}

inline std::string show_device(Tensor const& t) {
    return t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
           : t.is_cpu() ? "cpu"
                        : "another device";
}

// Checks against one operator's name, so that call sites read as the list of what is required.
class Checks {
  public:
    // Of an operator of that name, or of an engine's operator and its kind, as in _fwd.
    explicit Checks(char const* op, char const* kind = "") : op_(op), kind_(kind) {}

    void require(bool ok, auto const&... parts) const {
        if (!ok) fail("lsm::", op_, kind_, ": ", parts...);
    }

    void rank(Tensor const& t, char const* arg, char const* dims, int64_t rank) const {
        require(t.dim() == rank, arg, " must have shape ", dims, ", got ", show(t.sizes()));
    }

    void shape(Tensor const& t, char const* arg, char const* dims,
               std::initializer_list<int64_t> expected, char const* like = "") const {
        bool same = t.dim() == static_cast<int64_t>(expected.size());
        int64_t i = 0;
        for (int64_t const n : expected) {
            if (!same) break;
            same = t.size(i++) == n;
        }
        require(same, arg, " must have shape ", dims, " = ", show(expected), like, ", got ",
                show(t.sizes()));
    }

    void dtype(Tensor const& t, char const* arg, ScalarType expected, char const* like = "") const {
        require(t.scalar_type() == expected, arg, " must have dtype ", name(expected), like,
                ", got ", name(t.scalar_type()));
    }

    void device(Tensor const& t, char const* arg, Tensor const& like, char const* like_arg) const {
        bool const same = t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() &&
                          t.get_device_index() == like.get_device_index();
        if (same) return;
        require(false, arg, " must be on ", show_device(like), " like ", like_arg, ", got ",
                show_device(t));
    }

  private:
    char const *op_, *kind_;
};

inline Dtype to_dtype(ScalarType type) {
    switch (type) {
        case ScalarType::BFloat16:
            return Dtype::bf16;
        case ScalarType::Half:
            return Dtype::f16;
        case ScalarType::Float:
            return Dtype::f32;
        default:
            return Dtype::f64;
    }
}

inline bool is_floating(ScalarType type) {
    return type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float ||
           type == ScalarType::Double;
}

// Allocates through the C shim: two thirds of the time of stable::empty, and it keeps libtorch's own words (the
// size that did not fit) where the runtime offers them.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type,
                    Tensor const& device_of) {
    std::array<int64_t, 8> shape{}, strides{};
    int64_t rank = 0;
    for (int64_t const n : sizes) shape[rank++] = n;
    int64_t step = 1;
    for (int64_t i = rank; i-- > 0;) {
        strides[i] = step;
        step *= shape[i] > 1 ? shape[i] : 1;
    }
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_of.get(), &device_index));
    AtenTensorHandle handle = nullptr;
    auto const dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    if (aoti_torch_empty_strided(rank, shape.data(), strides.data(), dtype, device_type,
                                 device_index, &handle) != 0) {
        char const* reason = torch_exception_get_what_without_backtrace != nullptr
                                 ? torch_exception_get_what_without_backtrace()
                                 : nullptr;
        fail("out of memory: lsm could not allocate ", show(sizes), " of ", name(type), " on ",
             show_device(device_of),
             reason != nullptr ? std::string(": ") + reason : std::string());
    }
    return Tensor(handle);
}

// Through empty(), so that a copy that does not fit says so.
inline Tensor contiguous_copy(Tensor const& t) {
    Tensor copy = empty(t.sizes(), t.scalar_type(), t);
    torch::stable::copy_(copy, t);
    return copy;
}

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline Tensor last_contiguous(Tensor const& t) {
    if (t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1) return t;
    return contiguous_copy(t);
}

inline Tensor as_contiguous(Tensor const& t) {
    return t.is_contiguous() ? t : contiguous_copy(t);
}

// [B, T, H, D] view for kernels; a [B, H, D] tensor (one token) reads as T = 1.
inline Rows rows(Tensor const& t) {
    Rows r;
    r.data = const_cast<void*>(t.const_data_ptr());
    bool const one_token = t.dim() == 3;
    r.batch = t.stride(0);
    r.time = one_token ? 0 : t.stride(1);
    r.head = t.stride(one_token ? 1 : 2);
    return r;
}

}  // namespace lsm
