// One token of one value head: each row of the state is decayed, written to and read in a single
// pass.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kStepChannels = 256;  // of K and of V held on the stack at a time

template <class T>
struct StepTile {
    T k[kStepChannels], q[kStepChannels];
    T v[kStepChannels], o[kStepChannels];
    T decay[kStepChannels];  // of rows, or of columns
};

enum class StepOrder { write_read, read_write };

// One vector, or number, of a row.
template <StepOrder kOrder, class X, class T>
LSM_INLINE X step_row(X s, X& o, T q, T k, X v, X decay) {
    if constexpr (kOrder == StepOrder::read_write) o += q * s;
    s = decay * s + k * v;
    if constexpr (kOrder == StepOrder::write_read) o += q * s;
    return s;
}

template <StepOrder kOrder, bool kByColumn, int N, class T>
LSM_INLINE void step_panels(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t column) {
    constexpr int W = kLanes<T>;
    Vector<T> v[N], o[N], decay[N];
    for (int n = 0; n < N; ++n) v[n] = load(tile.v + column + n * W);
    for (int n = 0; n < N; ++n) o[n] = load(tile.o + column + n * W);
    for (int n = 0; n < N; ++n) decay[n] = load(tile.decay + column + n * W);
    for (int64_t i = 0; i < rows; ++i) {
        T* row = S + i * stride + column;
        for (int n = 0; n < N; ++n) {
            if constexpr (!kByColumn) decay[n] = Vector<T>{} + tile.decay[i];
            store(row + n * W,
                  step_row<kOrder>(load(row + n * W), o[n], tile.q[i], tile.k[i], v[n], decay[n]));
        }
    }
    for (int n = 0; n < N; ++n) store(tile.o + column + n * W, o[n]);
}

template <StepOrder kOrder, bool kByColumn, class T>
void step_columns(StepTile<T>& tile, T* S, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + 4 * W <= columns; c += 4 * W)
        step_panels<kOrder, kByColumn, 4>(tile, S, stride, rows, c);
    for (; c + W <= columns; c += W) step_panels<kOrder, kByColumn, 1>(tile, S, stride, rows, c);
    for (; c < columns; ++c) {
        for (int64_t i = 0; i < rows; ++i) {
            T& s = S[i * stride + c];
            s = step_row<kOrder>(s, tile.o[c], tile.q[i], tile.k[i], tile.v[c],
                                 tile.decay[kByColumn ? c : i]);
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
            if (p_.decay == Decay::value) read_decay(v0, columns);
            for (int64_t k0 = 0; k0 < p_.K; k0 += kStepChannels) {
                int64_t const rows = min_of(kStepChannels, p_.K - k0);
                row(p_.q, p_.dtype, query_head, k0, rows).read(tile_.q, 0, T(p_.scale));
                row(p_.k, p_.dtype, query_head, k0, rows).read(tile_.k, 0);
                if (p_.decay != Decay::value) read_decay(k0, rows);
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
    void read_decay(int64_t first, int64_t count) {
        bool const by_channel = p_.decay == Decay::key || p_.decay == Decay::value;
        Vector<T> all = Vector<T>{} + T(1);
        if (by_channel) {
            row(p_.g, p_.gate_dtype, head_, first, count).read(tile_.decay, 0);
        } else if (p_.decay == Decay::scalar) {
            row(p_.g, p_.gate_dtype, head_, 0, 1).read(tile_.decay, 0);
            all = Vector<T>{} + exp(load(tile_.decay))[0];
        }
        for (int64_t i = 0; i < count; i += W) {
            store(tile_.decay + i, by_channel ? exp(load(tile_.decay + i)) : all);
        }
    }

    void walk(T* S, int64_t rows, int64_t columns) {
        constexpr auto kReadFirst = StepOrder::read_write, kWriteFirst = StepOrder::write_read;
        bool const by_column = p_.decay == Decay::value;
        auto const step = p_.exclusive ? by_column ? step_columns<kReadFirst, true, T>
                                                   : step_columns<kReadFirst, false, T>
                          : by_column ? step_columns<kWriteFirst, true, T>
                                       : step_columns<kWriteFirst, false, T>;
        step(tile_, S, p_.V, rows, columns);
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
