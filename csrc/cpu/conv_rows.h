// The short convolution of channels that lie side by side (see conv_tier.h).
#pragma once

#include "conv_tile.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// Channels side by side: a few tokens of all channels at a time, and with a norm of a head's channels.
template <class Number, class Elem, int kTaps, bool kNormed>
class Rows : public Tile<Number, Elem, kTaps> {
    using Base = Tile<Number, Elem, kTaps>;

  public:
    using Base::W;
    using typename Base::Element;
    using typename Base::T;

    Rows(ConvParams const& p, int64_t first, Arena<T>& arena) : Base(p, first, arena) {
        past_ = reinterpret_cast<Element*>(arena.take(past() * pitch_));
        for (int64_t i = 0; i < past() + kStep; ++i) grad_[i] = arena.take(pitch_);
        for (int i = 0; i < kStep && kNormed; ++i) arena.take_each(pitch_, value_[i], slope_[i]);
    }

    void begin(bool forward) {
        Base::begin(forward);
        if (!forward || !kPairs) return;
        for (int64_t c = 0; c + 2 * W <= channels_; c += 2 * W) {
            for (int64_t j = 0; j < taps(); ++j) apart(weight_ + j * pitch_ + c);
            apart(bias_ + c);
        }
    }

    void forward(ConvSegment const& s) {
        read_past(s);
        int64_t t = s.t0;
        for (; t + kStep <= s.t1; t += kStep) forward_step<kStep>(s, t);
        for (; t < s.t1; ++t) forward_step<1>(s, t);
        this->write_state(s);
    }

    void backward(ConvSegment const& s) {
        read_past(s);
        if (p_.grad_initial_state != nullptr && s.t0 == s.begin) {
            for (int64_t t = s.begin; t < s.begin + past(); ++t) next_gradients(s, t);
            for (int64_t c = 0; c < channels_; ++c)
                this->write_initial_grad(s, c, [&](int64_t i) { return grad_[i][c]; });
        }
        int64_t t = s.t0;
        for (; t + kStep <= s.t1; t += kStep) {
            gradients<kStep>(s, t);
            add_to_sums<kStep>(s, t);
            write_dx<kStep>(s, t - past());
            rotate<kStep>();
        }
        for (; t < s.t1 + past(); ++t) {
            next_gradients(s, t, [&] {
                if (t < s.t1) add_to_sums<1>(s, t);
                write_dx<1>(s, t - past());
            });
        }
    }

  private:
    static constexpr int kStep = kTaps > 0 ? 4 : 1;  // tokens
    // In the forward, bf16's channels go by pairs of vectors, weights and bias of even channels before those of odd ones.
    static constexpr bool kPairs = Base::kPaired && !kNormed;
    static constexpr bool kAsks = kNormed || sizeof(Element) < sizeof(float);
    static constexpr int kReach = kTaps > 0 ? kTaps - 1 + kStep : kMaxTaps;

    using Base::bias_, Base::channels_, Base::first_, Base::p_, Base::past, Base::pitch_,
        Base::sums_, Base::taps, Base::weight_;

    static LSM_INLINE void apart(T* x) {
        Vector<T> const low = load(x), high = load(x + W);
        store(x, unzip_even<T>(low, high)), store(x + W, unzip_odd<T>(low, high));
    }

    void read_past(ConvSegment const& s) {
        if (s.t0 - past() >= s.begin) return;
        for (int64_t i = 0; i < past(); ++i) {
            for (int64_t c = 0; c < channels_; ++c)
                past_[i * pitch_ + c] = this->before(s, c, past() - i);
        }
    }

    // Rows t - past ... t + U - 1 of x.
    template <int U>
    LSM_INLINE void find(ConvSegment const& s, int64_t t, Element const* (&x)[kReach]) const {
        for (int64_t i = 0; i < past() + U; ++i) {
            int64_t const token = t - past() + i;
            x[i] = token >= s.begin ? this->at(p_.x, s, token)
                                    : past_ + (past() + token - s.begin) * pitch_;
        }
    }

    // `at`: where the channels' weights are.
    template <int U, size_t kInputs>
    LSM_INLINE void sum_taps(Vector<T> const (&in)[kInputs], int64_t at,
                             Vector<T> (&sum)[U]) const {
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
            sum[u] = load(bias_ + at);
#pragma GCC unroll 4
            for (int j = 0; j < kTaps; ++j) sum[u] += load(weight_ + j * pitch_ + at) * in[u + j];
        }
    }

    template <int U, class Lanes>
    LSM_INLINE void convolve(Element const* const (&x)[kReach], int64_t c, Lanes lanes,
                             Vector<T> (&sum)[U]) const {
        if constexpr (kTaps > 0) {
            Vector<T> in[kTaps - 1 + U];
#pragma GCC unroll 8
            for (int i = 0; i < kTaps - 1 + U; ++i) in[i] = read<T>(x[i] + c, lanes);
            sum_taps<U>(in, c, sum);
        } else {
            sum[0] = load(bias_ + c);
            for (int64_t j = 0; j < taps(); ++j)
                sum[0] += load(weight_ + j * pitch_ + c) * read<T>(x[j] + c, lanes);
        }
    }

    template <int U, Half kHalf>
    LSM_INLINE void convolve_half(Element const* const (&x)[kReach], int64_t c,
                                  Vector<T> (&sum)[U]) const {
        int64_t const at = c + (kHalf == Half::odd ? W : 0);
        Vector<T> in[kTaps - 1 + U];
#pragma GCC unroll 8
        for (int i = 0; i < kTaps - 1 + U; ++i) in[i] = read_half<kHalf>(x[i] + c);
        sum_taps<U>(in, at, sum);
        this->activate(sum);
    }

    // The next step's inputs are asked for meanwhile, but where memory is what takes the time: asking only adds to it.
    template <int U>
    void forward_step(ConvSegment const& s, int64_t t) {
        Element const* x[kReach];
        find<U>(s, t, x);
        Element* y[U];
        Element const* next[U];
        for (int u = 0; u < U; ++u)
            y[u] = this->at(p_.y, s, t + u), next[u] = this->at(p_.x, s, t + U + u);
        auto const prefetch = [&](int64_t c) {
#pragma GCC unroll 4
            for (int u = 0; u < U && kAsks; ++u) __builtin_prefetch(next[u] + c);
        };
        int64_t first = 0;
        if constexpr (kPairs) {
            for (; first + 2 * W <= channels_; first += 2 * W) {
                prefetch(first);
                Vector<T> even[U], odd[U];
                convolve_half<U, Half::even>(x, first, even);
                convolve_half<U, Half::odd>(x, first, odd);
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) write_halves(y[u] + first, even[u], odd[u]);
            }
        }
        each_head(first, [&](int64_t head, int64_t size, auto divide) {
            Vector<T> squares[U] = {};
            each_vector<T>(size, [&](int64_t i, auto lanes) {
                int64_t const c = head + i;
                Vector<T> sum[U];
                prefetch(c);
                convolve<U>(x, c, lanes, sum);
                this->activate(sum);
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) {
                    if constexpr (divide) {
                        Vector<T> const value = zero_rest<T>(sum[u], lanes);
                        squares[u] += value * value;
                        store(value_[u] + c, value);
                    } else {
                        write<T>(y[u] + c, sum[u], lanes);
                    }
                }
            });
            for (int u = 0; u < U && divide; ++u) {
                T const inverse = inverse_norm(squares[u]);
                each_vector<T>(size, [&](int64_t i, auto lanes) {
                    write<T>(y[u] + head + i, load(value_[u] + head + i) * inverse, lanes);
                });
            }
        });
    }

    // f(first channel, channels, has it a norm) from `first` on for every head, and for what is behind the last one that has.
    template <class F>
    LSM_INLINE void each_head(int64_t first, F const& f) const {
        if constexpr (kNormed) {
            int64_t const normed = min_of(channels_, p_.normed - first_);
            for (; first < normed; first += p_.norm) f(first, p_.norm, std::true_type{});
        }
        if (first < channels_) f(first, channels_ - first, std::false_type{});
    }

    LSM_INLINE T inverse_norm(Vector<T> squares) const {
        return T(1) / std::sqrt(sum_lanes<T>(squares) + T(p_.norm_eps));
    }

    // Gradients before the activation of tokens t ... t + U - 1, into grad_[past ...].
    template <int U>
    void gradients(ConvSegment const& s, int64_t t) {
        Element const* x[kReach];
        find<U>(s, t, x);
        Element const* dy[U];
        for (int u = 0; u < U; ++u) dy[u] = this->at(p_.grad_y, s, t + u);
        each_head(0, [&](int64_t head, int64_t size, auto divide) {
            Vector<T> squares[U] = {}, dots[U] = {};
            each_vector<T>(size, [&](int64_t i, auto lanes) {
                int64_t const c = head + i;
                Vector<T> sum[U], value, slope;
                convolve<U>(x, c, lanes, sum);
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) {
                    Vector<T> const g = read<T>(dy[u] + c, lanes);
                    this->activate(sum[u], value, slope);
                    if constexpr (divide) {
                        value = zero_rest<T>(value, lanes);
                        squares[u] += value * value;
                        dots[u] += value * g;
                        store(value_[u] + c, value), store(slope_[u] + c, slope);
                    } else {
                        store(grad_[this->past() + u] + c, g * slope);
                    }
                }
            });
            // d(v / |v|) = (dv - v (v dv) / |v|^2) / |v|
            for (int u = 0; u < U && divide; ++u) {
                T const inverse = inverse_norm(squares[u]);
                T const along = sum_lanes<T>(dots[u]) * inverse * inverse;
                each_vector<T>(size, [&](int64_t i, auto lanes) {
                    int64_t const c = head + i;
                    Vector<T> const g = read<T>(dy[u] + c, lanes) - load(value_[u] + c) * along;
                    store(grad_[this->past() + u] + c, g * inverse * load(slope_[u] + c));
                });
            }
        });
    }

    // Those of token t, zeros behind the sequence; what is done with them; and they are the latest.
    template <class Then>
    void next_gradients(ConvSegment const& s, int64_t t, Then const& then) {
        if (t < s.end) {
            gradients<1>(s, t);
        } else {
            Base::fill(grad_[past()], pitch_);
        }
        then();
        rotate<1>();
    }
    void next_gradients(ConvSegment const& s, int64_t t) {
        next_gradients(s, t, [] {});
    }

    template <int U>
    void rotate() {
        T* oldest[U];
        for (int u = 0; u < U; ++u) oldest[u] = grad_[u];
        for (int64_t i = 0; i < past() + kStep - U; ++i) grad_[i] = grad_[i + U];
        for (int u = 0; u < U; ++u) grad_[past() + kStep - U + u] = oldest[u];
    }

    // dx of tokens t ... t + U - 1, whose gradients and those of the W - 1 tokens behind begin grad_; of this
    // segment's tokens only.
    template <int U>
    void write_dx(ConvSegment const& s, int64_t t) {
        Element* dx[U];
        for (int u = 0; u < U; ++u)
            dx[u] = t + u >= s.t0 && t + u < s.t1 ? this->at(p_.dx, s, t + u) : nullptr;
        each_vector<T>(channels_, [&](int64_t c, auto lanes) {
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                if (dx[u] == nullptr) continue;
                Vector<T> sum = spread(u, c);
                if (this->in_final_state(s, t + u)) {
                    for (int i = 0; i < W && c + i < channels_; ++i)
                        sum[i] += this->final_grad(s, c + i, t + u);
                }
                write<T>(dx[u] + c, sum, lanes);
            }
        });
    }

    LSM_INLINE Vector<T> spread(int u, int64_t c) const {
        Vector<T> sum = {};
        auto const add = [&](int64_t j) {
            sum += load(weight_ + (past() - j) * pitch_ + c) * load(grad_[u + j] + c);
        };
        if constexpr (kTaps > 0) {
#pragma GCC unroll 4
            for (int j = 0; j < kTaps; ++j) add(j);
        } else {
            for (int64_t j = 0; j < taps(); ++j) add(j);
        }
        return sum;
    }

    template <int U>
    void add_to_sums(ConvSegment const& s, int64_t t) {
        if (p_.dweight == nullptr) return;
        Element const* x[kReach];
        find<U>(s, t, x);
        each_vector<T>(channels_, [&](int64_t c, auto lanes) {
            Vector<T> g[U], bias = {};
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) bias += g[u] = load(grad_[past() + u] + c);
            add(sums_ + taps() * pitch_ + c, bias);
            if constexpr (kTaps > 0) {
                Vector<T> in[kTaps - 1 + U];
#pragma GCC unroll 8
                for (int i = 0; i < kTaps - 1 + U; ++i) in[i] = read<T>(x[i] + c, lanes);
#pragma GCC unroll 4
                for (int j = 0; j < kTaps; ++j) {
                    Vector<T> sum = {};
#pragma GCC unroll 4
                    for (int u = 0; u < U; ++u) sum += g[u] * in[u + j];
                    add(sums_ + j * pitch_ + c, sum);
                }
            } else {
                for (int64_t j = 0; j < taps(); ++j)
                    add(sums_ + j * pitch_ + c, g[0] * read<T>(x[j] + c, lanes));
            }
        });
    }

    static LSM_INLINE void add(T* to, Vector<T> x) { store(to, load(to) + x); }

    Element* past_;              // [W - 1][pitch]: before the sequence
    T* grad_[kMaxTaps + kStep];  // [pitch] each: of the W - 1 tokens before a step, and of a step
    T *value_[kStep], *slope_[kStep];
};

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
