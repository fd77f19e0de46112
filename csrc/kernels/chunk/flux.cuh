// The gate's gradient inside one block of 16 tokens (derivation: docs/math.md, section 4).
//
// dg_t sums over all pairs that cross t: written at j < t, read at i >= t. By blocks, walked backwards,
//
//     dg_t = sum_{i>=t} u_i - sum_{j>=t} a_j + sum_{j<t} r_j + X        i, j in the block
//     X = F_after - sum_j r_j,       F_before = sum_i u_i - sum_j a_j + X
//
// u = q . dq and a + r = k . dk without their own token's term (it cancels exactly; rounded twice it would bury strong
// gates), a from the block's tokens and r from what follows it; F is the flux through a block's edge, known exactly at
// chunk ends. Nothing of different blocks is subtracted but in X, and X is nothing where the block forgets everything.
#pragma once

#include "kernels/platform.cuh"

namespace lsm {

// One gate of a block: 16 tokens, or fewer at the segment's end.
struct FluxBlock {
    static constexpr int kTokens = 16;
    // X is at most the decay over the block times the flux, and computed to within a bf16 rounding of the flux: below
    // 2^-9 (natural log here) nothing is the better estimate, and no error of later tokens passes.
    static constexpr float kForgotten = -9.f * 0.6931471805599453f;
    float u[kTokens], a[kTokens], r[kTokens], g[kTokens];

    struct Sums {
        float u, a, r, g;
    };
    LSM_DEVICE Sums sums() const {
        Sums s = {0.f, 0.f, 0.f, 0.f};
        LSM_UNROLL
        for (int t = kTokens - 1; t >= 0; --t) s.u += u[t], s.a += a[t], s.r += r[t], s.g += g[t];
        return s;
    }
    LSM_DEVICE static float crossing(Sums const& s, float flux, float const* end) {
        return end != nullptr ? *end : s.g < kForgotten ? 0.f : flux - s.r;
    }

    // Leaves dg in u; takes the flux after the block, returns the one before it. `end` is X of the last block (of its
    // last token, where tokenwise) of a sequence with a final gradient, else null.
    LSM_DEVICE float solve(float flux, bool tokenwise, float const* end, int tokens) {
        if (tokenwise) {  // r_j holds all that follows j: every token is a block of its own
            LSM_UNROLL
            for (int t = kTokens - 1; t >= 0; --t) {
                bool const exact = end != nullptr && t == tokens - 1;
                float const across = exact ? *end : g[t] < kForgotten ? 0.f : flux - r[t];
                u[t] = flux = u[t] + across;
            }
            return flux;
        }
        float inside = crossing(sums(), flux, end), suffix = 0.f;
        float const across = inside;
        LSM_UNROLL
        for (int t = kTokens - 1; t >= 0; --t) {
            suffix += u[t] - a[t];
            u[t] = suffix;
        }
        LSM_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            u[t] += inside;
            inside += r[t];
        }
        return suffix + across;
    }
};

}  // namespace lsm
