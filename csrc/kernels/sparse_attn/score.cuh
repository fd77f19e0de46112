// From q . k to a score, and what a score's gradient means for what went into it.
#pragma once

#include "kernels/sparse_attn/geometry.cuh"

namespace lsm::sparse_attn {

struct Score {
    float s;      // natural units
    float slope;  // d s / d (q . k), without the scale
    float ramp;   // d s / d z
};

// Of a head: what bends its scores.
struct Head {
    float slope, span;  // ALiBi's; z of the ramp

    LSM_DEVICE static Head of(Work const& work, int head) {
        SparseAttnParams const& p = work.p;
        Head h = {0.f, 0.f};
        if (p.alibi_slopes != nullptr)
            h.slope = load_global(static_cast<float const*>(p.alibi_slopes) + head);
        if (p.ramp != nullptr) h.span = load_global(static_cast<float const*>(p.ramp) + head);
        return h;
    }
};

// 1 - 2 / (e^2x + 1) to 1e-7.
LSM_DEVICE float tanh_fast(float x) {
    return 1.f - __fdividef(2.f, exp2_approx(2.f * kLog2e * x) + 1.f);
}

// kFast: of the hardware's approximations, good for operands in half precision.
template <bool kFast = false>
LSM_DEVICE Score score(Work const& work, Head const& head, float dot, int distance, float bias) {
    Score r = {dot * work.scale, 1.f, 0.f};
    if (work.softcap != 0.f) {
        float const t = kFast ? tanh_fast(r.s * work.per_softcap) : tanhf(r.s / work.softcap);
        r.s = work.softcap * t;
        r.slope = 1.f - t * t;
    }
    float const d = static_cast<float>(distance < 0 ? -distance : distance);
    r.s += bias - head.slope * d;
    if (work.p.ramp != nullptr) {
        float const room = work.ramp_length + head.span - d;
        float const share = kFast ? room * work.per_ramp_length : room / work.ramp_length;
        float const log = kFast ? __logf(share) : logf(share);
        r.s = share >= 1.f ? r.s : share > 0.f ? r.s + log : -infinity();
        r.ramp = share > 0.f && share <= 1.f ? 1.f / room : 0.f;
    }
    return r;
}

}  // namespace lsm::sparse_attn
