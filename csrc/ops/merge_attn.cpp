// Attention over parts of the keys, joined by the parts' log-sum-exps, and its backward. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/sparse_attn.h"

namespace lsm {
namespace {

// Sizes, types and inputs of a merge.
struct Parts {
    Parts(Checks const& c, Tensor const& o_parts, Tensor const& lse_parts)
        : o(as_contiguous(o_parts)), lse(as_contiguous(lse_parts)) {
        c.rank(o_parts, "o", "[parts, B, T, H, V]", 5);
        check_floating(c, o_parts, "o");
        p.parts = o.size(0), p.B = o.size(1), p.T = o.size(2), p.H = o.size(3), p.V = o.size(4);
        c.shape(lse_parts, "lse", "[parts, B, H, T]", {p.parts, p.B, p.H, p.T}, " (like o)");
        c.dtype(lse_parts, "lse", state_type(o));
        c.device(lse_parts, "lse", o, "o");
        p.dtype = p.part_dtype = to_dtype(o.scalar_type());
        p.acc_dtype = to_dtype(state_type(o));
        p.o_parts = o.const_data_ptr(), p.lse_parts = lse.const_data_ptr();
    }
    Tensor o, lse;
    MergeParams p{};
};

std::tuple<Tensor, Tensor> merge(Tensor const& o_parts, Tensor const& lse_parts) {
    Checks const c("merge_attn_states");
    Parts in(c, o_parts, lse_parts);
    MergeParams& p = in.p;
    DeviceScope const scope(o_parts);
    Tensor o = empty({p.B, p.T, p.H, p.V}, o_parts.scalar_type(), o_parts);
    Tensor lse = empty({p.B, p.H, p.T}, state_type(o_parts), o_parts);
    p.o = rows(o), p.lse = lse.mutable_data_ptr();
    merge_attn_states(p, scope.stream());
    return {o, lse};
}

std::tuple<Tensor, Tensor> merge_backward(Tensor const& o_parts, Tensor const& lse_parts,
                                          Tensor const& o, Tensor const& lse, Tensor const& grad_o,
                                          OptionalTensor const& grad_lse) {
    Checks const c("merge_attn_states_bwd");
    Parts in(c, o_parts, lse_parts);
    MergeParams& p = in.p;
    auto const type = o_parts.scalar_type(), wide = state_type(o_parts);
    check_tensor(c, o, "o", "[B, T, H, V]", {p.B, p.T, p.H, p.V}, type, o_parts);
    check_tensor(c, lse, "lse", "[B, H, T]", {p.B, p.H, p.T}, wide, o_parts);
    check_tensor(c, grad_o, "grad_o", "[B, T, H, V]", {p.B, p.T, p.H, p.V}, type, o_parts);
    check_tensor(c, grad_lse, "grad_lse", "[B, H, T]", {p.B, p.H, p.T}, wide, o_parts);
    DeviceScope const scope(o_parts);
    Tensor const whole = last_contiguous(o), grad = last_contiguous(grad_o),
                 whole_lse = as_contiguous(lse);
    OptionalTensor const d_lse = contiguous_or_none(grad_lse);
    Tensor d_parts = empty(o_parts.sizes(), type, o_parts);
    Tensor d_scores = empty(lse_parts.sizes(), wide, o_parts);
    p.o = rows(whole), p.grad_o = rows(grad);
    p.lse = const_cast<void*>(whole_lse.const_data_ptr());
    if (d_lse) p.grad_lse = d_lse->const_data_ptr();
    p.do_parts = d_parts.mutable_data_ptr(), p.dlse_parts = d_scores.mutable_data_ptr();
    merge_attn_states_bwd(p, scope.stream());
    return {d_parts, d_scores};
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("merge_attn_states", TORCH_BOX(&merge));
    m.impl("merge_attn_states_bwd", TORCH_BOX(&merge_backward));
}
