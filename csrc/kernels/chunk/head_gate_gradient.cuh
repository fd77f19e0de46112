// The gradient of one gate per head (derivation: docs/math.md, section 4). Pairs inside a 16-token block come finished
// from dq's sweep; with u = q . dq and r = k . dk of what crosses the block's edges, and F the flux through them,
//
//     dg_t = inside_t + sum_{i>=t} u_i + sum_{j<t} r_j + X        i, j in the block
//     X = F_after - sum_j r_j = F_before - sum_i u_i
//
// F is known at either end of a chunk, so X can be had from both. Every block on the way adds the rounding of its terms:
// the two are weighed by it.
//
// The sweeps' warps hold every number in parts. A block of threads owns a chunk: it adds the parts up, one thread hands
// the flux from block to block, then every token has all it needs. Grid: (chunk, head).
#pragma once

#include "kernels/chunk/chunks.cuh"
#include "kernels/chunk/flux.cuh"

namespace lsm {

struct HeadGateParams {
    Operand read;           // [B, T, HV, parts] two fp32: u, inside
    Operand written;        // [B, T, HV, parts] fp32: r, or with weights two: r, their gradient
    Operand g, dg;          // [B, T, HV]
    Operand dw;             // [B, T, HV] fp32, of weights; null: none
    float const* flux;      // [chunks, heads, parts]
    float const* end_flux;  // [N, heads, parts], nullable: no gradient of the final state
    bool from_zeros;        // sequences start from no state
    int parts, heads;
    int64_t tokens_per_row;
};

struct HeadGateStorage {
    static constexpr int kTokens = FluxBlock::kTokens, kBlocks = kChunk / kTokens;
    float u[kChunk], r[kChunk], inside[kChunk], g[kChunk];
    float sum_u[kBlocks], sum_r[kBlocks], sum_g[kBlocks], crossing[kBlocks];
    float noise_u[kBlocks], noise_r[kBlocks], doubt[kBlocks];  // sums of squares
};

// In the order of parts: the same bits every time.
LSM_DEVICE float2 sum_pairs(float2 const* at, int parts) {
    float2 sum = {0.f, 0.f};
    for (int i = 0; i < parts; ++i) {
        float2 const x = load_global(at + i);
        sum.x += x.x, sum.y += x.y;
    }
    return sum;
}
LSM_DEVICE float sum_parts(float const* at, int parts) {
    float sum = 0.f;
    for (int i = 0; i < parts; ++i) sum += load_global(at + i);
    return sum;
}

// X of every block. `after` is F at the chunk's end, `before` at its beginning or null; `end`, where it is not null, is X
// of the last block.
LSM_DEVICE void solve_blocks(HeadGateStorage& s, int blocks, float after, float const* before,
                             float const* end) {
    auto const forgets = [&](int b) { return s.sum_g[b] < FluxBlock::kForgotten; };
    float flux = after, doubt = 0.f;
    for (int b = blocks - 1; b >= 0; --b) {
        float crossing = flux - s.sum_r[b];
        doubt += s.noise_r[b];
        if (forgets(b)) crossing = doubt = 0.f;
        if (end != nullptr && b == blocks - 1) crossing = *end, doubt = 0.f;
        s.crossing[b] = crossing, s.doubt[b] = doubt;
        flux = s.sum_u[b] + crossing, doubt += s.noise_u[b];
    }
    if (before == nullptr) return;
    flux = *before, doubt = 0.f;
    for (int b = 0; b < blocks; ++b) {
        float crossing = flux - s.sum_u[b];
        doubt += s.noise_u[b];
        if (forgets(b)) crossing = doubt = 0.f;
        float const both = doubt + s.doubt[b];
        if (both > 0.f && both < 1e37f)
            s.crossing[b] += s.doubt[b] / both * (crossing - s.crossing[b]);
        flux = crossing + s.sum_r[b], doubt += s.noise_r[b];
    }
}

template <class Gate>
__global__ void __launch_bounds__(128)
    head_gate_gradient(HeadGateParams const p, Segments const segments) {
    constexpr int kTokens = HeadGateStorage::kTokens;
    auto& s = *reinterpret_cast<HeadGateStorage*>(dyn_smem());
    int const head = static_cast<int>(blockIdx.x % p.heads), tid = threadIdx.x;
    i64 const index = blockIdx.x / p.heads;
    i64 const record = record_of_chunk(segments, index, p.tokens_per_row);
    Segment const segment = segments[record];
    i64 const begin =
        segment.t0 + (index - first_chunk(segment, record, p.tokens_per_row)) * kChunk;
    i64 const end = begin + kChunk < segment.t1 ? begin + kChunk : segment.t1;
    if (segment.unused() || begin >= end) return;
    int const tokens = static_cast<int>(end - begin), blocks = (tokens + kTokens - 1) / kTokens;
    auto const at = [&](Operand const& x, int t) {
        return segment.batch * x.rows.batch + (begin + t) * x.rows.time +
               head / x.heads_per_group * x.rows.head;
    };

    for (int t = tid; t < blocks * kTokens; t += 128) {
        float2 read = {0.f, 0.f};
        float r = 0.f, g = 0.f;
        if (t < tokens) {
            read = sum_pairs(static_cast<float2 const*>(p.read.rows.data) + at(p.read, t), p.parts);
            void const* const written = p.written.rows.data;
            i64 const from = at(p.written, t);
            if (p.dw.rows.data != nullptr) {
                float2 const both = sum_pairs(static_cast<float2 const*>(written) + from, p.parts);
                r = both.x;
                store_global(static_cast<float*>(p.dw.rows.data) + at(p.dw, t), both.y);
            } else {
                r = sum_parts(static_cast<float const*>(written) + from, p.parts);
            }
            g = static_cast<float>(
                load_global(static_cast<Gate const*>(p.g.rows.data) + at(p.g, t)));
        }
        s.u[t] = read.x, s.inside[t] = read.y, s.r[t] = r, s.g[t] = g;
    }
    __syncthreads();
    if (tid < blocks) {
        float u = 0.f, r = 0.f, g = 0.f, noise_u = 0.f, noise_r = 0.f;
        for (int t = tid * kTokens; t < (tid + 1) * kTokens; ++t) {
            u += s.u[t], r += s.r[t], g += s.g[t];
            noise_u += s.u[t] * s.u[t], noise_r += s.r[t] * s.r[t];
        }
        s.sum_u[tid] = u, s.sum_r[tid] = r, s.sum_g[tid] = g;
        s.noise_u[tid] = noise_u, s.noise_r[tid] = noise_r;
    }
    __syncthreads();
    if (tid == 0) {
        auto const known = [&](float const* of, i64 i) {
            return sum_parts(of + (i * p.heads + head) * p.parts, p.parts);
        };
        bool const ends =
            p.end_flux != nullptr && segment.is_last && end == segment.t1 && segment.sequence >= 0;
        float const end_flux = ends ? known(p.end_flux, segment.sequence) : 0.f;
        bool const first = begin == segment.t0;  // of the segment's chunks
        bool const has_before = !first || (segment.index == 0 && p.from_zeros);
        float const before = first ? 0.f : known(p.flux, index - 1);
        solve_blocks(s, blocks, known(p.flux, index), has_before ? &before : nullptr,
                     ends ? &end_flux : nullptr);
    }
    __syncthreads();
    for (int t = tid; t < tokens; t += 128) {
        int const b = t / kTokens;
        float sum = s.inside[t] + s.crossing[b];
        for (int i = t; i < (b + 1) * kTokens; ++i) sum += s.u[i];
        for (int j = b * kTokens; j < t; ++j) sum += s.r[j];
        store_global(static_cast<Gate*>(p.dg.rows.data) + at(p.dg, t), static_cast<Gate>(sum));
    }
}

}  // namespace lsm
