// One token of one value head: each row of the state is decayed, written to and read in a single
// pass.
#pragma once

#include "decay.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kStepChannels = 256;  // of K and of V held on the stack at a time

template <class T>
struct StepTile {
    T k[kStepChannels], q[kStepChannels];
    T v[kStepChannels], o[kStepChannels];
    T row_decay[kStepChannels], column_decay[kStepChannels];  // whichever there are
};

enum class StepOrder { write_read, read_write };
enum class StepDecay { rows, columns, both };

// One vector, or number, of a row.
template <StepOrder kOrder, class X, class T>
LSM_INLINE X step_row(X s, X& o, T q, T k, X v, X decay) {
    if constexpr (kOrder == StepOrder::read_write) o += q * s;
    s = decay * s + k * v;
    if constexpr (kOrder == StepOrder::write_read) o += q * s;
    return s;
}

template <StepOrder kOrder, StepDecay kDecay, int N, class T>
LSM_INLINE void step_panels(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t column) {
    constexpr int W = kLanes<T>;
    Vector<T> v[N], o[N], column_decay[N];
    for (int n = 0; n < N; ++n) v[n] = load(tile.v + column + n * W);
    for (int n = 0; n < N; ++n) o[n] = load(tile.o + column + n * W);
    if constexpr (kDecay != StepDecay::rows) {
        for (int n = 0; n < N; ++n) column_decay[n] = load(tile.column_decay + column + n * W);
    }
    for (int64_t i = 0; i < rows; ++i) {
        T* row = S + i * stride + column;
        for (int n = 0; n < N; ++n) {
            Vector<T> decay;
            if constexpr (kDecay == StepDecay::columns) {
                decay = column_decay[n];
            } else {
                decay = Vector<T>{} + tile.row_decay[i];
            }
            if constexpr (kDecay == StepDecay::both) decay *= column_decay[n];
            store(row + n * W,
                  step_row<kOrder>(load(row + n * W), o[n], tile.q[i], tile.k[i], v[n], decay));
        }
    }
    for (int n = 0; n < N; ++n) store(tile.o + column + n * W, o[n]);
}

template <StepOrder kOrder, StepDecay kDecay, class T>
void step_columns(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + 4 * W <= columns; c += 4 * W)
        step_panels<kOrder, kDecay, 4>(tile, S, stride, rows, c);
    for (; c + W <= columns; c += W) step_panels<kOrder, kDecay, 1>(tile, S, stride, rows, c);
    for (; c < columns; ++c) {
        for (int64_t i = 0; i < rows; ++i) {
            T& s = S[i * stride + c];
            T decay = kDecay == StepDecay::columns ? tile.column_decay[c] : tile.row_decay[i];
            if constexpr (kDecay == StepDecay::both) decay *= tile.column_decay[c];
            s = step_row<kOrder>(s, tile.o[c], tile.q[i], tile.k[i], tile.v[c], decay);
        }
    }
}

template <class T>
class StepHead {
  public:
    StepHead(StepParams const& p, int64_t batch, int64_t head)
        : p_(p), batch_(batch), head_(head) {}

    void run() {
        T* const S = static_cast<T*>(p_.state) + (batch_ * p_.HV + head_) * p_.K * p_.V;
        int64_t const query_head = head_ / (p_.HV / p_.H);
        for (int64_t v0 = 0; v0 < p_.V; v0 += kStepChannels) {
            int64_t const columns = min_of(kStepChannels, p_.V - v0);
            Row const o = row(p_.o, p_.dtype, head_, v0, columns);
            row(p_.v, p_.dtype, head_, v0, columns).read(tile_.v, 0);
            for (int64_t i = 0; i < columns; i += W) store(tile_.o + i, Vector<T>{});
            if (decays_values(p_.decay)) {
                read_decay(tile_.column_decay, p_.decay == Decay::both ? p_.gv : p_.g, v0, columns);
            }
            for (int64_t k0 = 0; k0 < p_.K; k0 += kStepChannels) {
                int64_t const rows = min_of(kStepChannels, p_.K - k0);
                row(p_.q, p_.dtype, query_head, k0, rows).read(tile_.q, 0, T(p_.scale));
                row(p_.k, p_.dtype, query_head, k0, rows).read(tile_.k, 0);
                if (p_.decay != Decay::value) read_decay(tile_.row_decay, p_.g, k0, rows);
                walk(S + k0 * p_.V + v0, rows, columns);
            }
            o.write(tile_.o, 0);
        }
    }

  private:
    static constexpr int W = kLanes<T>;
    using Row = HeadRows<T, 1>;

    Row row(Rows const& rows, Dtype dtype, int64_t head, int64_t first, int64_t columns) const {
        return {rows, dtype, batch_, head, Span{0, 1}, columns, first};
    }

    // Decays of `count` rows or columns of the state, from `first` on.
    void read_decay(T (&decay)[kStepChannels], Rows const& gate, int64_t first, int64_t count) {
        if (decays_keys(p_.decay) || decays_values(p_.decay)) {
            row(gate, p_.gate_dtype, head_, first, count).read(decay, 0);
            return decays_of(p_.gate, decay, count);
        }
        T all = 1;
        if (p_.decay == Decay::scalar) {
            row(gate, p_.gate_dtype, head_, 0, 1).read(decay, 0);
            decays_of(p_.gate, decay, 1);
            all = decay[0];
        }
        for (int64_t i = 0; i < count; i += W) store(decay + i, Vector<T>{} + all);
    }

    void walk(T* S, int64_t rows, int64_t columns) {
        if (p_.decay == Decay::both) {
            walk_as<StepDecay::both>(S, rows, columns);
        } else if (p_.decay == Decay::value) {
            walk_as<StepDecay::columns>(S, rows, columns);
        } else {
            walk_as<StepDecay::rows>(S, rows, columns);
        }
    }

    template <StepDecay kDecay>
    void walk_as(T* S, int64_t rows, int64_t columns) {
        if (p_.exclusive) {
            step_columns<StepOrder::read_write, kDecay>(tile_, S, p_.V, rows, columns);
        } else {
            step_columns<StepOrder::write_read, kDecay>(tile_, S, p_.V, rows, columns);
        }
    }

    StepParams const& p_;
    int64_t batch_, head_;
    StepTile<T> tile_;
};

template <class T>
void step_heads(StepParams const& p, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) StepHead<T>(p, i / p.HV, i % p.HV).run();
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
