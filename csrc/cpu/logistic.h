// The logistic function, of a vector in cache the time of a convolution or a gate.
#pragma once

#include "bounded.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// 1 / x for x of at least 1 that is not infinite: of a half's precision, and to about 1 ulp, by a step of Newton's
// where that is a fraction of a division.
LSM_INLINE Vector<float> rough_reciprocal(Vector<float> x) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Vector<float>(_mm512_maskz_rcp14_ps(0xffff, __m512(x)));
#else
    return 1.0f / x;
#endif
}
LSM_INLINE Vector<float> reciprocal(Vector<float> x) {
    Vector<float> const y = rough_reciprocal(x);
    return LSM_CPU_VECTOR_BYTES == 64 ? y + y * (1.0f - x * y) : y;
}

// 2^(i / kPowers), i < kPowers: as many as one instruction finds in a register.
constexpr int kPowers = kVectorBytes == 64 ? 16 : 8;
constexpr float kPowersOfTwo[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f,
                                    1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                    1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

// Entry i mod kPowers for each lane's i.
LSM_INLINE Vector<float> power_of_two(Bits i) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Vector<float>(
        _mm512_maskz_permutexvar_ps(0xffff, __m512i(i), _mm512_loadu_ps(kPowersOfTwo)));
#else
    float table[kPowers];
    for (int j = 0; j < kPowers; ++j) table[j] = kPowersOfTwo[j * (16 / kPowers)];
#if LSM_CPU_VECTOR_BYTES == 32
    return Vector<float>(_mm256_permutevar8x32_ps(__m256(load(table)), __m256i(i)));
#else
    Vector<float> x;
    for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = table[i[lane] % kPowers];
    return x;
#endif
#endif
}

// The integer at or below n, for scale_by_power_of_two, which takes it of n itself with AVX-512.
LSM_INLINE Vector<float> whole(Vector<float> n) {
#if LSM_CPU_VECTOR_BYTES == 64
    return n;
#else
    typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
    Vector<float> const cut =
        __builtin_convertvector(__builtin_convertvector(n, Int), Vector<float>);
    return cut > n ? cut - 1.0f : cut;
#endif
}

// 1 / (1 + e^-x): 12 bits for halves; for float an error of a few ulp, where it is below e^-10 more. e^-x is 2^n times a
// polynomial in r, where n + r = -x log2 e and n is a multiple of 1 / kPowers, so that few terms do.
template <class Element>
LSM_INLINE Vector<float> logistic(Vector<float> x) {
    using V = Vector<float>;
    constexpr float kRound = 12582912.0f / kPowers;  // 1.5 * 2^23 / kPowers: adding it rounds to n
    constexpr float kLog2e = 1.44269504088896341f;
    x = bounded(x, -87.0f, 87.0f);
    V const shifted = x * -kLog2e + kRound, n = shifted - kRound, r = x * -kLog2e - n;
    V const power = power_of_two(Bits(shifted));
    if constexpr (sizeof(Element) == 2) {
        V const y = kPowers == 16 ? V{} + 0.693038744f : r * 0.240225925f + 0.693308815f;
        return rough_reciprocal(scale_by_power_of_two(power * r * y + power, whole(n)) + 1.0f);
    } else {
        V const y = (r * 0.0554962127f + 0.240257626f) * r + 0.693147214f;
        return reciprocal(scale_by_power_of_two(power * r * y + power, whole(n)) + 1.0f);
    }
}

template <class Element>
LSM_INLINE Vector<double> logistic(Vector<double> x) {
    return 1.0 / (1.0 + exp(-x));
}

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
