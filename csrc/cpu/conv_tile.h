// The short convolution, what both layouts have: the activation, lanes, and a tile of channels (see conv_tier.h).
#pragma once

#include "arena.h"
#include "logistic.h"
#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kMaxTaps = 128;  // checked by the operator

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
#if LSM_CPU_VECTOR_BYTES == 64
// In two instructions, where the compiler takes four.
template <class T>
LSM_INLINE Vector<T> read(Bf16 const* p, All) {
    __m512i const bits = _mm512_maskz_cvtepu16_epi32(0xffff, load_bytes<__m256i>(p));
    return Vector<T>(_mm512_maskz_slli_epi32(0xffff, bits, 16));
}
#endif
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

// bf16 by twos, as one vector of the even elements and one of the odd: a shift or a mask apart, where single ones have to
// be spread out and gathered in again.
enum class Half { even, odd };

template <Half kHalf>
LSM_INLINE Vector<float> read_half(Bf16 const* p) {
    Bits const both = load_bytes<Bits>(p);
    return Vector<float>(kHalf == Half::even ? both << 16 : both & 0xffff0000u);
}

LSM_INLINE void write_halves(Bf16* p, Vector<float> even, Vector<float> odd) {
    Bits const both = bf16_pairs(even, odd);
    std::memcpy(p, &both, sizeof(both));
}

// kCount columns, four at most, of as many rows as a vector has lanes.
template <class T, class Element, int kCount>
LSM_INLINE void read_columns_of_vector(Element const* from, Vector<T> (&column)[kCount]) {
    if constexpr (kCount == 1) {
        column[0] = widen(from);
    } else {
        static_assert(kCount == 2 || kCount == 4);
        constexpr int kHalf =
            kCount / 2;  // columns come apart as even and odd ones, by halves of the rows
        Vector<T> first[kHalf], second[kHalf];
        for (int i = 0; i < kHalf; ++i) {
            Element const* const at = from + 2 * i * kLanes<T>;
            first[i] = widen(at), second[i] = widen(at + kLanes<T>);
        }
        if constexpr (kHalf == 1) {
            column[0] = unzip_even<T>(first[0], second[0]);
            column[1] = unzip_odd<T>(first[0], second[0]);
        } else {
            Vector<T> even[kHalf], odd[kHalf];
            for (int i = 0; i < kHalf; ++i) {
                even[i] = unzip_even<T>(first[i], second[i]);
                odd[i] = unzip_odd<T>(first[i], second[i]);
            }
            column[0] = unzip_even<T>(even[0], even[1]), column[2] = unzip_odd<T>(even[0], even[1]);
            column[1] = unzip_even<T>(odd[0], odd[1]), column[3] = unzip_odd<T>(odd[0], odd[1]);
        }
    }
}

// Rows [D, columns] of one tile as columns of `pitch` channels, those behind the last one zero; times scale, a NaN as one
// that rounds to a NaN.
template <class T>
void read_columns(T* to, void const* rows, Dtype dtype, int64_t columns, int64_t channels,
                  int64_t pitch, T scale = 1) {
    auto const taken = [&](Vector<T> x) {
        return x == x ? x * scale : Vector<T>{} + std::numeric_limits<T>::quiet_NaN();
    };
    with_element<T>(dtype, [&](auto element) {
        auto const* from = static_cast<decltype(element) const*>(rows);
        int64_t c = 0;
        auto const by_vector = [&](auto count) {
            for (; c + kLanes<T> <= channels; c += kLanes<T>) {
                Vector<T> column[count];
                read_columns_of_vector<T>(from + c * count, column);
                for (int j = 0; j < count; ++j) store(to + j * pitch + c, taken(column[j]));
            }
        };
        if (columns == 1) by_vector(std::integral_constant<int, 1>{});
        if (columns == 2) by_vector(std::integral_constant<int, 2>{});
        if (columns == 4) by_vector(std::integral_constant<int, 4>{});
        for (; c < pitch; ++c) {
            for (int64_t j = 0; j < columns; ++j) {
                T const x = c < channels ? T(number(from + c * columns + j)) : T(0);
                to[j * pitch + c] = taken(Vector<T>{} + x)[0];
            }
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
    static constexpr bool kPaired = std::is_same_v<Element, Bf16> && kTaps > 0;

    Tile(ConvParams const& p, int64_t first, Arena<T>& arena)
        : p_(p),
          first_(first),
          channels_(min_of(conv_tile_channels(p), p.D - first)),
          pitch_(round_up(conv_tile_channels(p), W) + W) {
        weight_ = arena.take(taps() * pitch_);
        bias_ = arena.take(pitch_);
        sums_ = arena.take((taps() + 1) * pitch_);
    }

    // For the forward, weights and bias are those that silu_of_scaled wants; there are sums for the backward only.
    void begin(bool forward) {
        T const scale = forward && p_.silu ? kSiluScale<T> : T(1);
        read_columns(weight_, element_at(p_.weight, p_.weight_dtype, first_ * p_.W),
                     p_.weight_dtype, p_.W, channels_, pitch_, scale);
        if (p_.bias != nullptr) {
            read_columns(bias_, element_at(p_.bias, p_.weight_dtype, first_), p_.weight_dtype, 1,
                         channels_, pitch_, scale);
        } else {
            fill(bias_, pitch_);
        }
        if (!forward) fill(sums_, (taps() + 1) * pitch_);
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

    // Sums of scaled weights, to the activation's values.
    template <int U>
    LSM_INLINE void activate(Vector<T> (&sum)[U]) const {
        if (!p_.silu) return;
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) sum[u] = silu_of_scaled<Element>(sum[u]);
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

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
