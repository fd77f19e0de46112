// The state in its registers: where it comes from, how it is rescaled, where it goes.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

// S *= 2^exponent[channel], channel being of the gated side. By halves: reopening a frame takes up to 2^-160, less
// than fp32 holds, to a state that large.
template <class Config>
LSM_DEVICE void Sweep<Config>::scale_state(float const* exponents) {
    if constexpr (kOnRows) {
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            float const upper = exp2_approx(0.5f * exponents[state_row(m, 0)]);
            float const lower = exp2_approx(0.5f * exponents[state_row(m, 2)]);
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; ++n) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e)
                    S[m][n][e] = S[m][n][e] * (e < 2 ? upper : lower) * (e < 2 ? upper : lower);
            }
        }
    } else {
        LSM_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            float2 const e = *reinterpret_cast<float2 const*>(exponents + state_column(n));
            float const even = exp2_approx(0.5f * e.x), odd = exp2_approx(0.5f * e.y);
            LSM_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                LSM_UNROLL
                for (int i = 0; i < 4; ++i)
                    S[m][n][i] = S[m][n][i] * (i % 2 == 0 ? even : odd) * (i % 2 == 0 ? even : odd);
            }
        }
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::scale_state(float by) {
    float const factor = exp2_approx(0.5f * by);
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        LSM_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) S[m][n][e] = S[m][n][e] * factor * factor;
        }
    }
    if constexpr (kNormalised) scale_sums(factor);
}

// visit(value, offset) for every element of the state that exists, offset into a [K, V] matrix.
template <class Config>
template <class Visit>
LSM_DEVICE void Sweep<Config>::for_state(StateView const& view, Visit visit) {
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        LSM_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) {
                int const row = row0 + state_row(m, e), c = state_column(n) + e % 2;
                if (row < p.rows && c < p.contraction)
                    visit(S[m][n][e], c * view.contraction + row * view.row);
            }
        }
    }
}

template <class Config>
LSM_DEVICE i64 Sweep<Config>::state_offset(i64 owner) const {
    return (owner * p.heads + head) * static_cast<i64>(p.rows) * p.contraction;
}

template <class Config>
LSM_DEVICE void Sweep<Config>::start_state() {
    float const fill = segment.poison ? nan_value() : 0.f;
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        LSM_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) S[m][n][e] = fill;
        }
    }
    i64 const owner = p.start_per_record ? s.record : segment.sequence;
    if (p.start.data != nullptr && !segment.poison) {
        float const* const from = p.start.data + state_offset(owner);
        for_state(p.start, [&](float& value, int offset) { value = load_global(from + offset); });
    }
    if constexpr (kNormalised) start_sums(owner);
    if constexpr (!kWhole) {
        LSM_UNROLL_BY(1)
        for (int c = tid; c < kGated; c += kThreads) {
            s.frames.frame[0][c] = 0.f;
            if constexpr (StateOnly) s.frames.total[c] = 0.f;
        }
    }
}

// A gate in log2.
template <class Config>
LSM_DEVICE float Sweep<Config>::gate_at(i64 at) const {
    void const* const gates = p.gate.rows.data;
    float const g = p.gate_is_fp32
                        ? load_global(static_cast<float const*>(gates) + at)
                        : static_cast<float>(load_global(static_cast<bf16 const*>(gates) + at));
    return g * kLog2e;
}

// The decay still owed when a reverse sweep leaves its first token (log2).
template <class Config>
LSM_DEVICE float Sweep<Config>::trailing_gate(int c) const {
    int const channel = (kOnRows ? row0 : 0) + c;
    if (gate_lag() == 0 || t0 == t1 || channel >= (kOnRows ? p.rows : p.contraction)) return 0.f;
    return gate_at(row_offset(p.gate, t0) + channel);
}

template <class Config>
LSM_DEVICE void Sweep<Config>::end_state() {
    bool const owns =
        StateOnly || (segment.sequence >= 0 && (p.reverse ? segment.index == 0 : segment.is_last));
    if (!owns || (p.end.data == nullptr && !(kNormalised && p.sums_end != nullptr))) return;
    if constexpr (kWhole) {
        float const trailing = gate_lag() != 0 && t0 != t1 ? whole_gate_of(t0) : 0.f;
        scale_state(exponent + trailing);
        gate_total += trailing;
    } else {
        LSM_UNROLL_BY(1)
        for (int c = tid; c < kGated; c += kThreads)
            s.frames.shift[0][c] = s.frames.frame[stages % 2][c] + trailing_gate(c);
        __syncthreads();
        scale_state(s.frames.shift[0]);
    }
    i64 const owner = StateOnly ? s.record : segment.sequence;
    if constexpr (kNormalised) end_sums(owner);
    if (kNormalised && p.end.data == nullptr) return;
    float* const to = p.end.data + state_offset(owner);
    for_state(p.end, [&](float value, int offset) { store_global(to + offset, value); });
    if constexpr (StateOnly && kWhole) {
        if (row0 == 0 && tid == 0) store_global(p.gate_sum + s.record * p.heads + head, gate_total);
    } else if constexpr (StateOnly) {
        float* const sums = p.gate_sum + (s.record * p.heads + head) * p.contraction;
        LSM_UNROLL_BY(1)
        for (int c = tid; row0 == 0 && c < p.contraction; c += kThreads) {
            store_global(sums + c, s.frames.total[c] + trailing_gate(c));
        }
    }
}

}  // namespace lsm
