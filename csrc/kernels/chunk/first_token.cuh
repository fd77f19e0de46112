// Where tokens read the state before their own write, the walk pairs every write with the next token's read, and the
// first token of a sequence is left over: it reads the initial state alone.
//
//     o = scale S_0^T q        dq = scale S_0 dO        dS_0 += scale q dO^T
//
// A block owns a sequence of one value head. Grid: (record, head).
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"
#include "kernels/warp.cuh"

namespace lsm {

struct FirstTokenParams {
    Operand q, grad_o;   // [B, T, H, K], [B, T, HV, V]; the latter in a backward
    Operand o, dq;       // [B, T, HV, V] of a forward, [B, T, HV, K] of a backward
    float const* state;  // [N, HV, K, V], nullable: zeros
    float* grad_state;   // [N, HV, K, V], nullable; of a backward
    int heads, K, V;
    float scale;
};

static __global__ void __launch_bounds__(128)
    first_token(FirstTokenParams const p, Segments const segments, bool backward) {
    int const head = static_cast<int>(blockIdx.x % p.heads), tid = threadIdx.x;
    Segment const segment = segments[blockIdx.x / p.heads];
    if (segment.unused() || segment.index != 0 || segment.t0 == segment.t1) return;
    auto const row = [&](Operand const& x) {
        return static_cast<bf16*>(x.rows.data) + segment.batch * x.rows.batch +
               segment.t0 * x.rows.time + head / x.heads_per_group * x.rows.head;
    };
    float const nothing = segment.poison ? nan_value() : 0.f;
    bool const has_state = p.state != nullptr && !segment.poison;
    i64 const owner = (static_cast<i64>(segment.sequence) * p.heads + head) * p.K * p.V;
    bf16 const* const q = row(p.q);
    if (!backward) {
        bf16* const o = row(p.o);
        for (int v = tid; v < p.V; v += 128) {
            float sum = nothing;
            for (int k = 0; has_state && k < p.K; ++k)
                sum += static_cast<float>(load_global(q + k)) *
                       load_global(p.state + owner + static_cast<i64>(k) * p.V + v);
            store_global(o + v, bf16(p.scale * sum));
        }
        return;
    }
    bf16 const* const grad_o = row(p.grad_o);
    bf16* const dq = row(p.dq);
    for (int k = tid / 32; k < p.K; k += 4) {  // a warp per row of the state
        float sum = nothing;
        float const query = p.scale * static_cast<float>(load_global(q + k));
        for (int v = tid % 32; v < p.V; v += 32) {
            i64 const at = owner + static_cast<i64>(k) * p.V + v;
            float const grad = static_cast<float>(load_global(grad_o + v));
            if (has_state) sum += grad * load_global(p.state + at);
            if (p.grad_state != nullptr && segment.sequence >= 0)
                store_global(p.grad_state + at, load_global(p.grad_state + at) + query * grad);
        }
        sum = warp_sum(sum);
        if (tid % 32 == 0) store_global(dq + k, bf16(p.scale * sum));
    }
}

inline void run_first_token(FirstTokenParams const& p, Segments const& segments, bool backward,
                            void* stream) {
    i64 const blocks = segments.count * p.heads;
    if (blocks == 0) return;
    launch(first_token, dim3(static_cast<unsigned>(blocks)), dim3(128), 0, stream, p, segments,
           backward);
}

}  // namespace lsm
