// The sparse attention engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "ops/sparse_attn.h"

namespace lsm {
namespace {

void read_scores(Checks const& c, Arguments const& a, Tensor const& q, Inputs& in) {
    SparseAttnParams& p = in.p;
    auto const wide = state_type(q);
    c.require(a.scores.size() == 4, "scores must have 4 numbers, got ", a.scores.size());
    p.scale = a.scores[0], p.softcap = a.scores[1], p.ramp_length = a.scores[2];
    p.pv_threshold = a.scores[3];
    c.require(p.pv_threshold >= 0, "pv_threshold must not be negative, got ", p.pv_threshold);
    c.require(p.softcap >= 0 && std::isfinite(p.softcap),
              "softcap must not be negative or infinite, got ", p.softcap);
    c.require(!a.ramp || p.ramp_length > 0, "ramp_length must be above 0, got ", p.ramp_length);
    check_tensor(c, a.head_left, "head_left", "[Hq]", {p.Hq}, ScalarType::Int, q);
    check_tensor(c, a.sink_logits, "sink_logits", "[Hq]", {p.Hq}, wide, q);
    check_tensor(c, a.alibi_slopes, "alibi_slopes", "[Hq]", {p.Hq}, wide, q);
    check_tensor(c, a.ramp, "ramp", "[Hq]", {p.Hq}, wide, q);
    p.mask = read_mask(c, a.mask);
    p.mask.head_left = in.keep<int32_t>(a.head_left);
    p.sink_logits = in.keep(a.sink_logits);
    p.alibi_slopes = in.keep(a.alibi_slopes);
    p.ramp = in.keep(a.ramp);
}

// CUDA kernels read codes by 8 bytes.
Tensor codes_layout(Tensor const& t) {
    if (!kTensorCores) return last_contiguous(t);
    bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 8 == 0 && t.stride(3) == 1;
    for (int64_t d = 0; d < 3; ++d) ok = ok && t.stride(d) % 8 == 0;
    return ok ? t : contiguous_copy(t);
}

Inputs prepare(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
               Arguments const& a, bool codes = false) {
    Inputs in{kernel_layout(q),
              codes ? codes_layout(k) : kernel_layout(k),
              codes ? codes_layout(v) : kernel_layout(v),
              {},
              {}};
    SparseAttnParams& p = in.p;
    p.dtype = to_dtype(q.scalar_type()), p.acc_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.Tq = q.size(1), p.Tk = k.size(1), p.Hq = q.size(2), p.Hkv = k.size(2);
    p.K = q.size(3), p.V = v.size(3), p.N = p.B;
    p.q = rows(in.q), p.k = rows(in.k), p.v = rows(in.v);
    read_scores(c, a, q, in);
    return in;
}

Inputs prepare_sequences(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                         OptionalTensor const& cu_q, OptionalTensor const& cu_k,
                         Arguments const& a) {
    check_attention(c, q, k, v, false);
    c.require(cu_q.has_value() == cu_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k come together or not at all");
    check_cu_seqlens(c, cu_q, q, "q", "cu_seqlens_q");
    check_cu_seqlens(c, cu_k, k, "k", "cu_seqlens_k");
    if (cu_q) {
        c.require(cu_k->size(0) == cu_q->size(0), "cu_seqlens_k must have N + 1 = ", cu_q->size(0),
                  " boundaries like cu_seqlens_q, got ", cu_k->size(0));
        c.dtype(*cu_k, "cu_seqlens_k", cu_q->scalar_type(), " like cu_seqlens_q");
    }
    Inputs in = prepare(c, q, k, v, a);
    SparseAttnParams& p = in.p;
    if (cu_q) {
        p.N = cu_q->size(0) - 1;
        p.cu_seqlens_is_64bit = cu_q->scalar_type() == ScalarType::Long;
        p.cu_seqlens_q = in.keep(cu_q), p.cu_seqlens_k = in.keep(cu_k);
    }
    p.lists = read_lists(c, a, q, p.Hkv, cu_q.has_value(), in);
    if (!checks_lists() || p.lists.index == nullptr) return in;
    Readable lists{p};
    lists.move_lists(a);
    lists.move(cu_q, lists.p.cu_seqlens_q), lists.move(cu_k, lists.p.cu_seqlens_k);
    SparseAttnParams const& r = lists.p;
    if (in_order(r, r.cu_seqlens_q, p.Tq) && in_order(r, r.cu_seqlens_k, p.Tk)) {
        check_lists(c, r, [&](int64_t n) {
            int64_t const keys = r.cu_seqlens_k != nullptr ? boundary(r, r.cu_seqlens_k, n + 1) -
                                                                 boundary(r, r.cu_seqlens_k, n)
                                                           : p.Tk;
            return (keys + p.lists.block_k - 1) / p.lists.block_k;
        });
    }
    return in;
}

// What turns the codes of a cache into numbers.
struct Codes {
    Tensor const &k_affine, &v_affine;
};

// Of a cache of codes, 0 of one of numbers.
int64_t code_bits(Checks const& c, Tensor const& q, Tensor const& k, Codes const* codes) {
    if (codes == nullptr) return 0;
    c.rank(q, "q", "[B, Tq, Hq, K]", 4);
    c.rank(k, "k", "[B, Tk, Hkv, K] or [B, Tk, Hkv, K / 2]", 4);
    int64_t const K = q.size(3);
    c.require(k.size(3) == K || 2 * k.size(3) == K,
              "k must have a byte of codes for each of the K = ", K,
              " numbers of q, or for two, got ", k.size(3), " bytes");
    return k.size(3) == K ? 8 : 4;
}

void read_codes(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                Codes const& codes, Inputs& in) {
    SparseAttnParams& p = in.p;
    p.V = v.size(3) * (8 / p.code_bits);
    if (kTensorCores)
        c.require(p.K % 16 == 0 && p.V % 16 == 0,
                  "K and V must be multiples of 16 for the CUDA kernels to read codes, got K = ",
                  p.K, ", V = ", p.V);
    auto const affine = [&](Tensor const& t, char const* arg, Tensor const& like) {
        c.shape(t, arg, "like the codes, of 2 numbers",
                {like.size(0), like.size(1), like.size(2), 2});
        c.dtype(t, arg, state_type(q));
        c.device(t, arg, q, "q");
        in.others.push_back(last_contiguous(t));
        return rows(in.others.back());
    };
    p.k_affine = affine(codes.k_affine, "k_affine", k);
    p.v_affine = affine(codes.v_affine, "v_affine", v);
}

Inputs prepare_cache(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                     Codes const* codes, OptionalTensor const& cache_seqlens,
                     OptionalTensor const& block_table, Arguments const& a) {
    int64_t const bits = code_bits(c, q, k, codes);
    check_attention(c, q, k, v, block_table.has_value(), bits);
    Inputs in = prepare(c, q, k, v, a, bits != 0);
    SparseAttnParams& p = in.p;
    p.code_bits = bits;
    if (codes != nullptr) read_codes(c, q, k, v, *codes, in);
    check_tensor(c, cache_seqlens, "cache_seqlens", "[B]", {p.B}, ScalarType::Int, q);
    p.cache_seqlens = in.keep<int32_t>(cache_seqlens);
    if (block_table) {
        c.rank(*block_table, "block_table", "[B, max_pages]", 2);
        c.require(block_table->size(0) == p.B, "block_table must have B = ", p.B,
                  " rows like q, got ", block_table->size(0));
        c.dtype(*block_table, "block_table", ScalarType::Int);
        c.device(*block_table, "block_table", q, "q");
        p.pages = k.size(0), p.page_size = k.size(1), p.max_pages = block_table->size(1);
        p.Tk = p.max_pages * p.page_size;
        p.block_table = in.keep<int32_t>(block_table);
    }
    p.lists = read_lists(c, a, q, p.Hkv, false, in);
    if (!checks_lists()) return in;
    Readable cache{p};
    cache.move_lists(a);
    cache.move(cache_seqlens, cache.p.cache_seqlens), cache.move(block_table, cache.p.block_table);
    check_cache(c, cache.p);
    check_lists(c, cache.p, [&](int64_t n) {
        int64_t const keys = cache_seqlens ? cache.p.cache_seqlens[n] : p.Tk;
        return (keys + p.lists.block_k - 1) / p.lists.block_k;
    });
    return in;
}

// ---- Operators ----

struct Output {
    Tensor o, lse;
};

Output allocate(SparseAttnParams& p, Tensor const& q) {
    Output out{empty({p.B, p.Tq, p.Hq, p.V}, q.scalar_type(), q),
               empty({p.B, p.Hq, p.Tq}, state_type(q), q)};
    p.o = rows(out.o), p.lse = out.lse.mutable_data_ptr();
    return out;
}

std::tuple<Tensor, Tensor> forward(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& cu_q,
    OptionalTensor const& cu_k, OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks) {
    Checks const c("block_sparse_attn_fwd");
    Inputs in = prepare_sequences(c, q, k, v, cu_q, cu_k,
                                  {block_index, block_ptr, block_bias, head_left, sink_logits,
                                   alibi_slopes, ramp, scores, mask, blocks});
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, lse] = forward(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cu_q, cu_k,
                                block_index, block_ptr, block_bias, head_left, sink_logits,
                                alibi_slopes, ramp, scores, mask, blocks);
        return {cut(o, v.size(3)), lse};
    }
    SparseAttnParams& p = in.p;
    DeviceScope const scope(q);
    Output const out = allocate(p, q);
    Tensor scratch = workspace(sparse_attn_fwd_workspace(p), q);
    sparse_attn_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {out.o, out.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& cu_q,
    OptionalTensor const& cu_k, OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks, Tensor const& o,
    Tensor const& lse, Tensor const& grad_o, OptionalTensor const& grad_lse) {
    Checks const c("block_sparse_attn_bwd");
    Inputs in = prepare_sequences(c, q, k, v, cu_q, cu_k,
                                  {block_index, block_ptr, block_bias, head_left, sink_logits,
                                   alibi_slopes, ramp, scores, mask, blocks});
    SparseAttnParams& p = in.p;
    c.require(p.pv_threshold == 0, "pv_threshold has no backward, got ", p.pv_threshold);
    auto const type = q.scalar_type(), wide = state_type(q);
    check_tensor(c, o, "o", "[B, Tq, Hq, V]", {p.B, p.Tq, p.Hq, p.V}, type, q);
    check_tensor(c, lse, "lse", "[B, Hq, Tq]", {p.B, p.Hq, p.Tq}, wide, q);
    check_tensor(c, grad_o, "grad_o", "[B, Tq, Hq, V]", {p.B, p.Tq, p.Hq, p.V}, type, q);
    check_tensor(c, grad_lse, "grad_lse", "[B, Hq, Tq]", {p.B, p.Hq, p.Tq}, wide, q);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [dq, dk, dv, dbias, dsink, dramp] =
            backward(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cu_q, cu_k, block_index,
                     block_ptr, block_bias, head_left, sink_logits, alibi_slopes, ramp, scores,
                     mask, blocks, pad_last(o, dV), lse, pad_last(grad_o, dV), grad_lse);
        return {cut(dq, p.K), cut(dk, p.K), cut(dv, p.V), dbias, dsink, dramp};
    }
    DeviceScope const scope(q);
    Tensor const o_rows = kernel_layout(o), grad_o_rows = kernel_layout(grad_o);
    p.o = rows(o_rows), p.grad_o = rows(grad_o_rows);
    p.lse = const_cast<void*>(in.keep(lse)), p.grad_lse = in.keep(grad_lse);
    Tensor dq = empty(q.sizes(), type, q), dk = empty(k.sizes(), type, q);
    Tensor dv = empty(v.sizes(), type, q);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    auto const gradient = [&](OptionalTensor const& of, void*& pointer) {
        if (!of) return empty({0}, wide, q);
        Tensor grad = empty(of->sizes(), wide, q);
        pointer = grad.mutable_data_ptr();
        return grad;
    };
    Tensor const dbias = gradient(block_bias, p.grad_block_bias);
    Tensor const dsink = gradient(sink_logits, p.grad_sink_logits);
    Tensor const dramp = gradient(ramp, p.grad_ramp);
    Tensor scratch = workspace(sparse_attn_bwd_workspace(p), q);
    sparse_attn_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {dq, dk, dv, dbias, dsink, dramp};
}

std::tuple<Tensor, Tensor> run_decode(SparseAttnParams& p, Tensor const& q) {
    DeviceScope const scope(q);
    Output const out = allocate(p, q);
    Tensor scratch = workspace(sparse_attn_decode_workspace(p), q);
    sparse_attn_decode(p, scratch.mutable_data_ptr(), scope.stream());
    return {out.o, out.lse};
}

std::tuple<Tensor, Tensor> decode(Tensor const& q, Tensor const& k, Tensor const& v,
                                  OptionalTensor const& cache_seqlens,
                                  OptionalTensor const& block_table,
                                  OptionalTensor const& block_index,
                                  OptionalTensor const& block_ptr, OptionalTensor const& block_bias,
                                  OptionalTensor const& head_left,
                                  OptionalTensor const& sink_logits,
                                  OptionalTensor const& alibi_slopes, OptionalTensor const& ramp,
                                  Floats scores, Ints mask, Ints blocks) {
    Checks const c("sparse_attn_decode");
    Inputs in = prepare_cache(c, q, k, v, nullptr, cache_seqlens, block_table,
                              {block_index, block_ptr, block_bias, head_left, sink_logits,
                               alibi_slopes, ramp, scores, mask, blocks});
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, lse] = decode(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cache_seqlens,
                               block_table, block_index, block_ptr, block_bias, head_left,
                               sink_logits, alibi_slopes, ramp, scores, mask, blocks);
        return {cut(o, v.size(3)), lse};
    }
    return run_decode(in.p, q);
}

std::tuple<Tensor, Tensor> decode_codes(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& k_affine,
    Tensor const& v_affine, OptionalTensor const& cache_seqlens, OptionalTensor const& block_table,
    OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks) {
    Checks const c("sparse_attn_decode_codes");
    Codes const codes{k_affine, v_affine};
    Inputs in = prepare_cache(c, q, k, v, &codes, cache_seqlens, block_table,
                              {block_index, block_ptr, block_bias, head_left, sink_logits,
                               alibi_slopes, ramp, scores, mask, blocks});
    return run_decode(in.p, q);
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("block_sparse_attn_fwd", TORCH_BOX(&forward));
    m.impl("block_sparse_attn_bwd", TORCH_BOX(&backward));
    m.impl("sparse_attn_decode", TORCH_BOX(&decode));
    m.impl("sparse_attn_decode_codes", TORCH_BOX(&decode_codes));
}
