// One token of one value head: each row of the state is decayed, written to and read in a single
// pass.
#pragma once

#include "decay.h"
#include "policy/input_gate.h"
#include "policy/step_size.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kStepChannels = 256;  // of K and of V held on the stack at a time

template <class T>
struct StepTile {
    T k[kStepChannels], q[kStepChannels];
    T v[kStepChannels], o[kStepChannels];
    T key_decay[kStepChannels], value_decay[kStepChannels];  // whichever there are
    T *q_features = nullptr, *k_features = nullptr;          // all of them, if any
};

enum class StepOrder { write_read, read_write };
enum class StepDecay { rows, columns, both };

// One vector, or number, of a row.
template <StepOrder kOrder, class X, class Y, class Z>
LSM_INLINE X step_row(X s, X& o, Y q, Y k, Z v, X decay) {
    if constexpr (kOrder == StepOrder::read_write) o += q * s;
    s = decay * s + k * v;
    if constexpr (kOrder == StepOrder::write_read) o += q * s;
    return s;
}

// Decays of row i and of a vector of columns, whichever act.
template <StepDecay kDecay, class T>
LSM_INLINE Vector<T> step_decay(T const* rows, int64_t i, Vector<T> columns) {
    if constexpr (kDecay == StepDecay::columns) {
        return columns;
    } else if constexpr (kDecay == StepDecay::both) {
        return columns * rows[i];
    } else {
        return splat(rows[i]);
    }
}

// A piece of a state that has a row for each key channel: outputs lie along the rows.
template <StepOrder kOrder, StepDecay kDecay, class T>
struct KeyRows {
    StepTile<T>& tile;
    T* S;
    int64_t stride, rows, columns;

    void walk() const {
        constexpr int W = kLanes<T>;
        int64_t c = 0;
        for (; c + 4 * W <= columns; c += 4 * W) panels<4>(c);
        for (; c + W <= columns; c += W) panels<1>(c);
        for (; c < columns; ++c) column(c);
    }

  private:
    template <int N>
    LSM_INLINE void panels(int64_t column) const {
        constexpr int W = kLanes<T>;
        Vector<T> v[N], o[N], decay[N] = {};
        for (int n = 0; n < N; ++n) v[n] = load(tile.v + column + n * W);
        for (int n = 0; n < N; ++n) o[n] = load(tile.o + column + n * W);
        if constexpr (kDecay != StepDecay::rows) {
            for (int n = 0; n < N; ++n) decay[n] = load(tile.value_decay + column + n * W);
        }
        for (int64_t i = 0; i < rows; ++i) {
            T* row = S + i * stride + column;
            for (int n = 0; n < N; ++n) {
                store(row + n * W,
                      step_row<kOrder>(load(row + n * W), o[n], tile.q[i], tile.k[i], v[n],
                                       step_decay<kDecay>(tile.key_decay, i, decay[n])));
            }
        }
        for (int n = 0; n < N; ++n) store(tile.o + column + n * W, o[n]);
    }

    void column(int64_t c) const {
        for (int64_t i = 0; i < rows; ++i) {
            T& s = S[i * stride + c];
            T decay = kDecay == StepDecay::columns ? tile.value_decay[c] : tile.key_decay[i];
            if constexpr (kDecay == StepDecay::both) decay *= tile.value_decay[c];
            s = step_row<kOrder>(s, tile.o[c], tile.q[i], tile.k[i], tile.v[c], decay);
        }
    }
};

// A piece of a state that has a row for each value channel: an output is a row's product with q,
// summed over the lanes for as many rows at a time as there are lanes.
template <StepOrder kOrder, StepDecay kDecay, class T>
struct ValueRows {
    StepTile<T>& tile;
    T* S;
    int64_t stride, rows, columns;

    void walk() const {
        constexpr int W = kLanes<T>;
        int64_t const whole = columns / W * W;
        for (int64_t first = 0; first < rows; first += W) {
            int64_t const count = min_of(W, rows - first);
            Vector<T> sums[W] = {};
            int64_t c = 0;
            for (; c + 4 * W <= whole; c += 4 * W) panels<4>(sums, first, count, c);
            for (; c < whole; c += W) panels<1>(sums, first, count, c);
            store(tile.o + first, load(tile.o + first) + sum_each<T>(sums));
            for (int64_t i = first; c < columns && i < first + count; ++i) row_end(i, c);
        }
    }

  private:
    template <int N>
    LSM_INLINE void panels(Vector<T>* sums, int64_t first, int64_t count, int64_t column) const {
        constexpr int W = kLanes<T>;
        Vector<T> q[N], k[N], decay[N] = {};
        for (int n = 0; n < N; ++n) q[n] = load(tile.q + column + n * W);
        for (int n = 0; n < N; ++n) k[n] = load(tile.k + column + n * W);
        if constexpr (kDecay != StepDecay::rows) {
            for (int n = 0; n < N; ++n) decay[n] = load(tile.key_decay + column + n * W);
        }
        for (int64_t i = 0; i < count; ++i) {
            T* row = S + (first + i) * stride + column;
            Vector<T> sum[N] = {};
            for (int n = 0; n < N; ++n) {
                store(row + n * W,
                      step_row<kOrder>(load(row + n * W), sum[n], q[n], k[n], tile.v[first + i],
                                       step_decay<kDecay>(tile.value_decay, first + i, decay[n])));
            }
            for (int n = 0; n < N; ++n) sums[i] += sum[n];
        }
    }

    void row_end(int64_t i, int64_t c) const {
        for (; c < columns; ++c) {
            T& s = S[i * stride + c];
            T decay = kDecay == StepDecay::columns ? tile.key_decay[c] : tile.value_decay[i];
            if constexpr (kDecay == StepDecay::both) decay *= tile.key_decay[c];
            s = step_row<kOrder>(s, tile.o[i], tile.q[c], tile.k[c], tile.v[i], decay);
        }
    }
};

template <class T>
class StepHead {
  public:
    StepHead(StepParams const& p, void* workspace, int64_t batch, int64_t head)
        : p_(p), batch_(batch), head_(head), query_head_(head / (p.HV / p.H)) {
        if (p.features != Features::none)
            make_features(static_cast<T*>(workspace) + (batch * p.HV + head) * step_features(p));
    }

    void run() {
        T* const S = static_cast<T*>(p_.state) + (batch_ * p_.HV + head_) * p_.K * p_.V;
        T decay = 1, weight = 1, inverse = 1, bonus = 0;
        if (p_.normaliser.on) {
            normalise(decay, weight, inverse);
        } else if (p_.sizes.dt.data != nullptr) {
            discretise(decay, weight);
        } else if (p_.decay == Decay::scalar) {
            row(p_.g, p_.gate_dtype, head_, 0, 1).read(tile_.key_decay, 0);
            decays_of(p_.gate, tile_.key_decay, 1);
            decay = tile_.key_decay[0];
        }
        for (int64_t v0 = 0; v0 < p_.V; v0 += kStepChannels) {
            int64_t const values = min_of(kStepChannels, p_.V - v0);
            row(p_.v, p_.dtype, head_, v0, values).read(tile_.v, 0, weight);
            for (int64_t i = 0; i < values; i += W) store(tile_.o + i, Vector<T>{});
            if (decays_values(p_.decay)) {
                read_decay(tile_.value_decay, p_.decay == Decay::both ? p_.gv : p_.g, v0, values);
            } else if (p_.values_first) {
                fill(tile_.value_decay, decay, values);
            }
            for (int64_t k0 = 0; k0 < p_.K; k0 += kStepChannels) {
                int64_t const keys = min_of(kStepChannels, p_.K - k0);
                read_keys(k0, keys, 1);
                if (v0 == 0 && p_.u.data != nullptr) bonus += bonus_of(k0, keys);
                if (decays_keys(p_.decay)) {
                    read_decay(tile_.key_decay, p_.g, k0, keys);
                } else if (!p_.values_first) {
                    fill(tile_.key_decay, decay, keys);
                }
                if (p_.values_first) {
                    walk<ValueRows>(p_.decay == Decay::key, S + v0 * p_.K + k0, p_.K, values, keys);
                } else {
                    walk<KeyRows>(p_.decay == Decay::value, S + k0 * p_.V + v0, p_.V, keys, values);
                }
            }
            for (int64_t i = 0; p_.u.data != nullptr && i < values; i += W)
                store(tile_.o + i, load(tile_.o + i) + bonus * load(tile_.v + i));
            finish(v0, values, inverse);
            row(p_.o, p_.dtype, head_, v0, values).write(tile_.o, 0);
        }
    }

  private:
    static constexpr int W = kLanes<T>;
    using Row = HeadRows<T, 1>;

    Row row(Rows const& rows, Dtype dtype, int64_t head, int64_t first, int64_t columns) const {
        return {rows, dtype, batch_, head, Span{0, 1}, columns, first};
    }

    T number(Rows const& rows, Dtype dtype) const {
        T x[W];
        row(rows, dtype, head_, 0, 1).read(x, 0);
        return x[0];
    }

    void make_features(T* scratch) {  // all of them, of q and k
        int64_t const width = p_.K + W, shift = factors_of(p_.features, 0);
        tile_.q_features = scratch, tile_.k_features = scratch + width;
        T* const x = scratch + 2 * width;
        std::memset(x, 0, size_t(p_.channels + 1 + W) * sizeof(T));
        auto const make = [&](T* out, Rows const& rows, T scale) {
            x[0] = 1;
            row(rows, p_.dtype, query_head_, 0, p_.channels).read(x + shift, 0, scale);
            LSM_CPU_TIER::make_features(out, x, p_.features, p_.channels);
        };
        make(tile_.q_features, p_.q, T(p_.scale));
        make(tile_.k_features, p_.k, 1);
    }

    void read_keys(int64_t first, int64_t count, T weight) {
        if (p_.features != Features::none) {
            std::memcpy(tile_.q, tile_.q_features + first, size_t(count) * sizeof(T));
            for (int64_t i = 0; i < count; ++i) tile_.k[i] = weight * tile_.k_features[first + i];
            for (int64_t i = count; i % W != 0; ++i) tile_.q[i] = tile_.k[i] = 0;
            return;
        }
        row(p_.q, p_.dtype, query_head_, first, count).read(tile_.q, 0, T(p_.scale));
        row(p_.k, p_.dtype, query_head_, first, count).read(tile_.k, 0, weight);
    }

    // Of some keys, which have been read: what the query reads of the token itself. Uses their decays' room.
    T bonus_of(int64_t first, int64_t count) {
        row(p_.u, p_.u.dtype, head_, first, count).read(tile_.key_decay, 0);
        Vector<T> sums{};
        for (int64_t i = 0; i < count; i += W)
            sums += load(tile_.q + i) * load(tile_.key_decay + i) * load(tile_.k + i);
        return sum_lanes<T>(sums);
    }

    // Decays of `count` channels, from `first` on.
    void read_decay(T (&decay)[kStepChannels], Rows const& gate, int64_t first, int64_t count) {
        row(gate, p_.gate_dtype, head_, first, count).read(decay, 0);
        decays_of(p_.gate, decay, count);
    }

    static void fill(T (&decay)[kStepChannels], T all, int64_t count) {
        for (int64_t i = 0; i < count; i += W) store(decay + i, splat(all));
    }

    template <template <StepOrder, StepDecay, class> class Lying>
    void walk(bool columns_decay, T* S, int64_t stride, int64_t rows, int64_t columns) {
        auto const as = [&](auto order, auto decay) {
            Lying<order, decay, T>{tile_, S, stride, rows, columns}.walk();
        };
        auto const ordered = [&](auto decay) {
            if (p_.exclusive) {
                as(constant<StepOrder::read_write>, decay);
            } else {
                as(constant<StepOrder::write_read>, decay);
            }
        };
        if (p_.decay == Decay::both) {
            ordered(constant<StepDecay::both>);
        } else if (columns_decay) {
            ordered(constant<StepDecay::columns>);
        } else {
            ordered(constant<StepDecay::rows>);
        }
    }
    template <auto kValue>
    static constexpr std::integral_constant<decltype(kValue), kValue> constant{};

    void discretise(T& decay, T& weight) const {
        StepSizes const& own = p_.sizes;
        T dt = number(own.dt, own.dt.dtype);
        if (own.bias.data != nullptr) dt += number(own.bias, own.bias.dtype);
        StepSize<T> const size = step_size(dt, number(own.A, own.A.dtype), own.softplus);
        decay = size.decay, weight = size.weight;
    }

    // Outputs of some columns, with the room of their values and of those's decays.
    void finish(int64_t first, int64_t count, T inverse) {
        Finish const& own = p_.finish;
        if (own.skip.data != nullptr) {
            row(p_.v, p_.dtype, head_, first, count).read(tile_.v, 0);
            if (own.skip_channels) {
                row(own.skip, own.skip.dtype, head_, first, count).read(tile_.value_decay, 0);
            } else {
                fill(tile_.value_decay, number(own.skip, own.skip.dtype), count);
            }
        }
        for (int64_t i = 0; i < count; i += W) {
            Vector<T> o = load(tile_.o + i) * inverse;
            if (own.skip.data != nullptr) o += load(tile_.value_decay + i) * load(tile_.v + i);
            store(tile_.o + i, o);
        }
        if (own.z.data == nullptr) return;
        row(own.z, p_.dtype, head_, first, count).read(tile_.v, 0);
        for (int64_t i = 0; i < count; i += W) {
            Vector<T> const z = load(tile_.v + i);
            store(tile_.o + i, load(tile_.o + i) * z * sigmoid(z));
        }
    }

    // n and m after the token, and what it takes from them.
    void normalise(T& decay, T& weight, T& inverse) {
        auto const& own = p_.normaliser;
        int64_t const chain = batch_ * p_.HV + head_;
        T* const n = static_cast<T*>(own.n) + chain * p_.K;
        InputGate gate{1, 1, 0, 0};
        if (own.gated) {
            T& m = static_cast<T*>(own.m)[chain];
            gate =
                input_gate(number(own.i, own.dtype), number(own.f, own.dtype), m, own.exponential);
            m = T(gate.m);
        }
        decay = T(gate.decay), weight = T(gate.weight);
        Vector<T> sums{};
        for (int64_t k0 = 0; k0 < p_.K; k0 += kStepChannels) {
            int64_t const keys = min_of(kStepChannels, p_.K - k0);
            read_keys(k0, keys, weight);
            for (int64_t c = 0; c < keys; c += W) {
                T* const at = n + k0 + c;
                int64_t const count = min_of(W, keys - c);
                Vector<T> const old = count == W ? load(at) : widen_first<T>(at, count);
                Vector<T> const now = decay * old + load(tile_.k + c);
                sums += now * load(tile_.q + c);
                if (count == W) {
                    store(at, now);
                } else {
                    narrow_first<T>(at, now, count);
                }
            }
        }
        if (!own.divides) return;
        double const size = std::fabs(double(sum_lanes<T>(sums)));
        inverse = T(1 / ((size < gate.least ? gate.least : size) + own.eps));
    }

    StepParams const& p_;
    int64_t batch_, head_, query_head_;
    StepTile<T> tile_;
};

template <class T>
void step_heads(StepParams const& p, void* workspace, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) StepHead<T>(p, workspace, i / p.HV, i % p.HV).run();
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
