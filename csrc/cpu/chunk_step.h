// One token of one value head: each row of the state is decayed, written to and read in a single
// pass.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kStepChannels = 256;  // of K and of V held on the stack at a time

template <class T>
struct StepTile {
    T a[kStepChannels], k[kStepChannels], q[kStepChannels];
    T v[kStepChannels], o[kStepChannels];
};

template <class T, int N>
LSM_INLINE void step_panels(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t column) {
    constexpr int W = kLanes<T>;
    Vector<T> v[N], o[N];
    for (int n = 0; n < N; ++n) v[n] = load(tile.v + column + n * W);
    for (int n = 0; n < N; ++n) o[n] = load(tile.o + column + n * W);
    for (int64_t i = 0; i < rows; ++i) {
        T* row = S + i * stride + column;
        for (int n = 0; n < N; ++n) {
            Vector<T> const s = tile.a[i] * load(row + n * W) + tile.k[i] * v[n];
            store(row + n * W, s);
            o[n] += tile.q[i] * s;
        }
    }
    for (int n = 0; n < N; ++n) store(tile.o + column + n * W, o[n]);
}

template <class T>
void step_columns(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + 4 * W <= columns; c += 4 * W) step_panels<T, 4>(tile, S, stride, rows, c);
    for (; c + W <= columns; c += W) step_panels<T, 1>(tile, S, stride, rows, c);
    for (; c < columns; ++c) {
        for (int64_t i = 0; i < rows; ++i) {
            T& s = S[i * stride + c];
            s = tile.a[i] * s + tile.k[i] * tile.v[c];
            tile.o[c] += tile.q[i] * s;
        }
    }
}

template <class T>
void step_head(StepParams const& p, int64_t batch, int64_t head) {
    constexpr int W = kLanes<T>;
    int64_t const query_head = head / (p.HV / p.H);
    HeadRows<T> const q(p.q, p.dtype, batch, query_head), k(p.k, p.dtype, batch, query_head);
    HeadRows<T> const g(p.g, p.gate_dtype, batch, head);
    HeadRows<T> const v(p.v, p.dtype, batch, head), o(p.o, p.dtype, batch, head);
    T* const S = static_cast<T*>(p.state) + (batch * p.HV + head) * p.K * p.V;
    StepTile<T> tile;
    for (int64_t v0 = 0; v0 < p.V; v0 += kStepChannels) {
        int64_t const columns = min_of(kStepChannels, p.V - v0);
        v.read_row(tile.v, v0, columns);
        for (int64_t i = 0; i < columns; i += W) store(tile.o + i, Vector<T>{});
        for (int64_t k0 = 0; k0 < p.K; k0 += kStepChannels) {
            int64_t const rows = min_of(kStepChannels, p.K - k0);
            q.read_row(tile.q, k0, rows, T(p.scale));
            k.read_row(tile.k, k0, rows);
            g.read_row(tile.a, k0, rows);
            for (int64_t i = 0; i < rows; i += W) store(tile.a + i, exp(load(tile.a + i)));
            step_columns(tile, S + k0 * p.V + v0, p.V, rows, columns);
        }
        o.write_row(tile.o, v0, columns);
    }
}

template <class T>
void step_heads(StepParams const& p, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) step_head<T>(p, i / p.HV, i % p.HV);
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
