// Vectors of numbers, real or complex, for code that is written once for both; and the functions of
// them that gates need.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// ---- Functions of real vectors ----

template <class T, class F>
LSM_INLINE Vector<T> each_lane(Vector<T> x, F const& f) {
    for (int i = 0; i < kLanes<T>; ++i) x[i] = f(x[i]);
    return x;
}

template <class T>
LSM_INLINE Vector<T> splat(T x) {
    return Vector<T>{} + x;
}

template <class V>
LSM_INLINE V max_of(V a, V b) {
    return a > b ? a : b;
}

LSM_INLINE Vector<float> sqrt(Vector<float> x) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Vector<float>(_mm512_maskz_sqrt_ps(0xffff, __m512(x)));
#elif LSM_CPU_VECTOR_BYTES == 32
    return Vector<float>(_mm256_sqrt_ps(__m256(x)));
#else
    return each_lane<float>(x, [](float v) { return __builtin_sqrtf(v); });
#endif
}
LSM_INLINE Vector<double> sqrt(Vector<double> x) {
    return each_lane<double>(x, [](double v) { return __builtin_sqrt(v); });
}

LSM_INLINE Vector<double> hyperbolic_tangent(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
    return x;
}
// (1 − e) / (1 + e) with e = e^{−2|x|}; near 0, where that cancels, its series.
LSM_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
    Vector<float> const zero = {}, size = x < zero ? -x : x, e = exp(-2.0f * size), z = x * x;
    Vector<float> series = zero - 17.0f / 315 + z * (62.0f / 2835);
    series = size + size * z * (z * (2.0f / 15 + z * series) - 1.0f / 3);
    Vector<float> const y = size < 0.25f ? series : (1.0f - e) / (1.0f + e);
    return x < zero ? -y : y;
}

// log(1 + e^x), precise where it is small.
LSM_INLINE Vector<float> softplus(Vector<float> x) {
    using V = Vector<float>;
    V const e = exp(x > 0.0f ? -x : x);  // in (0, 1]
    // log1p by its series in s = e / (2 + e), |s| <= 1/3
    V const s = e / (e + 2.0f), z = s * s;
    V y = V{} + 2.0f / 15;
    for (float const c : {2.0f / 13, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
        y = y * z + c;
    return (x > 0.0f ? x : V{}) + y * s;
}
LSM_INLINE Vector<double> softplus(Vector<double> x) {
    return each_lane<double>(
        x, [](double v) { return (v > 0 ? v : 0) + std::log1p(std::exp(v > 0 ? -v : v)); });
}

// log σ(x)
template <class V>
LSM_INLINE V log_sigmoid(V x) {
    return -softplus(-x);
}

template <class V>
LSM_INLINE V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}

// sin and cos of any angle: a multiple of pi / 2 is taken off, in three pieces, and put back as a
// swap and signs. Beyond 8192, where the pieces do not suffice, by the C library.
LSM_INLINE void sin_cos(Vector<float> x, Vector<float>& sine, Vector<float>& cosine) {
    using V = Vector<float>;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    V const shifted = x * 0.636619772367581343f + kRound, n = shifted - kRound;
    Bits const quadrant = Bits(shifted);
    V const r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
    V const z = r * r;
    V const s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * (z * r) + r;
    V const c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) *
                    (z * z) -
                0.5f * z + 1.0f;
    auto const odd = (quadrant & 1) != 0;
    sine = V(Bits(odd ? c : s) ^ ((quadrant & 2) << 30));
    cosine = V(Bits(odd ? s : c) ^ (((quadrant + 1) & 2) << 30));
    for (int i = 0; i < kLanes<float>; ++i) {
        if (!(x[i] > -8192.0f && x[i] < 8192.0f)) {
            sine[i] = std::sin(x[i]), cosine[i] = std::cos(x[i]);
        }
    }
}
LSM_INLINE void sin_cos(Vector<double> x, Vector<double>& sine, Vector<double>& cosine) {
    for (int i = 0; i < kLanes<double>; ++i) sine[i] = std::sin(x[i]), cosine[i] = std::cos(x[i]);
}

// ---- Numbers ----

template <class T>
struct Real {
    using Component = T;
    static constexpr int kComponents = 1;
    Vector<T> re;
};

template <class T>
struct Complex {
    using Component = T;
    static constexpr int kComponents = 2;
    Vector<T> re, im;
};

template <class T>
LSM_INLINE Real<T> operator+(Real<T> a, Real<T> b) {
    return {a.re + b.re};
}
template <class T>
LSM_INLINE Real<T> operator*(Real<T> a, Real<T> b) {
    return {a.re * b.re};
}
template <class T>
LSM_INLINE Real<T> conj(Real<T> a) {
    return a;
}
template <class T>
LSM_INLINE Real<T> exp(Real<T> a) {
    return {exp(a.re)};
}

template <class T>
LSM_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
    return {a.re + b.re, a.im + b.im};
}
template <class T>
LSM_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
LSM_INLINE Complex<T> conj(Complex<T> a) {
    return {a.re, -a.im};
}
template <class T>
LSM_INLINE Complex<T> exp(Complex<T> a) {
    Vector<T> s{}, c{};
    sin_cos(a.im, s, c);
    Vector<T> const r = exp(a.re);
    return {r * c, r * s};
}

template <class N>
LSM_INLINE N one() {
    N x{};
    x.re = x.re + 1;
    return x;
}

// `count` numbers from memory, whose components are In; the other lanes are zero.
template <class N, class In>
LSM_INLINE N read(In const* p, int64_t count) {
    using T = typename N::Component;
    constexpr int W = kLanes<T>;
    if constexpr (N::kComponents == 1) {
        return {count == W ? widen(p) : widen_first<T>(p, count)};
    } else {
        In full[2 * W] = {};
        if (count != W) {
            for (int64_t i = 0; i < 2 * count; ++i) full[i] = p[i];
            p = full;
        }
        Vector<T> const a = widen(p), b = widen(p + W);
        constexpr auto kSequence = std::make_integer_sequence<int, W>{};
        return {unzip<0>(a, b, kSequence), unzip<1>(a, b, kSequence)};
    }
}

template <class N, class Out>
LSM_INLINE void write(Out* p, N x, int64_t count) {
    using T = typename N::Component;
    constexpr int W = kLanes<T>;
    if constexpr (N::kComponents == 1) {
        if (count == W) {
            narrow(p, x.re);
        } else {
            narrow_first<T>(p, x.re, count);
        }
    } else {
        Vector<T> const low = zip_low<T>(x.re, x.im), high = zip_high<T>(x.re, x.im);
        if (count == W) {
            narrow(p, low), narrow(p + W, high);
        } else {
            Out full[2 * W];
            narrow(full, low), narrow(full + W, high);
            for (int64_t i = 0; i < 2 * count; ++i) p[i] = full[i];
        }
    }
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
