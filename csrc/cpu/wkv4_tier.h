// RWKV-4's running average for one instruction set (see chunk_tier.h for what the including file has chosen): token
// after token, all channels of a block, whose states lie in the first cache.
//
// Backwards, with D_t the denominator of o_t and M_t its scale, what reaches A_t and B_t from later tokens is the same
// kind of sum again, of tokens with the logarithm -M_t:
//
//     q_t = dy_t / D_t          GA_{t-1} = e^{-r} GA_t + e^{-M_t} q_t          GB_{t-1}: with -q_t o_t
//     dv_t = e^{k_t} GA_t + e^{u + k_t - M_t} q_t
//     dk_t = e^{k_t} (v_t GA_t + GB_t) + e^{u + k_t - M_t} q_t (v_t - o_t)     du: its second part
//     dr   = -e^{-r} (A_{t-1} GA_t + B_{t-1} GB_t)
//
// No exponent is positive: a weight that a token was given is never more than the denominator that it was given in.
#pragma once

#include "numbers.h"
#include "wkv4_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// Sums of two kinds over e^scale.
template <class T>
struct Sums {
    Vector<T> numerator, denominator, scale;
};

// Two logarithms, on the scale of the larger one. Equal ones, -inf too, weigh 1.
template <class T>
struct Weights {
    Vector<T> scale, first, second;

    LSM_INLINE Weights(Vector<T> a, Vector<T> b) {
        Vector<T> const one = splat<T>(1), d = a - b;
        Vector<T> const small = a == b ? one : exp(d < 0 ? d : -d);
        scale = d >= 0 ? a : b;
        first = d >= 0 ? one : small, second = d >= 0 ? small : one;
    }
};

template <class T>
LSM_INLINE Sums<T> merge(Sums<T> const& a, Sums<T> const& b) {
    Weights<T> const w(a.scale, b.scale);
    return {w.first * a.numerator + w.second * b.numerator,
            w.first * a.denominator + w.second * b.denominator, w.scale};
}

template <class T_, class In_>
struct Wkv4 {
    using T = T_;
    using In = In_;
    using V = Vector<T>;
    static constexpr int W = kLanes<T>;

    // Panels of a block: what channels have of their own, states, and for walks backwards those of a tile.
    struct Channel {
        V rate, bonus, rate_grad, bonus_grad;
        Sums<T> state, grad;
    };

    static int64_t bytes(int64_t channels, bool tiles) {
        int64_t const vectors = (channels + W - 1) / W;
        return vectors * int64_t(sizeof(Channel)) +
               (tiles ? kWkv4Tile * vectors * int64_t(sizeof(Sums<T>)) : 0);
    }

    Wkv4(Wkv4Params const& p, Wkv4Task const& task, void* scratch)
        : p(p),
          task(task),
          vectors((task.c_end - task.c_begin + W - 1) / W),
          channel(static_cast<Channel*>(scratch)),
          before(reinterpret_cast<Sums<T>*>(channel + vectors)) {
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].rate = row(p.channel, c, count), channel[v].bonus = row(p.bonus, c, count);
            channel[v].rate_grad = channel[v].bonus_grad = V{};
        });
    }

    // f(c, count, index of the vector in the block)
    template <class F>
    LSM_INLINE void channels(F const& f) const {
        int64_t c = task.c_begin, v = 0;
        for (; c + W <= task.c_end; c += W, ++v) f(c, int64_t(W), v);
        if (c < task.c_end) f(c, task.c_end - c, v);
    }
    LSM_INLINE V row(void const* data, int64_t c, int64_t count) const {
        return read<Real<T>>(static_cast<T const*>(data) + c, count).re;
    }
    LSM_INLINE void set_row(void* data, int64_t c, int64_t count, V x) const {
        write(static_cast<T*>(data) + c, Real<T>{x}, count);
    }
    In* token(Rows const& r, int64_t t) const {
        return static_cast<In*>(r.data) + task.batch * r.batch + t * r.time;
    }
    // The sequence's row of a tensor [N, D].
    template <class Any>
    Any* of_sequence(Any* states) const {
        using Number = std::conditional_t<std::is_const_v<Any>, T const, T>;
        return states == nullptr ? nullptr : static_cast<Number*>(states) + task.sequence * p.D;
    }
    T* tile(int64_t k) const { return static_cast<T*>(p.states) + (task.tile + k) * 3 * p.D; }

    static Sums<T> nothing() { return {V{}, V{}, V{} - T(__builtin_inf())}; }

    void load_initial() const {
        void const* const numerator = of_sequence(p.initial_state);
        void const* const denominator = of_sequence(p.initial_denominator);
        void const* const scale = of_sequence(p.initial_scale);
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].state = numerator == nullptr
                                   ? nothing()
                                   : Sums<T>{row(numerator, c, count), row(denominator, c, count),
                                             row(scale, c, count)};
        });
    }

    LSM_INLINE static void step(Sums<T>& state, V rate, V k, V v) {
        state.scale -= rate;
        state = merge<T>(state, {v, splat<T>(1), k});
    }

    // A token's average: that of what was before it, and the token itself.
    struct Average {
        V own, denominator, o, scale;
        LSM_INLINE Average(Sums<T> const& past, V logit, V v) {
            Weights<T> const w(past.scale, logit);
            own = w.second, scale = w.scale;
            denominator = w.first * past.denominator + own;
            o = (w.first * past.numerator + own * v) / denominator;
        }
    };

    template <bool kOutputs>
    void forward() const {
        load_initial();
        for (int64_t t = task.begin; t < task.end; ++t) {
            int64_t const i = t - task.begin;
            T* const saved =
                p.states != nullptr && i % kWkv4Tile == 0 ? tile(i / kWkv4Tile) : nullptr;
            In const *const k_row = token(p.a, t), *const v_row = token(p.x, t);
            In* const o_row = kOutputs ? token(p.h, t) : nullptr;
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                Channel& own = channel[v];
                if (saved != nullptr) {
                    set_row(saved, c, count, own.state.numerator);
                    set_row(saved + p.D, c, count, own.state.denominator);
                    set_row(saved + 2 * p.D, c, count, own.state.scale);
                }
                V const k = read<Real<T>>(k_row + c, count).re;
                V const x = read<Real<T>>(v_row + c, count).re;
                if constexpr (kOutputs)
                    write(o_row + c, Real<T>{Average(own.state, k + own.bonus, x).o}, count);
                step(own.state, own.rate, k, x);
            });
        }
        if (p.final_state == nullptr) return;
        void* const numerator = of_sequence(p.final_state);
        void* const denominator = of_sequence(p.final_denominator);
        void* const scale = of_sequence(p.final_scale);
        channels([&](int64_t c, int64_t count, int64_t v) {
            set_row(numerator, c, count, channel[v].state.numerator);
            set_row(denominator, c, count, channel[v].state.denominator);
            set_row(scale, c, count, channel[v].state.scale);
        });
    }

    void backward() const {
        void const* const numerator = of_sequence(p.grad_final_state);
        void const* const denominator = of_sequence(p.grad_final_denominator);
        void const* const scale = of_sequence(static_cast<void const*>(p.final_scale));
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].grad = numerator == nullptr
                                  ? nothing()
                                  : Sums<T>{row(numerator, c, count), row(denominator, c, count),
                                            -row(scale, c, count)};
        });
        for (int64_t k = tiles(); k-- > 0;) tile_backward(k);
        store_initial_grads();
        T* const grads = static_cast<T*>(task.channel_grad);
        channels([&](int64_t c, int64_t count, int64_t v) {
            set_row(grads, c, count, channel[v].rate_grad);
            set_row(grads + p.D, c, count, channel[v].bonus_grad);
        });
    }

    int64_t tiles() const { return (task.end - task.begin + kWkv4Tile - 1) / kWkv4Tile; }
    int64_t tile_begin(int64_t k) const { return task.begin + k * kWkv4Tile; }
    int64_t tile_tokens(int64_t k) const { return min_of(kWkv4Tile, task.end - tile_begin(k)); }

    // The states before every token of a tile.
    void make_past(int64_t k) const {
        int64_t const begin = tile_begin(k);
        T const* const saved = tile(k);
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].state = {row(saved, c, count), row(saved + p.D, c, count),
                                row(saved + 2 * p.D, c, count)};
        });
        for (int64_t i = 0; i < tile_tokens(k); ++i) {
            In const *const k_row = token(p.a, begin + i), *const v_row = token(p.x, begin + i);
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                before[i * vectors + v] = channel[v].state;
                step(channel[v].state, channel[v].rate, read<Real<T>>(k_row + c, count).re,
                     read<Real<T>>(v_row + c, count).re);
            });
        }
    }

    // What precedes a token, and what follows it, which `grad` adds up.
    void both() const {
        forward<false>();
        channels([&](int64_t, int64_t, int64_t v) { channel[v].grad = nothing(); });
        for (int64_t k = tiles(); k-- > 0;) {
            make_past(k);
            for (int64_t i = tile_tokens(k); i-- > 0;) {
                int64_t const t = tile_begin(k) + i;
                In const *const k_row = token(p.a, t), *const v_row = token(p.x, t);
                In* const o_row = token(p.h, t);
                channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                    Channel& own = channel[v];
                    V const k_t = read<Real<T>>(k_row + c, count).re;
                    V const x = read<Real<T>>(v_row + c, count).re;
                    Sums<T> const others = merge<T>(before[i * vectors + v], own.grad);
                    write(o_row + c, Real<T>{Average(others, k_t + own.bonus, x).o}, count);
                    step(own.grad, own.rate, k_t, x);
                });
            }
        }
    }

    void tile_backward(int64_t k) const {
        make_past(k);
        int64_t const begin = tile_begin(k), tokens = tile_tokens(k);
        for (int64_t i = tokens; i-- > 0;) {
            In const *const k_row = token(p.a, begin + i), *const v_row = token(p.x, begin + i);
            In const* const grad_row = token(p.grad_h, begin + i);
            In *const dk_row = token(p.da, begin + i), *const dv_row = token(p.dx, begin + i);
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                Channel& own = channel[v];
                Sums<T> const& past = before[i * vectors + v];
                V const k_t = read<Real<T>>(k_row + c, count).re;
                V const x = read<Real<T>>(v_row + c, count).re;
                Average const y(past, k_t + own.bonus, x);
                V const q = read<Real<T>>(grad_row + c, count).re / y.denominator;
                V const logit = y.own * q * (x - y.o);
                V const weight = exp(k_t + own.grad.scale);
                write(dv_row + c, Real<T>{weight * own.grad.numerator + y.own * q}, count);
                write(dk_row + c,
                      Real<T>{weight * (x * own.grad.numerator + own.grad.denominator) + logit},
                      count);
                own.bonus_grad += logit;
                own.grad.scale -= own.rate;
                own.rate_grad -=
                    exp(past.scale + own.grad.scale) *
                    (past.numerator * own.grad.numerator + past.denominator * own.grad.denominator);
                own.grad = merge<T>(own.grad, {q, -q * y.o, -y.scale});
            });
        }
    }

    // Through A_0 = numerator e^m; where both ends are infinite, the sequence is empty, and the factor 1.
    void store_initial_grads() const {
        if (p.grad_initial_state == nullptr) return;
        void const* const scale = of_sequence(p.initial_scale);
        void* const numerator = of_sequence(p.grad_initial_state);
        void* const denominator = of_sequence(p.grad_initial_denominator);
        channels([&](int64_t c, int64_t count, int64_t v) {
            Sums<T> const& grad = channel[v].grad;
            V const m = row(scale, c, count);
            V const weight = grad.scale == -m ? splat<T>(1) : exp(m + grad.scale);
            set_row(numerator, c, count, weight * grad.numerator);
            set_row(denominator, c, count, weight * grad.denominator);
        });
    }

    Wkv4Params const& p;
    Wkv4Task const& task;
    int64_t vectors;
    Channel* channel;
    Sums<T>* before;  // [kWkv4Tile][vectors]
};

template <class Run>
void with_wkv4(Wkv4Params const& p, Run const& run) {
    with_types(p.dtype, [&](auto zero, auto element) {
        run(std::type_identity<Wkv4<decltype(zero), decltype(element)>>{});
    });
}

int64_t wkv4_scratch(Wkv4Params const& p, int64_t channels, bool tiles) {
    int64_t bytes = 0;
    with_wkv4(p, [&](auto type) { bytes = decltype(type)::type::bytes(channels, tiles); });
    return bytes;
}

void wkv4_forward(Wkv4Params const& p, Wkv4Task const& task, void* scratch) {
    with_wkv4(p, [&](auto type) {
        typename decltype(type)::type(p, task, scratch).template forward<true>();
    });
}

void wkv4_backward(Wkv4Params const& p, Wkv4Task const& task, void* scratch) {
    with_wkv4(p, [&](auto type) { typename decltype(type)::type(p, task, scratch).backward(); });
}

void wkv4_both(Wkv4Params const& p, Wkv4Task const& task, void* scratch) {
    with_wkv4(p, [&](auto type) { typename decltype(type)::type(p, task, scratch).both(); });
}

}  // namespace

constinit Wkv4Kernels const wkv4_kernels{wkv4_scratch, wkv4_forward, wkv4_backward, wkv4_both};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
