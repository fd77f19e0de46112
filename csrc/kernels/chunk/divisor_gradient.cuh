// Backwards through h = o / (max(|size|, least) + eps), of every token before the sweeps: what dh is multiplied by to be dO,
// and, where the size is what divides, the gradient of the size over that factor, -sign(size) dh . h.
//
// A block owns kDivisorTokens tokens of one head; as many lanes of a warp as a row has pieces of 8 columns, rounded up to
// a power of two, share a token. Grid: (piece, head).
#pragma once

#include "kernels/chunk/finish_gradient.cuh"

namespace lsm {

inline constexpr int kDivisorTokens = 128, kDivisorThreads = 128;

struct DivisorGradientParams {
    Rows grad_h, h;      // [B, T, HV, V]
    Rows size, least;    // [B, T, HV] fp32; without size nothing is divided
    Rows reader, below;  // [B, T, HV] fp32
    float eps;
    int heads, columns, lanes;  // columns: pieces of 8
    i64 tokens, tokens_per_row;
};

static __global__ void __launch_bounds__(kDivisorThreads)
    divisor_gradient(DivisorGradientParams const p) {
    int const head = static_cast<int>(blockIdx.x % p.heads), tid = threadIdx.x;
    i64 const begin = blockIdx.x / p.heads * kDivisorTokens;
    int const column = tid % p.lanes, at_once = kDivisorThreads / p.lanes;
    for (int i = tid / p.lanes; i < kDivisorTokens; i += at_once) {  // as often for all lanes
        i64 const token = begin + i, batch = token / p.tokens_per_row,
                  t = token - batch * p.tokens_per_row;
        bool const inside = token < p.tokens;
        auto const at = [&](Rows const& x) { return batch * x.batch + t * x.time + head * x.head; };
        auto const number = [&](Rows const& x) {
            return load_global(static_cast<float const*>(x.data) + at(x));
        };
        float dot = 0.f;
        if (inside && column < p.columns && p.size.data != nullptr) {
            float dh[8], h[8];
            load_8(p.grad_h, at(p.grad_h) + column * 8, dh);
            load_8(p.h, at(p.h) + column * 8, h);
            LSM_UNROLL
            for (int c = 0; c < 8; ++c) dot += dh[c] * h[c];
        }
        for (int d = 1; d < p.lanes; d *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, d);
        if (!inside || column != 0) continue;
        float reader = 1.f, below = 0.f;
        if (p.size.data != nullptr) {
            float const size = number(p.size), least = number(p.least), length = fabsf(size);
            reader = 1.f / (fmaxf(length, least) + p.eps);
            if (length > least) below = size > 0.f ? -dot : dot;
        }
        store_global(static_cast<float*>(p.reader.data) + at(p.reader), reader);
        store_global(static_cast<float*>(p.below.data) + at(p.below), below);
    }
}

}  // namespace lsm
