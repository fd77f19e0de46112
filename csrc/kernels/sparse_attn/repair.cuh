// A row of o or dq whose sums met inf or NaN. On tensor cores a key that the row does not see, but others of its tile do,
// is added 0 times, and 0 times inf is NaN: the row once more, by a warp in fp32, with the keys that it sees.
#pragma once

#include "kernels/rare.cuh"
#include "kernels/sparse_attn/numbers.cuh"
#include "kernels/sparse_attn/score.cuh"

namespace lsm::sparse_attn {

template <int kCount>
LSM_DEVICE float row_product(float const (&a)[kCount], float const (&b)[kCount]) {
    float sum = 0.f;
    LSM_UNROLL
    for (int i = 0; i < kCount; ++i) sum += a[i] * b[i];
    return warp_sum(sum);
}

// The row has been stored, and its lse. kLaneColumns: of lane_columns.
template <bool kBackward, int kLaneColumns>
LSM_DEVICE_RARE void repair_row(Work const& work, Sequence const& sequence, int batch, int key_head,
                                int head, int token) {
    SparseAttnParams const& p = work.p;
    Mask const& mask = work.mask;
    int const K = static_cast<int>(p.K), V = static_cast<int>(p.V);
    Rows const& to = kBackward ? p.dq : p.o;
    int const columns = kBackward ? K : V;
    i64 const time = sequence.q0 + token, at = per_head(work, batch, time, head);
    i64 const to_at = row_offset(to, batch, time, head);
    float lse, delta = 0.f;
    if constexpr (kBackward) {
        float4 const stats = load_global(work.stats + at);
        lse = stats.z, delta = stats.y;
    } else {
        lse = load_global(static_cast<float const*>(p.lse) + at);
    }
    float q[kLaneColumns], grad_o[kLaneColumns], k[kLaneColumns], v[kLaneColumns];
    float before[kLaneColumns], sums[kLaneColumns] = {};
    load_row(p.q, row_offset(p.q, batch, time, head), p.dtype, K, q);
    if constexpr (kBackward)
        load_row(p.grad_o, row_offset(p.grad_o, batch, time, head), p.dtype, V, grad_o);
    load_row(to, to_at, p.dtype, columns, before);

    Head const bent = Head::of(work, head);
    int const left = mask.left_of(head), last = mask.key(sequence.Tk - 1);
    int const position = token + mask.shift(sequence.Tq, sequence.Tk);
    Row const row = mask.row(position, left, last);
    Blocks const blocks =
        work.lists
            ? list_blocks(work, sequence, head, token / work.block_q)
            : visible_keys(work, sequence, mask.bounds(position, position, left, left, last));
    for (int i = 0; i < blocks.count; ++i) {
        int const block = blocks[i];
        if (block < 0 || block > kNone / work.block_k) continue;
        int const end = min((block + 1) * work.block_k, sequence.Tk);
        float const bias = p.lists.bias != nullptr ? work.bias(blocks.entry + i) : 0.f;
        for (int key = block * work.block_k; key < end; ++key) {
            int const x = mask.key(key);
            if (!mask.sees(row, x)) continue;
            load_row(p.k, row_offset(p.k, batch, sequence.k0 + key, key_head), p.dtype, K, k);
            load_row(p.v, row_offset(p.v, batch, sequence.k0 + key, key_head), p.dtype, V, v);
            Score const what = score(work, bent, row_product(q, k), row.p - x, bias);
            if (what.s == -infinity()) continue;  // behind a ramp
            float weight = expf(what.s - lse);
            if constexpr (kBackward) weight *= (row_product(grad_o, v) - delta) * what.slope;
            LSM_UNROLL
            for (int c = 0; c < kLaneColumns; ++c) sums[c] += weight * (kBackward ? k[c] : v[c]);
        }
        // Where it is inf or NaN by the keys it sees, nothing is to be repaired.
        bool same = true;
        LSM_UNROLL
        for (int c = 0; c < kLaneColumns; ++c)
            same &= before[c] * 0.f == 0.f || sums[c] * 0.f != 0.f;
        if (__all_sync(0xffffffffu, same)) return;
    }
    store_row(to, to_at, p.dtype, columns, sums, kBackward ? work.scale : 1.f);
}

}  // namespace lsm::sparse_attn
