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

#include "fading_sums.h"
#include "wkv4_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

template <class T, class In>
struct Wkv4 : ChannelBlock<T, In> {
    using Base = ChannelBlock<T, In>;
    using Base::channels, Base::nothing, Base::p, Base::row, Base::set_row,
        Base::store_channel_grads, Base::task, Base::token, Base::vectors, Base::W;
    using typename Base::Average;
    using typename Base::V;

    // Panels of a block: what channels have of their own, states, and in the backward those of a tile.
    struct Channel {
        V rate, bonus, rate_grad, bonus_grad;
        Sums<T> state, grad;
    };

    static int64_t bytes(Wkv4Params const&, int64_t channels, bool backward) {
        int64_t const vectors = (channels + W - 1) / W;
        return vectors * int64_t(sizeof(Channel)) +
               (backward ? kWkv4Tile * vectors * int64_t(sizeof(Sums<T>)) : 0);
    }

    Wkv4(Wkv4Params const& p, Wkv4Task const& task, void* scratch)
        : Base(p, task),
          channel(static_cast<Channel*>(scratch)),
          before(reinterpret_cast<Sums<T>*>(channel + vectors)) {
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].rate = row(p.channel, c, count), channel[v].bonus = row(p.bonus, c, count);
            channel[v].rate_grad = channel[v].bonus_grad = V{};
        });
    }

    // The sequence's row of a tensor [N, D].
    template <class Any>
    Any* of_sequence(Any* states) const {
        using Number = std::conditional_t<std::is_const_v<Any>, T const, T>;
        return states == nullptr ? nullptr : static_cast<Number*>(states) + task.sequence * p.D;
    }
    T* tile(int64_t k) const { return static_cast<T*>(p.states) + (task.tile + k) * 3 * p.D; }

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

    void forward() const {
        load_initial();
        for (int64_t t = task.begin; t < task.end; ++t) {
            int64_t const i = t - task.begin;
            T* const saved =
                p.states != nullptr && i % kWkv4Tile == 0 ? tile(i / kWkv4Tile) : nullptr;
            In const *const k_row = token(p.a, t), *const v_row = token(p.x, t);
            In* const o_row = token(p.h, t);
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                Channel& own = channel[v];
                if (saved != nullptr) {
                    set_row(saved, c, count, own.state.numerator);
                    set_row(saved + p.D, c, count, own.state.denominator);
                    set_row(saved + 2 * p.D, c, count, own.state.scale);
                }
                V const k = read<Real<T>>(k_row + c, count).re;
                V const x = read<Real<T>>(v_row + c, count).re;
                write(o_row + c, Real<T>{Average(own.state, k + own.bonus, x).o}, count);
                add<T>(own.state, own.rate, {x, splat<T>(1), k});
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
        for (int64_t k = (task.end - task.begin + kWkv4Tile - 1) / kWkv4Tile; k-- > 0;)
            tile_backward(k);
        store_initial_grads();
        store_channel_grads(channel);
    }

    void tile_backward(int64_t k) const {
        int64_t const begin = task.begin + k * kWkv4Tile;
        int64_t const tokens = min_of(kWkv4Tile, task.end - begin);
        T const* const saved = tile(k);
        channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v].state = {row(saved, c, count), row(saved + p.D, c, count),
                                row(saved + 2 * p.D, c, count)};
        });
        for (int64_t i = 0; i < tokens; ++i) {
            In const *const k_row = token(p.a, begin + i), *const v_row = token(p.x, begin + i);
            channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                before[i * vectors + v] = channel[v].state;
                add<T>(channel[v].state, channel[v].rate,
                       {read<Real<T>>(v_row + c, count).re, splat<T>(1),
                        read<Real<T>>(k_row + c, count).re});
            });
        }
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

    Channel* channel;
    Sums<T>* before;  // [kWkv4Tile][vectors]
};

}  // namespace

constinit Wkv4Kernels const wkv4_kernels{KernelsOf<Wkv4>::scratch_bytes, KernelsOf<Wkv4>::forward,
                                         KernelsOf<Wkv4>::backward};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
