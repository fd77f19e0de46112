// Vectors of one instruction set: the few operations the kernels speak in, over the compiler's
// vector types. Compiled once per tier (tier_*.cpp), each in its own namespace, so that no two
// tiers share a symbol.
#pragma once

#include "tier_headers.h"

#define LSM_INLINE inline __attribute__((always_inline))

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kVectorBytes = LSM_CPU_VECTOR_BYTES;
inline constexpr int kRegisters = LSM_CPU_REGISTERS;

template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VectorTypes;

template <>
struct VectorTypes<float> {
    typedef float Value __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct VectorTypes<double> {
    typedef double Value __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorTypes<T>::Value;
using Bits = VectorTypes<float>::Bits;
using HalfBits = VectorTypes<float>::Half;

template <class V>
LSM_INLINE V load_bytes(void const* p) {
    V x;
    std::memcpy(&x, p, sizeof(V));
    return x;
}

template <class T>
LSM_INLINE Vector<T> load(T const* p) {
    return load_bytes<Vector<T>>(p);
}

template <class T>
LSM_INLINE void store(T* p, Vector<T> x) {
    std::memcpy(p, &x, sizeof(x));
}

LSM_INLINE int64_t min_of(int64_t a, int64_t b) {
    return a < b ? a : b;
}

LSM_INLINE int64_t panels(int64_t columns, int lanes) {
    return (columns + lanes - 1) / lanes;
}

// Halves are added until one lane is left.
template <class T, int kBytes, class V>
LSM_INLINE T sum_lanes_of(V x) {
    if constexpr (kBytes == sizeof(T)) {
        return x[0];
    } else {
        typedef T Half __attribute__((vector_size(kBytes / 2)));
        Half parts[2];
        std::memcpy(parts, &x, sizeof(x));
        return sum_lanes_of<T, kBytes / 2>(parts[0] + parts[1]);
    }
}

template <class T>
LSM_INLINE T sum_lanes(Vector<T> x) {
    return sum_lanes_of<T, kVectorBytes>(x);
}

template <class T, int... kLane>
LSM_INLINE Vector<T> lane_numbers_of(std::integer_sequence<int, kLane...>) {
    return Vector<T>{T(kLane)...};
}

template <class T>
LSM_INLINE Vector<T> lane_numbers() {
    return lane_numbers_of<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

// Lanes of two vectors in turn, their lower halves or their upper ones: a0 b0 a1 b1 ...
template <int kFirst, class V, int... kLane>
LSM_INLINE V zip(V a, V b, std::integer_sequence<int, kLane...>) {
    constexpr int kCount = int(sizeof...(kLane));
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kCount)...);
#else
    using Lane = std::conditional_t<sizeof(V) / kCount == 8, int64_t, int32_t>;
    typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Lanes{(kFirst + kLane / 2 + kLane % 2 * kCount)...});
#endif
}

template <class T>
LSM_INLINE Vector<T> zip_low(Vector<T> a, Vector<T> b) {
    return zip<0>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T>
LSM_INLINE Vector<T> zip_high(Vector<T> a, Vector<T> b) {
    return zip<kLanes<T> / 2>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Every second lane of two vectors that lie side by side.
template <int kFirst, class V, int... kLane>
LSM_INLINE V unzip(V a, V b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * kLane + kFirst)...);
#else
    using Lane = std::conditional_t<sizeof(V) / sizeof...(kLane) == 8, int64_t, int32_t>;
    typedef Lane Lanes __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Lanes{(2 * kLane + kFirst)...});
#endif
}

template <class T>
LSM_INLINE Vector<T> unzip_even(Vector<T> a, Vector<T> b) {
    return unzip<0>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T>
LSM_INLINE Vector<T> unzip_odd(Vector<T> a, Vector<T> b) {
    return unzip<1>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// The sums of as many vectors as each has lanes, as one vector. Destroys x.
template <class T>
LSM_INLINE Vector<T> sum_each(Vector<T> (&x)[kLanes<T>]) {
#pragma GCC unroll 8
    for (int n = kLanes<T> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            x[i] = zip_low<T>(x[i], x[i + n]) + zip_high<T>(x[i], x[i + n]);
        }
    }
    return x[0];
}

// A square of lanes, rows for columns.
template <class T>
LSM_INLINE void transpose(Vector<T> (&x)[kLanes<T>]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int round = 1; round < W; round *= 2) {
        Vector<T> y[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            y[2 * i] = zip_low<T>(x[i], x[i + W / 2]);
            y[2 * i + 1] = zip_high<T>(x[i], x[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) x[i] = y[i];
    }
}

// The sum of the lanes of x[j] in lane j.
template <class T>
LSM_INLINE Vector<T> sums_of_rows(Vector<T> (&x)[kLanes<T>]) {
#pragma GCC unroll 4
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            x[i] = zip_low<T>(x[i], x[i + half]) + zip_high<T>(x[i], x[i + half]);
    }
    return x[0];
}

// x 2^n for |n| < 256 and integer, rounded once where the result is subnormal.
LSM_INLINE Vector<float> scale_by_power_of_two(Vector<float> x, Vector<float> n) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Vector<float>(_mm512_maskz_scalef_ps(0xffff, __m512(x), __m512(n)));
#else
    typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
    Int const e = __builtin_convertvector(n, Int), e0 = e >> 1, e1 = e - e0;
    return x * Vector<float>((e0 + 127) << 23) * Vector<float>((e1 + 127) << 23);
#endif
}

// e^x to about 1 ulp: x = n ln 2 + r, a polynomial in r, times 2^n. e^-inf is 0, and NaN passes
// through: every comparison with it is false.
LSM_INLINE Vector<float> exp(Vector<float> x) {
    using V = Vector<float>;
#if LSM_CPU_VECTOR_BYTES == 64
    // What rounds to 0 is made by a mask: a result below the normal numbers takes many times as long as all of this.
    __mmask16 const some = _mm512_cmp_ps_mask(__m512(x), __m512(V{} - 104.0f), _CMP_NLT_UQ);
#else
    x = x < -110.0f ? V{} - 110.0f : x;
#endif
    x = x > 90.0f ? V{} + 90.0f : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    V const n = (x * 1.44269504088896341f + kRound) - kRound;
    V const r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    V y = V{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
#if LSM_CPU_VECTOR_BYTES == 64
    return V(_mm512_maskz_scalef_ps(some, __m512(y), __m512(n)));
#else
    return scale_by_power_of_two(y, n);
#endif
}

LSM_INLINE Vector<double> exp(Vector<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
    return x;
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
