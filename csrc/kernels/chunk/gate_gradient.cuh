// The gate's gradient, by channel, from what the sweeps of the gated side left: flux.cuh. With decay by key channel u is
// q . dq and a + r are k . dk; by value channel they are dO . o and v . dv. u's output lies where dg will: read, then
// overwritten. A thread owns a channel pair of a chunk. Grid: (chunk, head).
#pragma once

#include "kernels/chunk/chunks.cuh"
#include "kernels/chunk/flux.cuh"
#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm {

struct GateGradientParams {
    Operand reader, writer;  // q and k, or dO and v
    Operand strict_to_dg;  // [B, T, HV, channels], dtype of the gate: the reader's gradient (or o)
    Operand
        split;  // [B, T, HV, channels], the writer's, two bf16: from after the block, from its tokens
    Operand g;                     // [B, T, HV, channels], natural log
    float const* flux;             // [chunks, heads, channels]
    uint8_t const* tokenwise;      // [chunks, blocks, heads, row_tiles]: blocks of one token
    float const* end_flux;         // [N, heads, channels], nullable: no gradient of the final state
    uint8_t const* end_tokenwise;  // [N, heads, row_tiles]
    int row_tile, row_tiles;
    int heads, channels;
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
    if (segment.unused() || begin >= end || c >= p.channels) return;

    auto const at = [&](Operand const& x) {
        return segment.batch * x.rows.batch + (begin + x.next) * x.rows.time +
               head / x.heads_per_group * x.rows.head + c;
    };
    bf16 const* const q = static_cast<bf16 const*>(p.reader.rows.data) + at(p.reader);
    bf16 const* const k = static_cast<bf16 const*>(p.writer.rows.data) + at(p.writer);
    Gate const* const g = static_cast<Gate const*>(p.g.rows.data) + at(p.g);
    Gate* const dg = static_cast<Gate*>(p.strict_to_dg.rows.data) + at(p.strict_to_dg);
    u32 const* const dk = static_cast<u32 const*>(p.split.rows.data) + at(p.split);
    float2 flux = load_global(
        reinterpret_cast<float2 const*>(p.flux + (index * p.heads + head) * p.channels + c));

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
            float2 const query =
                valid && (p.reader.next == 0 || begin + t + 1 < segment.t1 || !segment.is_last)
                    ? load_pair(q + t * p.reader.rows.time)
                    : none;
            float2 const key = valid ? load_pair(k + t * p.writer.rows.time) : none;
            float2 const gate = valid ? load_pair(g + t * p.g.rows.time) : none;
            float2 const read = valid ? load_pair(dg + t * p.strict_to_dg.rows.time) : none;
            uint2 const split =
                valid ? load_global(reinterpret_cast<uint2 const*>(dk + t * p.split.rows.time))
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
            at_end =
                load_global(reinterpret_cast<float2 const*>(p.end_flux + owner * p.channels + c));
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
            if (t < tokens) store_pair(dg + t * p.strict_to_dg.rows.time, {even.u[i], odd.u[i]});
        }
    }
}

}  // namespace lsm
