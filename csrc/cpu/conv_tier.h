// The short convolution for one instruction set (see chunk_tier.h for what the including file has chosen).
//
// Lanes lie along what lies side by side in memory: channels (Rows) or tokens (Lines). A token's W inputs are read where
// they are, so nothing is transposed; only those before a sequence's first token come from a buffer. A task is a tile of
// channels of a few segments of tokens. Nothing is carried from one to the next: the backward makes the gradients of the
// W - 1 tokens behind a segment again.
#pragma once

#include "arena.h"
#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kMaxTaps = 128;  // checked by the operator
constexpr int64_t kStepTile = 32;  // channels

// x between bounds; NaN passes.
LSM_INLINE Vector<float> bounded(Vector<float> x, float low, float high) {
#if LSM_CPU_VECTOR_BYTES == 64
    x = Vector<float>(_mm512_maskz_max_ps(0xffff, __m512(Vector<float>{} + low), __m512(x)));
    return Vector<float>(_mm512_maskz_min_ps(0xffff, __m512(Vector<float>{} + high), __m512(x)));
#else
    x = x < low ? Vector<float>{} + low : x;
    return x > high ? Vector<float>{} + high : x;
#endif
}

// 1 / x, of a half's precision.
LSM_INLINE Vector<float> rough_reciprocal(Vector<float> x) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Vector<float>(_mm512_maskz_rcp14_ps(0xffff, __m512(x)));
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + e^-x), to about 1 ulp for float, to 13 bits for halves: the time of a convolution in cache is this. e^-x is 2^n
// times a polynomial in r, where n + r = -x log2 e.
template <class Element>
LSM_INLINE Vector<float> logistic(Vector<float> x) {
    using V = Vector<float>;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    constexpr float kLog2e = 1.44269504088896341f;
    x = bounded(x, -87.0f, 87.0f);
    V const n = (x * -kLog2e + kRound) - kRound, r = x * -kLog2e - n;
    V y;
    if constexpr (sizeof(Element) == 2) {
        y = r * 0.009582852944731712f + 0.055906426161527634f;
        y = y * r + 0.24024099111557007f;
        y = y * r + 0.6931241750717163f;
        return rough_reciprocal(scale_by_power_of_two(y * r + 1.0f, n) + 1.0f);
    } else {
        y = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
        y = y * r + 9.618437357674640e-3f;
        y = y * r + 5.550332471162809e-2f;
        y = y * r + 2.402264791363012e-1f;
        y = y * r + 6.931472028550421e-1f;
        return 1.0f / (scale_by_power_of_two(y * r + 1.0f, n) + 1.0f);
    }
}

template <class Element>
LSM_INLINE Vector<double> logistic(Vector<double> x) {
    return 1.0 / (1.0 + exp(-x));
}

// One element in the accumulation type.
LSM_INLINE float number(float const* p) {
    return *p;
}
LSM_INLINE double number(double const* p) {
    return *p;
}
LSM_INLINE float number(Bf16 const* p) {
    return __builtin_bit_cast(float, uint32_t(p->bits) << 16);
}
LSM_INLINE float number(F16 const* p) {
    return widen_first<float>(p, 1)[0];
}

// The lanes of a vector that count: all, or the first so many.
struct All {};

template <class T, class Element>
LSM_INLINE Vector<T> read(Element const* p, All) {
    return widen(p);
}
template <class T, class Element>
LSM_INLINE Vector<T> read(Element const* p, int64_t count) {
    return widen_first<T>(p, count);
}
template <class T, class Element>
LSM_INLINE void write(Element* p, Vector<T> x, All) {
    narrow(p, x);
}
template <class T, class Element>
LSM_INLINE void write(Element* p, Vector<T> x, int64_t count) {
    narrow_first<T>(p, x, count);
}
template <class T>
LSM_INLINE Vector<T> zero_rest(Vector<T> x, All) {
    return x;
}
template <class T>
LSM_INLINE Vector<T> zero_rest(Vector<T> x, int64_t count) {
    return lane_numbers<T>() < T(count) ? x : Vector<T>{};
}

// f(first, lanes) for every vector of n elements.
template <class T, class F>
LSM_INLINE void each_vector(int64_t n, F const& f) {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, All{});
    if (i < n) f(i, n - i);
}

// Rows [D, columns] of one tile as columns of `pitch` channels.
template <class T>
void read_columns(T* to, void const* rows, Dtype dtype, int64_t columns, int64_t channels,
                  int64_t pitch) {
    with_element<T>(dtype, [&](auto element) {
        auto const* from = static_cast<decltype(element) const*>(rows);
        for (int64_t c = 0; c < pitch; ++c) {
            for (int64_t j = 0; j < columns; ++j)
                to[j * pitch + c] = c < channels ? T(number(from + c * columns + j)) : T(0);
        }
    });
}

inline void* element_at(void const* p, Dtype dtype, int64_t i) {
    return static_cast<char*>(const_cast<void*>(p)) + i * bytes_of(dtype);
}

// What both layouts have of a tile of channels: weights, states, sums of the weight's gradient. kTaps: W, or 0 if it
// is known at run time only.
template <class Number, class Elem, int kTaps>
class Tile {
  public:
    using T = Number;
    using Element = Elem;
    static constexpr int W = kLanes<T>;

    Tile(ConvParams const& p, int64_t first, Arena<T>& arena)
        : p_(p),
          first_(first),
          channels_(min_of(conv_tile_channels(p), p.D - first)),
          pitch_(round_up(conv_tile_channels(p), W) + W) {
        weight_ = arena.take(taps() * pitch_);
        bias_ = arena.take(pitch_);
        sums_ = arena.take((taps() + 1) * pitch_);
    }

    void begin() {
        read_columns(weight_, element_at(p_.weight, p_.weight_dtype, first_ * p_.W),
                     p_.weight_dtype, p_.W, channels_, pitch_);
        fill(bias_, pitch_);
        fill(sums_, (taps() + 1) * pitch_);
        if (p_.bias != nullptr)
            read_columns(bias_, element_at(p_.bias, p_.weight_dtype, first_), p_.weight_dtype, 1,
                         channels_, pitch_);
    }

    // Sums of the weight's gradient, and below them the bias's, as columns [W + 1][D].
    void write_sums(void* record) const {
        for (int64_t j = 0; j <= taps(); ++j)
            std::memcpy(static_cast<T*>(record) + j * p_.D + first_, sums_ + j * pitch_,
                        size_t(channels_) * sizeof(T));
    }

  protected:
    LSM_INLINE int64_t taps() const { return kTaps > 0 ? kTaps : p_.W; }
    LSM_INLINE int64_t past() const { return taps() - 1; }

    static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

    static void fill(T* to, int64_t count) {
        for (int64_t i = 0; i < count; ++i) to[i] = T(0);
    }

    Element* at(Strided const& x, ConvSegment const& s, int64_t token) const {
        return static_cast<Element*>(x.data) + s.batch * x.batch + token * x.time +
               first_ * x.channel;
    }

    Element* state_of(void const* states, int64_t sequence, int64_t channel) const {
        return static_cast<Element*>(const_cast<void*>(states)) +
               (sequence * p_.D + first_ + channel) * p_.S;
    }

    // The input `age` tokens before the sequence's first.
    Element before(ConvSegment const& s, int64_t channel, int64_t age) const {
        if (p_.initial_state == nullptr) return Element{};
        return state_of(p_.initial_state, s.index, channel)[p_.S - age];
    }

    // Value, and its slope, of the activation before which `pre` stands.
    LSM_INLINE void activate(Vector<T> pre, Vector<T>& value, Vector<T>& slope) const {
        if (!p_.silu) {
            value = pre, slope = Vector<T>{} + T(1);
            return;
        }
        Vector<T> const open = logistic<Element>(pre);
        value = pre * open, slope = open * (T(1) + pre * (T(1) - open));
    }

    void write_state(ConvSegment const& s) const {
        if (p_.final_state == nullptr || s.t1 < s.end) return;
        for (int64_t c = 0; c < channels_; ++c) {
            Element* const to = state_of(p_.final_state, s.index, c);
            for (int64_t i = 0; i < p_.S; ++i) {
                int64_t const token = s.end - p_.S + i;
                to[i] = token >= s.begin ? at(p_.x, s, token)[c * p_.x.channel]
                                         : before(s, c, s.begin - token);
            }
        }
    }

    // What the final state passes on to dx of a token: the gradient of one of its columns.
    LSM_INLINE bool in_final_state(ConvSegment const& s, int64_t token) const {
        return p_.grad_final_state != nullptr && token >= s.end - p_.S;
    }
    T final_grad(ConvSegment const& s, int64_t channel, int64_t token) const {
        return number(state_of(p_.grad_final_state, s.index, channel) + token - (s.end - p_.S));
    }

    // grad(i): the gradient before the activation of the sequence's i-th token, i < W - 1.
    template <class Grad>
    void write_initial_grad(ConvSegment const& s, int64_t c, Grad const& grad) const {
        int64_t const length = s.end - s.begin;
        for (int64_t i = 0; i < p_.S; ++i) {
            int64_t const age = p_.S - i;
            T sum = 0;
            for (int64_t j = age; j <= past() && j - age < length; ++j)
                sum += weight_[(past() - j) * pitch_ + c] * grad(j - age);
            if (p_.grad_final_state != nullptr && i >= length)
                sum += number(state_of(p_.grad_final_state, s.index, c) + i - length);
            narrow_first<T>(state_of(p_.grad_initial_state, s.index, c) + i, Vector<T>{} + sum, 1);
        }
    }

    ConvParams const& p_;
    int64_t first_, channels_, pitch_;
    T *weight_, *bias_, *sums_;  // [taps][pitch], [pitch], [taps + 1][pitch]
};

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
    static constexpr int kReach = kTaps > 0 ? kTaps - 1 + kStep : kMaxTaps;

    using Base::bias_, Base::channels_, Base::p_, Base::past, Base::pitch_, Base::sums_, Base::taps,
        Base::weight_;

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

    template <int U, class Lanes>
    LSM_INLINE void convolve(Element const* const (&x)[kReach], int64_t c, Lanes lanes,
                             Vector<T> (&sum)[U]) const {
        if constexpr (kTaps > 0) {
            Vector<T> in[kTaps - 1 + U];
#pragma GCC unroll 8
            for (int i = 0; i < kTaps - 1 + U; ++i) in[i] = read<T>(x[i] + c, lanes);
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                sum[u] = load(bias_ + c);
#pragma GCC unroll 4
                for (int j = 0; j < kTaps; ++j)
                    sum[u] += load(weight_ + j * pitch_ + c) * in[u + j];
            }
        } else {
            sum[0] = load(bias_ + c);
            for (int64_t j = 0; j < taps(); ++j)
                sum[0] += load(weight_ + j * pitch_ + c) * read<T>(x[j] + c, lanes);
        }
    }

    template <int U>
    void forward_step(ConvSegment const& s, int64_t t) {
        Element const* x[kReach];
        find<U>(s, t, x);
        Element* y[U];
        for (int u = 0; u < U; ++u) y[u] = this->at(p_.y, s, t + u);
        int64_t const head = kNormed ? p_.norm : channels_;
        for (int64_t h = 0; h < channels_; h += head) {
            Vector<T> squares[U] = {};
            each_vector<T>(head, [&](int64_t i, auto lanes) {
                int64_t const c = h + i;
                Vector<T> sum[U], value, slope;
                convolve<U>(x, c, lanes, sum);
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) {
                    this->activate(sum[u], value, slope);
                    if constexpr (kNormed) {
                        value = zero_rest<T>(value, lanes);
                        squares[u] += value * value;
                        store(value_[u] + c, value);
                    } else {
                        write<T>(y[u] + c, value, lanes);
                    }
                }
            });
            for (int u = 0; u < U && kNormed; ++u) {
                T const inverse = inverse_norm(squares[u]);
                each_vector<T>(head, [&](int64_t i, auto lanes) {
                    write<T>(y[u] + h + i, load(value_[u] + h + i) * inverse, lanes);
                });
            }
        }
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
        int64_t const head = kNormed ? p_.norm : channels_;
        for (int64_t h = 0; h < channels_; h += head) {
            Vector<T> squares[U] = {}, dots[U] = {};
            each_vector<T>(head, [&](int64_t i, auto lanes) {
                int64_t const c = h + i;
                Vector<T> sum[U], value, slope;
                convolve<U>(x, c, lanes, sum);
#pragma GCC unroll 4
                for (int u = 0; u < U; ++u) {
                    Vector<T> const g = read<T>(dy[u] + c, lanes);
                    this->activate(sum[u], value, slope);
                    if constexpr (kNormed) {
                        value = zero_rest<T>(value, lanes);
                        squares[u] += value * value;
                        dots[u] += value * g;
                        store(value_[u] + c, value), store(slope_[u] + c, slope);
                    } else {
                        store(grad_[past() + u] + c, g * slope);
                    }
                }
            });
            // d(v / |v|) = (dv - v (v dv) / |v|^2) / |v|
            for (int u = 0; u < U && kNormed; ++u) {
                T const inverse = inverse_norm(squares[u]);
                T const along = sum_lanes<T>(dots[u]) * inverse * inverse;
                each_vector<T>(head, [&](int64_t i, auto lanes) {
                    int64_t const c = h + i;
                    Vector<T> const g = read<T>(dy[u] + c, lanes) - load(value_[u] + c) * along;
                    store(grad_[past() + u] + c, g * inverse * load(slope_[u] + c));
                });
            }
        }
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

// Tokens side by side: a segment of one channel after the other.
template <class Number, class Elem, int kTaps>
class Lines : public Tile<Number, Elem, kTaps> {
    using Base = Tile<Number, Elem, kTaps>;

  public:
    using Base::W;
    using typename Base::Element;
    using typename Base::T;

    Lines(ConvParams const& p, int64_t first, Arena<T>& arena) : Base(p, first, arena) {
        arena.take_each(conv_segment_tokens(p) + 2 * past() + W, x_, grad_);
    }

    void forward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0;
        for (int64_t c = 0; c < channels_; ++c) {
            read_line(s, c, tokens);
            Filter const filter(*this, c);
            Element* const y = line(p_.y, s, c);
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> value, slope;
                this->activate(filter.apply(x_ + i, 1, bias_[c]), value, slope);
                write<T>(y + i, value, lanes);
            });
        }
        this->write_state(s);
    }

    void backward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0, made = min_of(tokens + past(), s.end - s.t0);
        for (int64_t c = 0; c < channels_; ++c) {
            read_line(s, c, made);
            Filter const filter(*this, c);
            Element const* const dy = line(p_.grad_y, s, c);
            each_vector<T>(made, [&](int64_t i, auto lanes) {
                Vector<T> value, slope;
                this->activate(filter.apply(x_ + i, 1, bias_[c]), value, slope);
                store(grad_ + i, read<T>(dy + i, lanes) * slope);
            });
            for (int64_t i = made; i < tokens + past(); ++i) grad_[i] = T(0);
            if (p_.dweight != nullptr) add_to_sums(c, tokens);
            Element* const dx = line(p_.dx, s, c);
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> sum = filter.apply(grad_ + i + past(), -1, T(0));
                for (int k = 0; k < W && this->in_final_state(s, s.t0 + i + W - 1); ++k) {
                    int64_t const token = s.t0 + i + k;
                    if (token < s.t1 && this->in_final_state(s, token))
                        sum[k] += this->final_grad(s, c, token);
                }
                write<T>(dx + i, sum, lanes);
            });
            if (p_.grad_initial_state != nullptr && s.t0 == s.begin)
                this->write_initial_grad(s, c, [&](int64_t i) { return grad_[i]; });
        }
    }

  private:
    using Base::bias_, Base::channels_, Base::p_, Base::past, Base::pitch_, Base::sums_, Base::taps,
        Base::weight_;

    // A channel's taps in all lanes.
    struct Filter {
        Filter(Lines const& lines, int64_t c) : lines_(lines), c_(c) {
            for (int j = 0; j < kTaps; ++j)
                weight_[j] = Vector<T>{} + lines.weight_[j * lines.pitch_ + c];
        }

        // first, and over taps j weight j times x[j * step]: in the order of Rows, to the same bits.
        LSM_INLINE Vector<T> apply(T const* x, int64_t step, T first) const {
            Vector<T> sum = Vector<T>{} + first;
            if constexpr (kTaps > 0) {
#pragma GCC unroll 4
                for (int j = 0; j < kTaps; ++j) sum += weight_[j] * load(x + j * step);
            } else {
                for (int64_t j = 0; j < lines_.taps(); ++j)
                    sum += lines_.weight_[j * lines_.pitch_ + c_] * load(x + j * step);
            }
            return sum;
        }

        Lines const& lines_;
        int64_t c_;
        Vector<T> weight_[kTaps > 0 ? kTaps : 1];
    };

    Element* line(Strided const& x, ConvSegment const& s, int64_t c) const {
        return this->at(x, s, s.t0) + c * x.channel;
    }

    // The W - 1 inputs before a segment, and the first `tokens` from its first on.
    void read_line(ConvSegment const& s, int64_t c, int64_t tokens) {
        Element const* const x = line(p_.x, s, c);
        for (int64_t i = 0; i < past(); ++i) {
            int64_t const token = s.t0 - past() + i;
            Element const input =
                token >= s.begin ? x[i - past()] : this->before(s, c, s.begin - token);
            x_[i] = number(&input);
        }
        each_vector<T>(
            tokens, [&](int64_t i, auto lanes) { store(x_ + past() + i, read<T>(x + i, lanes)); });
    }

    // In vectors of tokens, and those at the end.
    void add_to_sums(int64_t c, int64_t tokens) {
        auto const add = [&](int64_t j, Vector<T> sum) {
            sums_[j * pitch_ + c] += sum_lanes<T>(sum);
        };
        constexpr int kTogether = kTaps > 0 ? kTaps : 1;
        for (int64_t j = 0; j < taps(); j += kTogether) {
            Vector<T> sum[kTogether] = {};
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> const g = zero_rest<T>(load(grad_ + i), lanes);
#pragma GCC unroll 4
                for (int k = 0; k < kTogether; ++k)
                    sum[k] += g * zero_rest<T>(load(x_ + i + j + k), lanes);
            });
            for (int k = 0; k < kTogether; ++k) add(j + k, sum[k]);
        }
        Vector<T> bias = {};
        each_vector<T>(
            tokens, [&](int64_t i, auto lanes) { bias += zero_rest<T>(load(grad_ + i), lanes); });
        add(taps(), bias);
    }

    T *x_, *grad_;  // from W - 1 tokens before the segment on; from its first token on
};

// run(tile) of the dtype, the layout and the taps. What models use is unrolled: four taps, and in fp32 and bf16 two and
// three without a norm.
template <class Run>
void with_tile(ConvParams const& p, int64_t first, void* scratch, Run const& run) {
    auto const taken = [&](auto zero, auto element, auto taps) {
        using T = decltype(zero);
        using Element = decltype(element);
        constexpr int kTaps = decltype(taps)::value;
        Arena<T> arena(scratch);
        if constexpr (kTaps == 0 || kTaps == 4) {
            if (p.x.channel_last() && p.norm > 0)
                return run(Rows<T, Element, kTaps, true>(p, first, arena), arena);
        }
        if (p.x.channel_last()) {
            run(Rows<T, Element, kTaps, false>(p, first, arena), arena);
        } else {
            run(Lines<T, Element, kTaps>(p, first, arena), arena);
        }
    };
    auto const typed = [&](auto zero) {
        with_element<decltype(zero)>(p.dtype, [&](auto element) {
            using Element = decltype(element);
            if constexpr (std::is_same_v<Element, float> || std::is_same_v<Element, Bf16>) {
                if (p.W == 2 && p.norm == 0)
                    return taken(zero, element, std::integral_constant<int, 2>{});
                if (p.W == 3 && p.norm == 0)
                    return taken(zero, element, std::integral_constant<int, 3>{});
            }
            if constexpr (!std::is_same_v<Element, double>) {
                if (p.W == 4) return taken(zero, element, std::integral_constant<int, 4>{});
            }
            taken(zero, element, std::integral_constant<int, 0>{});
        });
    };
    if (p.dtype == Dtype::f64) {
        typed(double{});
    } else {
        typed(float{});
    }
}

int64_t conv_scratch_bytes(ConvParams const& p) {
    int64_t bytes = 0;
    with_tile(p, 0, nullptr, [&](auto&&, auto const& arena) { bytes = arena.used(); });
    return bytes;
}

void conv_forward(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                  void* scratch) {
    with_tile(p, first, scratch, [&](auto&& tile, auto&) {
        tile.begin();
        for (int64_t i = 0; i < count; ++i) tile.forward(segments[i]);
    });
}

void conv_backward(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                   void* record, void* scratch) {
    with_tile(p, first, scratch, [&](auto&& tile, auto&) {
        tile.begin();
        for (int64_t i = 0; i < count; ++i) tile.backward(segments[i]);
        if (p.dweight != nullptr) tile.write_sums(record);
    });
}

// Gradients of weight and bias: the records' sums, in their order, made in the first.
void conv_add(ConvParams const& p, void* records, int64_t count) {
    auto const typed = [&](auto zero) {
        using T = decltype(zero);
        T* const sums = static_cast<T*>(records);
        int64_t const size = (p.W + 1) * p.D;
        for (int64_t r = 1; r < count; ++r) {
            T const* const record = sums + r * size;
            for (int64_t i = 0; i < size; ++i) sums[i] += record[i];
        }
        auto const write_column = [&](void* to, int64_t i, int64_t j) {
            with_element<T>(p.weight_dtype, [&](auto element) {
                T const* const from = sums + j * p.D;
                for (int64_t c = 0; c < p.D; ++c)
                    narrow_first<T>(static_cast<decltype(element)*>(to) + c * i,
                                    Vector<T>{} + (count > 0 ? from[c] : T(0)), 1);
            });
        };
        for (int64_t j = 0; j < p.W; ++j)
            write_column(element_at(p.dweight, p.weight_dtype, j), p.W, j);
        if (p.dbias != nullptr) write_column(p.dbias, 1, p.W);
    };
    if (p.dtype == Dtype::f64) {
        typed(double{});
    } else {
        typed(float{});
    }
}

// One row of a batch of steps, a tile of channels at a time; the last W inputs as rows [W][kStepTile].
template <class T, class Element>
void step_row(ConvStepParams const& p, int64_t batch) {
    constexpr int64_t C = kStepTile;
    int64_t const row = p.rows != nullptr ? p.rows[batch] : batch, past = p.W - 1;
    int64_t const seen = p.seen != nullptr ? p.seen[batch] : p.S;
    // Where an input lies: positions count from the state's first column, or from the ring's first input.
    auto const column = [&](int64_t position) {
        return p.seen != nullptr ? (position % p.S + p.S) % p.S : position;
    };
    alignas(64) T inputs[kMaxTaps * C] = {}, weight[kMaxTaps * C], bias[C] = {}, sum[C];
    for (int64_t first = 0; first < p.D; first += C) {
        int64_t const channels = min_of(C, p.D - first);
        Element const* const x =
            static_cast<Element const*>(p.x.data) + batch * p.x.batch + first * p.x.channel;
        Element* const y =
            static_cast<Element*>(p.y.data) + batch * p.y.batch + first * p.y.channel;
        if (row < 0) {
            for (int64_t t = 0; t < p.T; ++t)
                for (int64_t c = 0; c < channels; ++c)
                    y[t * p.y.time + c * p.y.channel] = Element{};
            continue;
        }
        Element* const state =
            static_cast<Element*>(p.state) + row * p.state_row + first * p.state_channel;
        read_columns(weight, element_at(p.weight, p.weight_dtype, first * p.W), p.weight_dtype, p.W,
                     channels, C);
        if (p.bias != nullptr)
            read_columns(bias, element_at(p.bias, p.weight_dtype, first), p.weight_dtype, 1,
                         channels, C);
        for (int64_t i = 0; i < past; ++i) {
            Element const* const from = state + column(seen - past + i) * p.state_time;
            for (int64_t c = 0; c < channels; ++c)
                inputs[i * C + c] = number(from + c * p.state_channel);
        }
        for (int64_t t = 0; t < p.T; ++t) {
            for (int64_t c = 0; c < channels; ++c)
                inputs[past * C + c] = number(x + t * p.x.time + c * p.x.channel);
            for (int64_t c = 0; c < C; c += kLanes<T>) {
                Vector<T> pre = load(bias + c);
                for (int64_t j = 0; j < p.W; ++j) {
                    Vector<T> const input = load(inputs + j * C + c);
                    if (j > 0) store(inputs + (j - 1) * C + c, input);
                    pre += load(weight + j * C + c) * input;
                }
                store(sum + c, p.silu ? pre * logistic<Element>(pre) : pre);
            }
            Element out[C];
            for (int64_t c = 0; c < C; c += kLanes<T>) narrow(out + c, load(sum + c));
            for (int64_t c = 0; c < channels; ++c) y[t * p.y.time + c * p.y.channel] = out[c];
        }
        for (int64_t c = 0; c < channels; ++c) {
            Element* const to = state + c * p.state_channel;
            Element const* const from = x + c * p.x.channel;
            if (p.seen != nullptr) {
                for (int64_t t = 0; t < p.T; ++t)
                    to[column(seen + t) * p.state_time] = from[t * p.x.time];
            } else {
                for (int64_t s = 0; s < p.S; ++s) {
                    int64_t const after = s + p.T;
                    to[s * p.state_time] =
                        after < p.S ? to[after * p.state_time] : from[(after - p.S) * p.x.time];
                }
            }
        }
    }
}

void conv_step(ConvStepParams const& p, int64_t batch) {
    if (p.dtype == Dtype::f64) return step_row<double, double>(p, batch);
    with_element<float>(p.dtype,
                        [&](auto element) { step_row<float, decltype(element)>(p, batch); });
}

}  // namespace

constinit ConvKernels const conv_kernels{conv_scratch_bytes, conv_forward, conv_backward, conv_add,
                                         conv_step};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
