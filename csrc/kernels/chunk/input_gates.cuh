// mLSTM's gates over whole sequences, before the sweeps: m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), and from it every
// token's row of Normaliser::tokens.
//
// m is a chain of maps m -> max(m + fall, level), which compose to such a map: threads have a token each, a block walks one
// head of a sequence by as many tokens, and what every warp's tokens make of m is put together through shared memory. It
// is in fp64, where sums over a sequence lose nothing that fp32 would have. Grid: (record, head).
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "policy/input_gate.h"

namespace lsm {

inline constexpr int kInputGateWarps = 16, kInputGateThreads = 32 * kInputGateWarps;

struct InputGateParams {
    Rows i, f;  // [B, T, HV]
    bool is_fp32, exponential;
    Rows log_decay, weight, least;  // [B, T, HV] fp32
    float const* m0;                // [N, HV], nullable: zeros
    float* m;                       // nullable
    int heads;
};

// m -> max(m + fall, level); NaN stays.
struct StabiliserMap {
    double fall, level;

    LSM_DEVICE double operator()(double m) const {
        double const fallen = m + fall;
        return level > fallen ? level : fallen;
    }
    LSM_DEVICE StabiliserMap after(StabiliserMap const& first) const {
        return {first.fall + fall, (*this)(first.level)};
    }
};

struct InputGateStorage {
    StabiliserMap warps[kInputGateWarps];
};

LSM_DEVICE float load_input_gate(InputGateParams const& p, Rows const& x, i64 at) {
    return p.is_fp32 ? load_global(static_cast<float const*>(x.data) + at)
                     : static_cast<float>(load_global(static_cast<bf16 const*>(x.data) + at));
}

LSM_DEVICE float log_sigmoid(float x) {
    return fminf(x, 0.f) - log1pf(expf(-fabsf(x)));
}

static __global__ void __launch_bounds__(kInputGateThreads)
    input_gates(InputGateParams const p, Segments const segments) {
    auto& s = *reinterpret_cast<InputGateStorage*>(dyn_smem());
    int const head = static_cast<int>(blockIdx.x % p.heads), tid = threadIdx.x;
    int const lane = tid % 32, warp = tid / 32;
    Segment const segment = segments[blockIdx.x / p.heads];
    if (segment.unused() || (segment.index != 0 && !segment.poison)) return;
    auto const at = [&](Rows const& x, i64 t) {
        return segment.batch * x.batch + t * x.time + head * x.head;
    };
    auto const put = [&](Rows const& x, i64 t, float value) {
        store_global(static_cast<float*>(x.data) + at(x, t), value);
    };
    i64 const owner = static_cast<i64>(segment.sequence) * p.heads + head;
    if (segment.poison) {
        for (i64 t = segment.t0 + tid; t < segment.t1; t += kInputGateThreads)
            put(p.log_decay, t, nan_value()), put(p.weight, t, nan_value()),
                put(p.least, t, nan_value());
        if (tid == 0 && segment.sequence >= 0 && p.m != nullptr)
            store_global(p.m + owner, nan_value());
        return;
    }
    double m = p.m0 == nullptr ? 0.0 : static_cast<double>(load_global(p.m0 + owner));
    for (i64 begin = segment.t0; begin < segment.end; begin += kInputGateThreads) {
        i64 const t = begin + tid;
        bool const inside = t < segment.end;
        float i = 0.f, f = 0.f;
        if (inside)
            i = load_input_gate(p, p.i, at(p.i, t)),
            f = log_sigmoid(load_input_gate(p, p.f, at(p.f, t)));
        if (!p.exponential) {
            if (inside)
                put(p.log_decay, t, f), put(p.weight, t, 1.f / (1.f + expf(-i))),
                    put(p.least, t, 1.f);
            continue;
        }
        // a token alone, and all of its warp's up to it
        StabiliserMap map{0.0, -1e300};
        if (inside)
            map = {stabiliser_fall(static_cast<double>(f)),
                   stabiliser_level(static_cast<double>(i))};
        LSM_UNROLL
        for (int d = 1; d < 32; d *= 2) {
            StabiliserMap const first{__shfl_up_sync(0xffffffffu, map.fall, d),
                                      __shfl_up_sync(0xffffffffu, map.level, d)};
            if (lane >= d) map = map.after(first);
        }
        if (lane == 31) s.warps[warp] = map;
        __syncthreads();
        double before = m;
        LSM_UNROLL_BY(1)
        for (int w = 0; w < kInputGateWarps; ++w) {
            if (w == warp) before = m;
            m = s.warps[w](m);
        }
        __syncthreads();
        double const next = map(before), up_to = __shfl_up_sync(0xffffffffu, next, 1);
        double const last = lane == 0 ? before : up_to;
        if (inside) {
            put(p.log_decay, t, static_cast<float>(static_cast<double>(f) + (last - next)));
            put(p.weight, t, expf(static_cast<float>(static_cast<double>(i) - next)));
            put(p.least, t, expf(static_cast<float>(-next)));
        }
    }
    if (tid == 0 && p.m != nullptr) store_global(p.m + owner, static_cast<float>(m));
}

}  // namespace lsm
