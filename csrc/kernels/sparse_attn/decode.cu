// Decode attention's plan and instances: dtype, columns of v.
#include "kernels/sparse_attn/decode.cuh"

#include "kernels/carver.h"
#include "kernels/dispatch.h"

namespace lsm {
namespace {

namespace at = decode_attn;

// The most keys that a query may visit.
i64 most_visits(SparseAttnParams const& p) {
    BlockLists const& lists = p.lists;
    AttnMask const& m = p.mask;
    if (lists.index != nullptr) {
        i64 const blocks =
            lists.row_ptr != nullptr ? (p.Tk + lists.block_k - 1) / lists.block_k : lists.capacity;
        return blocks * lists.block_k;
    }
    if (m.left < 0 || m.head_left != nullptr || !(m.causal || m.right >= 0)) return p.Tk;
    i64 const ahead = (m.causal ? m.causal_block + m.prefix : 0) + (m.right > 0 ? m.right : 0);
    i64 const seen = m.sinks + m.left + p.Tq + ahead;
    return seen < p.Tk ? seen : p.Tk;
}

at::Plan make_plan(SparseAttnParams const& p, void* workspace, i64* bytes = nullptr) {
    at::Plan plan{};
    i64 const visits = most_visits(p), G = p.Hq / p.Hkv;
    bool const listed = p.lists.index != nullptr;
    i64 const parts = (visits + kPartKeys - 1) / kPartKeys;
    plan.parts = parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts;
    plan.groups = static_cast<int>(listed && p.lists.heads == p.Hq ? G : 1);
    plan.heads = static_cast<int>(G) / plan.groups;
    plan.queries = static_cast<int>(listed ? 1 : p.Tq);
    plan.tiles = (plan.rows() + at::kRows - 1) / at::kRows;
    plan.shared_values = p.code_bits == 0 && p.v.data == p.k.data && p.V <= p.K &&
                         p.v.batch == p.k.batch && p.v.time == p.k.time && p.v.head == p.k.head;
    // Positions of a cache, whose lengths are int32, and what bounds them.
    constexpr i64 kFar = i64(1) << 29;
    plan.mask = p.mask;
    for (int64_t* x : {&plan.mask.offset, &plan.mask.key_stride, &plan.mask.key_length,
                       &plan.mask.causal_block, &plan.mask.prefix, &plan.mask.left,
                       &plan.mask.right, &plan.mask.sinks, &plan.mask.dilation})
        *x = clamped(*x, -kFar, kFar);
    Carver carver(workspace);
    plan.o = carver.take<float>(plan.parts * p.B * p.Tq * p.Hq * p.V);
    plan.lse = carver.take<float>(plan.parts * p.B * p.Tq * p.Hq);
    if (bytes != nullptr) *bytes = carver.used();
    return plan;
}

template <class T>
void decode_typed(SparseAttnParams const& p, at::Plan const& plan, void* stream) {
    dispatch(Buckets<64, 128, 256, 512>{}, p.V,
             [&](auto V) { at::run<at::TensorMath<T, V>, 0>(p, plan, stream); });
}

}  // namespace

int64_t sparse_attn_decode_workspace(SparseAttnParams const& p) {
    i64 bytes = 0;
    make_plan(p, nullptr, &bytes);
    return bytes;
}

void sparse_attn_decode(SparseAttnParams const& p, void* workspace, void* stream) {
    if (p.B == 0 || p.Tq == 0) return;
    at::Plan const plan = make_plan(p, workspace);
    if (p.code_bits != 0) {
        at::run_codes(p, plan, stream);
    } else if (p.dtype == Dtype::bf16) {
        decode_typed<bf16>(p, plan, stream);
    } else if (p.dtype == Dtype::f16) {
        decode_typed<half>(p, plan, stream);
    } else {
        dispatch(Buckets<128, 512>{}, p.V,
                 [&](auto V) { at::run<at::FloatMath<V>, 0>(p, plan, stream); });
    }
    MergeParams merge{};
    merge.dtype = p.dtype, merge.part_dtype = merge.acc_dtype = Dtype::f32;
    merge.parts = plan.parts, merge.B = p.B, merge.T = p.Tq, merge.H = p.Hq, merge.V = p.V;
    merge.o_parts = plan.o, merge.lse_parts = plan.lse, merge.sink_logits = p.sink_logits;
    merge.o = p.o, merge.lse = p.lse;
    merge_attn_states(merge, stream);
}

}  // namespace lsm
