// The gate's gradient from what the dq and dk sweeps left (derivation: docs/math.md, "The gate's gradient").
//
// dg_t sums over all pairs that cross t: written at j < t, read at i >= t. By 16-token blocks, walked backwards,
//
//     dg_t = sum_{i>=t} u_i - sum_{j>=t} a_j + sum_{j<t} r_j + X        i, j in the block
//     X = F_after - sum_j r_j,       F_before = sum_i u_i - sum_j a_j + X
//
// u = q . dq and a + r = k . dk without their own token's term (it cancels exactly; rounded twice it would bury strong
// gates), a from the block's tokens and r from what follows it; F is the flux through a block's edge, known exactly at
// chunk ends. Nothing of different blocks is subtracted but in X, and X is nothing where the block forgets everything.
// u's dq lies where dg will: read, then overwritten. A thread owns a channel pair of a chunk. Grid: (chunk, head).
#pragma once

#include "kernels/chunk/chunks.cuh"
#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm {

struct GateGradientParams {
    Operand q, k;             // [B, T, H, K]
    Operand strict_dq_to_dg;  // [B, T, HV, K], dtype of the gate
    Operand split_dk;   // [B, T, HV, K], two bf16: from what follows the block, from its tokens
    Operand g;          // [B, T, HV, K], natural log
    float const* flux;  // [chunks, heads, K]
    uint8_t const* tokenwise;      // [chunks, blocks, heads, row_tiles]: blocks of one token
    float const* end_flux;         // [N, heads, K], nullable: no gradient of the final state
    uint8_t const* end_tokenwise;  // [N, heads, row_tiles]
    int row_tile, row_tiles;
    int heads, K;
    int64_t tokens_per_row;
};

template <class Gate>
LSM_DEVICE float2 load_pair(Gate const* at) {
    if constexpr (sizeof(Gate) == 4) {
        return load_global(reinterpret_cast<float2 const*>(at));
    } else {
        return unpack(load_global(reinterpret_cast<u32 const*>(at)));
    }
}

template <class Gate>
LSM_DEVICE void store_pair(Gate* at, float2 x) {
    if constexpr (sizeof(Gate) == 4) {
        store_global(reinterpret_cast<float2*>(at), x);
    } else {
        store_global(reinterpret_cast<u32*>(at), pack_bf16(x.x, x.y));
    }
}

// The last record whose first chunk is not past `index`; unused records, all at the end, are past everything.
LSM_DEVICE i64 record_of_chunk(Segments const& segments, i64 index, i64 tokens_per_row) {
    i64 low = 0, high = segments.count;
    while (high - low > 1) {
        i64 const middle = (low + high) / 2;
        Segment const segment = segments[middle];
        bool const past = segment.unused() || first_chunk(segment, middle, tokens_per_row) > index;
        (past ? high : low) = middle;
    }
    return low;
}

// One channel of a block: 16 tokens, or fewer at the segment's end.
struct FluxBlock {
    static constexpr int kTokens = 16;
    // X is at most the decay over the block times the flux, and computed to within a bf16 rounding of the flux: below
    // 2^-9 (natural log here) nothing is the better estimate, and no error of later tokens passes.
    static constexpr float kForgotten = -9.f * 0.6931471805599453f;
    float u[kTokens], a[kTokens], r[kTokens], g[kTokens];

    // Leaves dg in u; takes the flux after the block, returns the one before it. `end` is X of the last block (of its
    // last token, where tokenwise) of a sequence with a final gradient, else null.
    LSM_DEVICE float solve(float flux, bool tokenwise, float const* end, int tokens) {
        if (tokenwise) {  // r_j holds all that follows j: every token is a block of its own
            LSM_UNROLL
            for (int t = kTokens - 1; t >= 0; --t) {
                bool const exact = end != nullptr && t == tokens - 1;
                float const crossing = exact ? *end : g[t] < kForgotten ? 0.f : flux - r[t];
                u[t] = flux = u[t] + crossing;
            }
            return flux;
        }
        float all_r = 0.f, all_g = 0.f, suffix = 0.f;
        LSM_UNROLL
        for (int t = kTokens - 1; t >= 0; --t) {
            suffix += u[t] - a[t];
            u[t] = suffix;
            all_r += r[t], all_g += g[t];
        }
        float crossing = end != nullptr ? *end : all_g < kForgotten ? 0.f : flux - all_r;
        float const before = suffix + crossing;
        LSM_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            u[t] += crossing;
            crossing += r[t];
        }
        return before;
    }
};

template <class Gate>
__global__ void __launch_bounds__(128)
    gate_gradient(GateGradientParams const p, Segments const segments) {
    int const head = static_cast<int>(blockIdx.x % p.heads);
    i64 const index = blockIdx.x / p.heads;
    i64 const record = record_of_chunk(segments, index, p.tokens_per_row);
    Segment const segment = segments[record];
    i64 const begin =
        segment.t0 + (index - first_chunk(segment, record, p.tokens_per_row)) * kChunk;
    i64 const end = begin + kChunk < segment.t1 ? begin + kChunk : segment.t1;
    int const c = threadIdx.x * 2;
    if (segment.unused() || begin >= end || c >= p.K) return;

    auto const at = [&](Operand const& x) {
        return segment.batch * x.rows.batch + begin * x.rows.time +
               head / x.heads_per_group * x.rows.head + c;
    };
    bf16 const* const q = static_cast<bf16 const*>(p.q.rows.data) + at(p.q);
    bf16 const* const k = static_cast<bf16 const*>(p.k.rows.data) + at(p.k);
    Gate const* const g = static_cast<Gate const*>(p.g.rows.data) + at(p.g);
    Gate* const dg = static_cast<Gate*>(p.strict_dq_to_dg.rows.data) + at(p.strict_dq_to_dg);
    u32 const* const dk = static_cast<u32 const*>(p.split_dk.rows.data) + at(p.split_dk);
    float2 flux =
        load_global(reinterpret_cast<float2 const*>(p.flux + (index * p.heads + head) * p.K + c));

    constexpr int kTokens = FluxBlock::kTokens;
    int const tokens = static_cast<int>(end - begin);
    LSM_UNROLL_BY(1)
    for (int b = (tokens - 1) / kTokens; b >= 0; --b) {
        FluxBlock even, odd;
        LSM_UNROLL
        for (int i = 0; i < kTokens; ++i) {
            i64 const t = b * kTokens + i;
            bool const valid = t < tokens;
            float2 const none = {0.f, 0.f};
            float2 const query = valid ? load_pair(q + t * p.q.rows.time) : none;
            float2 const key = valid ? load_pair(k + t * p.k.rows.time) : none;
            float2 const gate = valid ? load_pair(g + t * p.g.rows.time) : none;
            float2 const read = valid ? load_pair(dg + t * p.strict_dq_to_dg.rows.time) : none;
            uint2 const split =
                valid ? load_global(reinterpret_cast<uint2 const*>(dk + t * p.split_dk.rows.time))
                      : uint2{0, 0};
            float2 const x = unpack(split.x);
            float2 const y = unpack(split.y);
            even.u[i] = query.x * read.x, even.r[i] = key.x * x.x, even.a[i] = key.x * x.y,
            even.g[i] = gate.x;
            odd.u[i] = query.y * read.y, odd.r[i] = key.y * y.x, odd.a[i] = key.y * y.y,
            odd.g[i] = gate.y;
        }
        i64 const block = (index * (kChunk / kTokens) + b) * p.heads + head;
        bool const tokenwise = load_global(p.tokenwise + block * p.row_tiles + c / p.row_tile) != 0;
        // Where the two sweeps walked the last block differently, nothing crosses it.
        bool const ends = p.end_flux != nullptr && segment.is_last && end == segment.t1 &&
                          segment.sequence >= 0 && b == (tokens - 1) / kTokens;
        i64 const owner = static_cast<i64>(segment.sequence) * p.heads + head;
        float2 at_end = {0.f, 0.f};
        bool exact = false;
        if (ends) {
            at_end = load_global(reinterpret_cast<float2 const*>(p.end_flux + owner * p.K + c));
            uint8_t const walk =
                load_global(p.end_tokenwise + owner * p.row_tiles + c / p.row_tile);
            exact = tokenwise == (walk != 0);
        }
        int const left = tokens - b * kTokens;
        flux = {even.solve(flux.x, tokenwise, exact ? &at_end.x : nullptr, left),
                odd.solve(flux.y, tokenwise, exact ? &at_end.y : nullptr, left)};
        LSM_UNROLL
        for (int i = 0; i < kTokens; ++i) {
            i64 const t = b * kTokens + i;
            if (t < tokens) store_pair(dg + t * p.strict_dq_to_dg.rows.time, {even.u[i], odd.u[i]});
        }
    }
}

}  // namespace lsm
