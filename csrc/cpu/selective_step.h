// One token of the selective scan (see selective_tier.h). To turn its states around would take longer than its arithmetic, so
// they lie in the lanes, from one vector of them on; channels go as many at a time as a vector has lanes.
#pragma once

#include "bounded.h"
#include "numbers.h"
#include "selective_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr double kLog2e = 1.44269504088896340736;

// 2^x: one rounding less than e^x of the same number.
LSM_INLINE Vector<float> exp2(Vector<float> x) {
    using V = Vector<float>;
#if LSM_CPU_VECTOR_BYTES == 64
    // A polynomial of what is above the integer below x; scalef takes that integer of x itself, and ends at 0 and infinity.
    constexpr int kDown = 1;
    V const r = V(_mm512_maskz_reduce_ps(0xffff, __m512(x), kDown));
    V y = V{} + 2.161291486117989e-4f;
    y = y * r + 1.246784580871463e-3f;
    y = y * r + 9.675451554358006e-3f;
    y = y * r + 5.548528209328651e-2f;
    y = y * r + 2.402293086051941e-1f;
    y = y * r + 6.931470632553101e-1f;
    y = y * r + 1.0f;
    return scale_by_power_of_two(y, x);
#else
    x = bounded(x, -160.0f, 130.0f);
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    V const n = (x + kRound) - kRound, r = x - n;
    V y = V{} + 1.535336188319500e-4f;
    y = y * r + 1.339887440266574e-3f;
    y = y * r + 9.618437357674640e-3f;
    y = y * r + 5.550332471162809e-2f;
    y = y * r + 2.402264791363012e-1f;
    y = y * r + 6.931472028550421e-1f;
    y = y * r + 1.0f;
    return scale_by_power_of_two(y, n);
#endif
}
LSM_INLINE Vector<double> exp2(Vector<double> x) {
    return each_lane<double>(x, [](double v) { return std::exp2(v); });
}

inline bool is_selective_step(SelectiveParams const& p) {
    int64_t const lanes = p.state_dtype == Dtype::f64 ? kLanes<double> : kLanes<float>;
    return p.T == 1 && p.cu_seqlens == nullptr && p.S >= lanes && !p.is_complex && !p.channel_B &&
           !p.channel_C && p.u.head == 1 && p.dt.head == 1 && p.z.head <= 1;
}

// States s ... s + lanes - 1 of `count` channels, rows of S; sums[j]: products whose sum is what C reads of channel j.
template <class T, class Read, class Write>
LSM_INLINE void step_states(int64_t S, int64_t count, T const* a, Vector<T> b, Vector<T> c,
                            T const* rates, T const* drives, T const* before, T* after,
                            Vector<T>* sums, Read const& read, Write const& write) {
    for (int64_t j = 0; j < count; ++j) {
        __builtin_prefetch(a + (j + 8) * S);  // a few channels on
        Vector<T> h = b * drives[j];
        if (before != nullptr) {
            __builtin_prefetch(before + (j + 8) * S);
            h += exp2(read(a + j * S) * rates[j]) * read(before + j * S);
        }
        if (after != nullptr) write(after + j * S, h);
        sums[j] += c * h;
    }
}

template <class T, class In>
void selective_step(SelectiveParams const& p, SelectiveTask const& task) {
    using V = Vector<T>;
    constexpr int W = kLanes<T>;
    for (int64_t n = task.n_begin; n < task.n_end; ++n) {
        auto const row = [&](Rows const& r) { return static_cast<In*>(r.data) + n * r.batch; };
        In const* const b = row(p.b) + task.group * p.b.head;
        In const* const c = row(p.c) + task.group * p.c.head;
        for (int64_t d = task.c_begin; d < task.c_end; d += W) {
            int64_t const count = min_of(W, task.c_end - d);
            auto const token = [&](Rows const& r) {
                return read<Real<T>>(static_cast<In const*>(row(r)) + d, count).re;
            };
            auto const channel = [&](void const* data) {
                return data == nullptr ? V{}
                                       : read<Real<T>>(static_cast<T const*>(data) + d, count).re;
            };
            V const u = token(p.u), raw = token(p.dt) + channel(p.dt_bias);
            V const dt = p.softplus ? softplus(raw) : raw;
            T rates[W], drives[W];
            store(rates, dt * T(kLog2e)), store(drives, dt * u);
            int64_t const first = d * p.S, state = n * p.D * p.S + first;
            T const* const A = static_cast<T const*>(p.A) + first;
            auto const* const before = p.initial_state == nullptr
                                           ? nullptr
                                           : static_cast<T const*>(p.initial_state) + state;
            auto* const after =
                p.final_state == nullptr ? nullptr : static_cast<T*>(p.final_state) + state;
            V sums[W] = {};
            auto const walk = [&](int64_t s, V vb, V vc, auto const& load_some,
                                  auto const& store_some) {
                step_states<T>(p.S, count, A + s, vb, vc, rates, drives,
                               before == nullptr ? before : before + s,
                               after == nullptr ? after : after + s, sums, load_some, store_some);
            };
            int64_t s = 0;
            for (; s + W <= p.S; s += W) {
                walk(
                    s, widen(b + s), widen(c + s), [&](T const* x) { return load(x); },
                    [](T* x, V h) { store(x, h); });
            }
            if (int64_t const rest = p.S - s; rest > 0) {
                walk(
                    s, widen_first<T>(b + s, rest), widen_first<T>(c + s, rest),
                    [&](T const* x) { return widen_first<T>(x, rest); },
                    [&](T* x, V h) { narrow_first<T>(x, h, rest); });
            }
            V y = sums_of_rows<T>(sums) + channel(p.skip) * u;
            if (p.z.data != nullptr) {
                V const z = token(p.z);
                y = y * z * sigmoid(z);
            }
            write(row(p.y) + d, Real<T>{y}, count);
        }
    }
}

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
