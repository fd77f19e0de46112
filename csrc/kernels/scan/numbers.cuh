// Numbers of a scan, real or complex, and the neighbouring channels that one lane owns.
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"

namespace lsm {

struct alignas(8) Complex {
    float re, im;
};

LSM_DEVICE float conj(float a) {
    return a;
}
LSM_DEVICE Complex conj(Complex a) {
    return {a.re, -a.im};
}
LSM_DEVICE float multiply(float a, float b) {
    return a * b;
}
LSM_DEVICE Complex multiply(Complex a, Complex b) {
    return {fmaf(-a.im, b.im, a.re * b.re), fmaf(a.im, b.re, a.re * b.im)};
}
LSM_DEVICE float add(float a, float b) {
    return a + b;
}
LSM_DEVICE Complex add(Complex a, Complex b) {
    return {a.re + b.re, a.im + b.im};
}
// a b + c
LSM_DEVICE float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}
LSM_DEVICE Complex multiply_add(Complex a, Complex b, Complex c) {
    return {fmaf(-a.im, b.im, fmaf(a.re, b.re, c.re)), fmaf(a.im, b.re, fmaf(a.re, b.im, c.im))};
}

// expf, not a fast approximation: thousands of these factors are multiplied into one state.
LSM_DEVICE float exponential(float x) {
    return expf(x);
}

LSM_DEVICE float sigmoid(float x) {
    return __fdividef(1.f, 1.f + expf(-x));
}

// sin and cos without the slow path of the library's, whose table lies in local memory: a multiple of pi / 2 is taken
// off in three pieces, and put back as a swap and signs. Angles of thousands of turns lose what fp32 lost before.
LSM_DEVICE Complex exponential(Complex x) {
    float const n = rintf(x.im * 0.636619772f);
    float r = fmaf(n, -1.57079601f, x.im);
    r = fmaf(n, -3.13916473e-7f, r);
    r = fmaf(n, -5.39030253e-15f, r);
    float const z = r * r;
    float s = fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f);
    s = fmaf(s * z, r, r);
    float c =
        fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
    c = fmaf(c, z * z, fmaf(-0.5f, z, 1.f));
    int const quadrant = __float2int_rn(n);
    float const cosine = quadrant & 1 ? s : c, sine = quadrant & 1 ? c : s, m = expf(x.re);
    return {(quadrant + 1) & 2 ? -m * cosine : m * cosine, quadrant & 2 ? -m * sine : m * sine};
}

template <class V>
LSM_DEVICE V number(float x);
template <>
LSM_DEVICE float number<float>(float x) {
    return x;
}
template <>
LSM_DEVICE Complex number<Complex>(float x) {
    return {x, 0.f};
}

// The channels of one lane, kChannels neighbours of type T in memory, V in registers.
template <class T>
struct Lane;

template <class T>
struct HalfLane {
    using V = float;
    using Raw = u32;
    static constexpr int kChannels = 2;
    LSM_DEVICE static void store(T* p, V const (&x)[2]) {
        store_global(reinterpret_cast<Raw*>(p), pack(x[0], x[1], static_cast<T*>(nullptr)));
    }
};

template <>
struct Lane<bf16> : HalfLane<bf16> {
    LSM_DEVICE static void unpack(Raw raw, V (&x)[2]) {
        x[0] = __uint_as_float(raw << 16), x[1] = __uint_as_float(raw & 0xffff0000u);
    }
};

template <>
struct Lane<half> : HalfLane<half> {
    LSM_DEVICE static void unpack(Raw raw, V (&x)[2]) {
        float2 const pair = __half22float2(reinterpret_cast<__half2 const&>(raw));
        x[0] = pair.x, x[1] = pair.y;
    }
};

template <>
struct Lane<float> {
    using V = float;
    using Raw = float2;
    static constexpr int kChannels = 2;
    LSM_DEVICE static void unpack(Raw raw, V (&x)[2]) { x[0] = raw.x, x[1] = raw.y; }
    LSM_DEVICE static void store(float* p, V const (&x)[2]) {
        store_global(reinterpret_cast<Raw*>(p), Raw{x[0], x[1]});
    }
};

template <>
struct Lane<Complex> {
    using V = Complex;
    using Raw = float2;
    static constexpr int kChannels = 1;
    LSM_DEVICE static void unpack(Raw raw, V (&x)[1]) { x[0] = {raw.x, raw.y}; }
    LSM_DEVICE static void store(Complex* p, V const (&x)[1]) {
        store_global(reinterpret_cast<Raw*>(p), Raw{x[0].re, x[0].im});
    }
};

template <class T>
LSM_DEVICE void load_lane(T const* p, typename Lane<T>::V (&x)[Lane<T>::kChannels]) {
    Lane<T>::unpack(load_global(reinterpret_cast<typename Lane<T>::Raw const*>(p)), x);
}

// f(type_identity<T>) with T what a real operator's tensors are of.
template <class F>
int64_t with_element(Dtype dtype, F const& f) {
    switch (dtype) {
        case Dtype::bf16:
            return f(std::type_identity<bf16>{});
        case Dtype::f16:
            return f(std::type_identity<half>{});
        default:
            return f(std::type_identity<float>{});
    }
}

}  // namespace lsm
