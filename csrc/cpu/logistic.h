// The logistic function, of a vector in cache the time of a convolution or a gate.
#pragma once

#include "bounded.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr double kLog2e = 1.44269504088896340736;

#if LSM_CPU_VECTOR_BYTES == 64

alignas(64) constexpr float kPowersOfTwo[32] = {  // 2^(i / 32)
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// The smaller of x and 126, for which 2^x is finite; NaN passes.
LSM_INLINE Vector<float> finite_exponent(Vector<float> x) {
    return Vector<float>(_mm512_maskz_min_ps(0xffff, __m512(Vector<float>{} + 126.0f), __m512(x)));
}

// scale (1 + 2^z) for z of at most 126: to 15 bits for halves, for float to about 2 ulp. 2^z is that of the multiple of
// 1 / 32 at or below z, by a table, times a polynomial in the rest; the scaling takes the integer below z by itself.
template <class Element>
LSM_INLINE Vector<float> one_and_power(Vector<float> z, float scale) {
    using V = Vector<float>;
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    constexpr float kRound = 12582912.0f / 32;  // 1.5 * 2^23 / 32: adding it rounds to 1 / 32
    __m512i const index = _mm512_castps_si512(
        _mm512_maskz_add_round_ps(0xffff, __m512(z), __m512(V{} + kRound), kDown));
    V const rest = V(_mm512_maskz_reduce_ps(0xffff, __m512(z), 5 << 4 | kDown));
    __m512 const power = _mm512_maskz_permutex2var_ps(0xffff, _mm512_load_ps(kPowersOfTwo), index,
                                                      _mm512_load_ps(kPowersOfTwo + 16));
    V y = {};
    if constexpr (sizeof(Element) == 2) {
        y = rest * (scale * 0.700688209f) + scale * 0.999970676f;
    } else {
        y = (rest * (scale * 0.24265269f) + scale * 0.69312373f) * rest + scale;
    }
    return scale_by_power_of_two(V(power), z) * y + scale;
}

// x / y, to 12 bits for halves, for float to about 2 ulp; y is finite.
template <class Element>
LSM_INLINE Vector<float> quotient(Vector<float> x, Vector<float> y) {
    Vector<float> const rough = Vector<float>(_mm512_maskz_rcp14_ps(0xffff, __m512(y)));
    return sizeof(Element) == 2 ? x * rough : x * rough * (2.0f - y * rough);
}

// 1 / (1 + e^-x), not below 2^-126; where it is below e^-10, the rounding of x log2 e adds a few ulp.
template <class Element>
LSM_INLINE Vector<float> logistic(Vector<float> x) {
    using V = Vector<float>;
    V const z = finite_exponent(x * -float(kLog2e));
    return quotient<Element>(V{} + 1.0f, one_and_power<Element>(z, 1.0f));
}

// x / (1 + e^-x) of z = kSiluScale x, which spares the product with log2 e.
template <class T>
constexpr T kSiluScale = std::is_same_v<T, float> ? T(-kLog2e) : T(1);

template <class Element>
LSM_INLINE Vector<float> silu_of_scaled(Vector<float> z) {
    z = finite_exponent(z);
    return quotient<Element>(z, one_and_power<Element>(z, kSiluScale<float>));
}

#else

// 2^(i / kPowers), i < kPowers: as many as one instruction finds in a register.
constexpr int kPowers = 8;
constexpr float kPowersOfTwo[kPowers] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                         1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};

// Entry i mod kPowers for each lane's i.
LSM_INLINE Vector<float> power_of_two(Bits i) {
#if LSM_CPU_VECTOR_BYTES == 32
    return Vector<float>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(kPowersOfTwo), __m256i(i)));
#else
    Vector<float> x;
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = kPowersOfTwo[i[lane] % kPowers];
    return x;
#endif
}

// The integer at or below n.
LSM_INLINE Vector<float> whole(Vector<float> n) {
    typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
    Vector<float> const cut =
        __builtin_convertvector(__builtin_convertvector(n, Int), Vector<float>);
    return cut > n ? cut - 1.0f : cut;
}

// 1 / (1 + e^-x): 12 bits for halves; for float an error of a few ulp, where it is below e^-10 more. e^-x is 2^n times a
// polynomial in r, where n + r = -x log2 e and n is a multiple of 1 / kPowers, so that few terms do.
template <class Element>
LSM_INLINE Vector<float> logistic(Vector<float> x) {
    using V = Vector<float>;
    constexpr float kRound = 12582912.0f / kPowers;  // 1.5 * 2^23 / kPowers: adding it rounds to n
    x = bounded(x, -87.0f, 87.0f);
    V const shifted = x * -float(kLog2e) + kRound, n = shifted - kRound, r = x * -float(kLog2e) - n;
    V const power = power_of_two(Bits(shifted));
    V y = {};
    if constexpr (sizeof(Element) == 2) {
        y = r * 0.240225926f + 0.693308815f;
    } else {
        y = (r * 0.0554962127f + 0.240257626f) * r + 0.693147214f;
    }
    return 1.0f / (scale_by_power_of_two(power * r * y + power, whole(n)) + 1.0f);
}

template <class T>
constexpr T kSiluScale = T(1);

template <class Element>
LSM_INLINE Vector<float> silu_of_scaled(Vector<float> x) {
    return x * logistic<Element>(x);
}

#endif

template <class Element>
LSM_INLINE Vector<double> logistic(Vector<double> x) {
    return 1.0 / (1.0 + exp(-x));
}

template <class Element>
LSM_INLINE Vector<double> silu_of_scaled(Vector<double> x) {
    return x * logistic<Element>(x);
}

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
