// Averages of both directions (Bi-WKV) for one instruction set (see chunk_tier.h for what the including file has chosen).
// A pass is a walk that leaves the sums before every kWkv4Tile-th token, and one back, which makes those before each
// token of a tile again and adds up what follows.
//
// Backwards, averages are made again first, and M_t, the scale of a denominator D_t, q_t = dy_t / D_t and o_t kept. What
// reaches A and B from the tokens on one side is the same kind of sum, of tokens with the logarithm -M_t and the values q_t
// and -q_t o_t. With GA_t, GB_t the sum of those on both sides of token t, and GA'_t, GB'_t that with every term as often
// as tokens lie between:
//
//     dv_t = e^{k_t} GA_t + e^{u + k_t - M_t} q_t
//     dk_t = e^{k_t} (v_t GA_t + GB_t) + e^{u + k_t - M_t} q_t (v_t - o_t)     du: its second part
//     dr   = -e^{k_t} (v_t GA'_t + GB'_t)
//
// No exponent is positive.
#pragma once

#include "bi_wkv_kernels.h"
#include "fading_sums.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// With every term as often as tokens have followed it, too.
template <class T>
struct SlopedSums {
    Vector<T> numerator, denominator, scale, numerator_slope, denominator_slope;
};
template <class T>
LSM_INLINE void add(SlopedSums<T>& sums, Vector<T> rate, SlopedSums<T> const& token) {
    Weights<T> const w(sums.scale - rate, token.scale);
    sums.numerator_slope = w.first * (sums.numerator_slope + sums.numerator);
    sums.denominator_slope = w.first * (sums.denominator_slope + sums.denominator);
    sums.numerator = w.first * sums.numerator + w.second * token.numerator;
    sums.denominator = w.first * sums.denominator + w.second * token.denominator;
    sums.scale = w.scale;
}

template <class T>
struct KeptToken {
    Vector<T> scale, q, o;
};

template <class T, class In>
struct BothWays : ChannelBlock<T, In> {
    using Base = ChannelBlock<T, In>;
    using Base::channels, Base::p, Base::row, Base::set_row, Base::store_channel_grads, Base::task,
        Base::token, Base::vectors, Base::W;
    using typename Base::Average;
    using typename Base::V;

    // Panels of a block, [vectors]; of tiles, of a tile's tokens, and of all tokens.
    struct Channel {
        V rate, bonus, rate_grad, bonus_grad;
    };
    static int64_t tiles_of(int64_t tokens) { return (tokens + kWkv4Tile - 1) / kWkv4Tile; }

    static int64_t bytes(Wkv4Params const& p, int64_t channels, bool backward) {
        int64_t const vectors = (channels + W - 1) / W;
        int64_t const state = backward ? sizeof(SlopedSums<T>) : sizeof(Sums<T>);
        return vectors * (int64_t(sizeof(Channel)) + (tiles_of(p.T) + kWkv4Tile + 2) * state +
                          (backward ? p.T * int64_t(sizeof(KeptToken<T>)) : 0));
    }

    BothWays(Wkv4Params const& p, Wkv4Task const& task, void* scratch)
        : Base(p, task),
          channel(static_cast<Channel*>(scratch)),
          kept(reinterpret_cast<KeptToken<T>*>(channel + vectors)) {
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v] = {row(p.channel, c, count), row(p.bonus, c, count), V{}, V{}};
        });
    }

    LSM_INLINE V number(Rows const& rows, int64_t t, int64_t c, int64_t count) const {
        return read<Real<T>>(token(rows, t) + c, count).re;
    }

    // Stored, or kept for the gradients.
    template <bool kKeeps>
    struct Averages {
        using S = Sums<T>;
        LSM_INLINE static S added(BothWays const& b, int64_t t, int64_t c, int64_t count, int64_t) {
            return {b.number(b.p.x, t, c, count), splat<T>(1), b.number(b.p.a, t, c, count)};
        }
        LSM_INLINE static void emit(BothWays const& b, S const& x, S const& past, S const& future,
                                    int64_t t, int64_t c, int64_t count, int64_t v) {
            Average const y(merge<T>(past, future), x.scale + b.channel[v].bonus, x.numerator);
            if constexpr (kKeeps) {
                V const q = b.number(b.p.grad_h, t, c, count) / y.denominator;
                b.kept[(t - b.task.begin) * b.vectors + v] = {y.scale, q, y.o};
            } else {
                write(b.token(b.p.h, t) + c, Real<T>{y.o}, count);
            }
        }
    };

    struct Gradients {
        using S = SlopedSums<T>;
        LSM_INLINE static S added(BothWays const& b, int64_t t, int64_t, int64_t, int64_t v) {
            KeptToken<T> const& y = b.kept[(t - b.task.begin) * b.vectors + v];
            return {y.q, -y.q * y.o, -y.scale, V{}, V{}};
        }
        LSM_INLINE static void emit(BothWays const& b, S const&, S const& past, S const& future,
                                    int64_t t, int64_t c, int64_t count, int64_t v) {
            Channel& own = b.channel[v];
            KeptToken<T> const& y = b.kept[(t - b.task.begin) * b.vectors + v];
            V const k = b.number(b.p.a, t, c, count), x = b.number(b.p.x, t, c, count);
            V const q = exp(k + own.bonus - y.scale) * y.q, logit = q * (x - y.o);
            V const left = exp(k + past.scale), right = exp(k + future.scale);
            V const dv = left * past.numerator + right * future.numerator;
            V const rest = left * past.denominator + right * future.denominator;
            write(b.token(b.p.dx, t) + c, Real<T>{dv + q}, count);
            write(b.token(b.p.da, t) + c, Real<T>{x * dv + rest + logit}, count);
            own.bonus_grad += logit;
            own.rate_grad -= left * (x * past.numerator_slope + past.denominator_slope) +
                             right * (x * future.numerator_slope + future.denominator_slope);
        }
    };

    template <class Pass>
    void walk(void* states) const {
        using S = typename Pass::S;
        S *const past = static_cast<S*>(states), *const future = past + vectors;
        S *const before = future + vectors, *const tile = before + kWkv4Tile * vectors;
        for (int64_t v = 0; v < 2 * vectors; ++v) {
            past[v] = S{};
            past[v].scale -= T(__builtin_inf());
        }
        auto const step = [&](S& sums, int64_t t, int64_t c, int64_t count, int64_t v)
                              __attribute__((always_inline)) {
                                  add(sums, channel[v].rate, Pass::added(*this, t, c, count, v));
                              };
        for (int64_t t = task.begin; t < task.end; ++t) {
            int64_t const i = t - task.begin;
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                if (i % kWkv4Tile == 0) tile[i / kWkv4Tile * vectors + v] = past[v];
                step(past[v], t, c, count, v);
            });
        }
        for (int64_t k = tiles_of(task.end - task.begin); k-- > 0;) {
            int64_t const begin = task.begin + k * kWkv4Tile;
            int64_t const tokens = min_of(kWkv4Tile, task.end - begin);
            for (int64_t v = 0; v < vectors; ++v) past[v] = tile[k * vectors + v];
            for (int64_t i = 0; i < tokens; ++i) {
                channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                    before[i * vectors + v] = past[v];
                    step(past[v], begin + i, c, count, v);
                });
            }
            for (int64_t i = tokens; i-- > 0;) {
                channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                    S const x = Pass::added(*this, begin + i, c, count, v);
                    Pass::emit(*this, x, before[i * vectors + v], future[v], begin + i, c, count,
                               v);
                    add(future[v], channel[v].rate, x);
                });
            }
        }
    }

    void forward() const { walk<Averages<false>>(kept); }

    void backward() const {
        void* const states = kept + (task.end - task.begin) * vectors;
        walk<Averages<true>>(states);
        walk<Gradients>(states);
        store_channel_grads(channel);
    }

    Channel* channel;
    KeptToken<T>* kept;
};

}  // namespace

constinit Wkv4Kernels const bi_wkv_kernels{KernelsOf<BothWays>::scratch_bytes,
                                           KernelsOf<BothWays>::forward,
                                           KernelsOf<BothWays>::backward};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
