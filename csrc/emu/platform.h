// CUDA's names for the host compiler, and the host side of kernels/platform.cuh. Included before
// any CUDA or CUTLASS header. Everything here is a thin call into emu.h.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emu/emu.h"

// A static __shared__ variable would silently become a local of each fiber, so it does not compile.
#undef __shared__
#define __shared__ lsm_static_shared_memory_is_not_supported_use_dyn_smem
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __constant__
#define __constant__
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#undef __grid_constant__
#define __grid_constant__
#undef __restrict__
#define __restrict__ __restrict

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// CuTe fills tensor maps only for a compiler that says it is nvcc 12 or later, and then calls the
// driver's function, which the emulator defines.
#ifndef __CUDACC_VER_MAJOR__
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#endif
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1

// CuTe then asks us for shared addresses instead of printing an error.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline std::size_t __cvta_generic_to_shared(void const* pointer) {
    return lsm::emu::shared_offset(pointer);
}
inline void* __cvta_shared_to_generic(std::size_t offset) {
    return lsm::emu::shared_base() + (offset - lsm::emu::kSharedWindow);
}

// ---- Barriers, fences ----

inline void __syncthreads() {
    lsm::emu::syncthreads(lsm::emu::Reduce::none, 0);
}
inline int __syncthreads_count(int p) {
    return lsm::emu::syncthreads(lsm::emu::Reduce::count, p);
}
inline int __syncthreads_and(int p) {
    return lsm::emu::syncthreads(lsm::emu::Reduce::all, p);
}
inline int __syncthreads_or(int p) {
    return lsm::emu::syncthreads(lsm::emu::Reduce::any, p);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    lsm::emu::syncwarp(mask);
}
inline void __threadfence() {
    lsm::emu::threadfence();
}
inline void __threadfence_block() {
    lsm::emu::threadfence();
}
inline void __threadfence_system() {
    lsm::emu::threadfence();
}
inline void __nanosleep(unsigned) {
    lsm::emu::yield();
}
[[noreturn]] inline void __trap() {
    lsm::emu::fail("__trap() was executed");
}

// ---- Shuffles, votes, reductions ----

namespace lsm::emu {

template <class T>
__forceinline__ T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
    u64 bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, operand, width);
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

template <class T>
u32 reduce_value(WarpReduce kind, unsigned mask, T value) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
    return warp_reduce(kind, std::is_signed_v<T>, mask, static_cast<u32>(value));
}

}  // namespace lsm::emu

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return lsm::emu::shuffle_value(lsm::emu::Shuffle::index, mask, value, source, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return lsm::emu::shuffle_value(lsm::emu::Shuffle::up, mask, value, static_cast<int>(delta),
                                   width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return lsm::emu::shuffle_value(lsm::emu::Shuffle::down, mask, value, static_cast<int>(delta),
                                   width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return lsm::emu::shuffle_value(lsm::emu::Shuffle::exclusive_or, mask, value, lanes, width);
}

inline int __any_sync(unsigned mask, int p) {
    return lsm::emu::vote(lsm::emu::Vote::any, mask, p != 0);
}
inline int __all_sync(unsigned mask, int p) {
    return lsm::emu::vote(lsm::emu::Vote::all, mask, p != 0);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
    return lsm::emu::vote(lsm::emu::Vote::ballot, mask, p != 0);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    static_assert(std::is_integral_v<T>);
    return lsm::emu::match_any(mask, static_cast<uint64_t>(value));
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
    return static_cast<T>(lsm::emu::reduce_value(lsm::emu::WarpReduce::add, mask, v));
}
template <class T>
T __reduce_min_sync(unsigned mask, T v) {
    return static_cast<T>(lsm::emu::reduce_value(lsm::emu::WarpReduce::minimum, mask, v));
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) {
    return static_cast<T>(lsm::emu::reduce_value(lsm::emu::WarpReduce::maximum, mask, v));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) {
    return lsm::emu::warp_reduce(lsm::emu::WarpReduce::bit_and, false, mask, v);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
    return lsm::emu::warp_reduce(lsm::emu::WarpReduce::bit_or, false, mask, v);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) {
    return lsm::emu::warp_reduce(lsm::emu::WarpReduce::bit_xor, false, mask, v);
}

// ---- Atomics, on shared and global memory alike ----

namespace lsm::emu {

template <class T>
constexpr Number number_of() {
    if constexpr (std::is_same_v<T, int>) {
        return Number::i32;
    } else if constexpr (std::is_same_v<T, unsigned>) {
        return Number::u32;
    } else if constexpr (std::is_integral_v<T> && std::is_unsigned_v<T> && sizeof(T) == 8) {
        return Number::u64;
    } else if constexpr (std::is_same_v<T, float>) {
        return Number::f32;
    } else if constexpr (std::is_same_v<T, __half2>) {
        return Number::f16x2;
    } else if constexpr (std::is_same_v<T, __nv_bfloat162>) {
        return Number::bf16x2;
    } else {
        static_assert(std::is_same_v<T, double>, "no such atomic in CUDA");
        return Number::f64;
    }
}

template <class T>
__forceinline__ T atomic_value(Atomic operation, T* address, T value, T compare = T{}) {
    u64 v = 0, c = 0;
    std::memcpy(&v, &value, sizeof(T));
    std::memcpy(&c, &compare, sizeof(T));
    v = atomic(operation, number_of<T>(), address, v, c);
    std::memcpy(static_cast<void*>(&value), &v, sizeof(T));
    return value;
}

}  // namespace lsm::emu

template <class T>
__forceinline__ T atomicAdd(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::add, p, v);
}
template <class T>
__forceinline__ T atomicMin(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::minimum, p, v);
}
template <class T>
__forceinline__ T atomicMax(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::maximum, p, v);
}
template <class T>
__forceinline__ T atomicAnd(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::bit_and, p, v);
}
template <class T>
__forceinline__ T atomicOr(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::bit_or, p, v);
}
template <class T>
__forceinline__ T atomicXor(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::bit_xor, p, v);
}
template <class T>
__forceinline__ T atomicExch(T* p, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::exchange, p, v);
}
template <class T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v) {
    return lsm::emu::atomic_value<T>(lsm::emu::Atomic::compare_exchange, p, v, compare);
}
inline unsigned atomicInc(unsigned* p, unsigned v) {
    return lsm::emu::atomic_value<unsigned>(lsm::emu::Atomic::increment, p, v);
}
inline unsigned atomicDec(unsigned* p, unsigned v) {
    return lsm::emu::atomic_value<unsigned>(lsm::emu::Atomic::decrement, p, v);
}

// ---- Arithmetic ----

inline float __expf(float x) {
    return std::exp(x);
}
inline float __exp10f(float x) {
    return std::pow(10.0f, x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __log2f(float x) {
    return std::log2(x);
}
inline float __sinf(float x) {
    return std::sin(x);
}
inline float __cosf(float x) {
    return std::cos(x);
}
inline float __powf(float x, float y) {
    return std::pow(x, y);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
    return std::sqrt(x);
}
inline float __frsqrt_rn(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __saturatef(float x) {
    return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
    return 1.0 / std::sqrt(x);
}

inline unsigned __float_as_uint(float x) {
    return std::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
    return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned x) {
    return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
    return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
    return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return std::bit_cast<double>(x);
}
inline int __float2int_rn(float x) {
    return static_cast<int>(std::nearbyint(x));
}
inline int __float2int_rz(float x) {
    return static_cast<int>(x);
}
inline int __float2int_rd(float x) {
    return static_cast<int>(std::floor(x));
}
inline int __float2int_ru(float x) {
    return static_cast<int>(std::ceil(x));
}
inline float __int2float_rn(int x) {
    return static_cast<float>(x);
}

inline int __popc(unsigned x) {
    return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
    return std::popcount(x);
}
inline int __clz(int x) {
    return std::countl_zero(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
    return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i);
    return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t const bytes = (static_cast<uint64_t>(y) << 32) | x;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned const s = selector >> (4 * i);
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        r |= byte << (8 * i);
    }
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (n & 31));
}
inline int __mul24(int a, int b) {
    return a * b;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i)
        c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
    return c;
}

// CUDA's global min and max, for every pair of one arithmetic type.
template <class T>
    requires std::is_arithmetic_v<T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
    requires std::is_arithmetic_v<T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

// ---- Loads and stores with a cache policy ----

template <class T>
__forceinline__ T __ldg(T const* p) {
    lsm::emu::note_global(p, sizeof(T), false);
    return *p;
}
template <class T>
__forceinline__ T __ldcs(T const* p) {
    return __ldg(p);
}
template <class T>
__forceinline__ T __ldcg(T const* p) {
    return __ldg(p);
}
template <class T>
__forceinline__ void __stcs(T* p, T value) {
    lsm::emu::note_global(p, sizeof(T), true);
    *p = value;
}
template <class T>
__forceinline__ void __stcg(T* p, T value) {
    __stcs(p, value);
}

// ---- The host side of kernels/platform.cuh ----

namespace lsm {

inline char* dyn_smem() {
    return emu::shared_base();
}

inline uint32_t smem_u32(void const* p) {
    return emu::shared_offset(p);
}

template <class T2>
uint32_t bits_of(T2 const& pair) {
    uint32_t bits;
    std::memcpy(&bits, &pair, 4);
    return bits;
}

inline uint32_t pack(float low, float high, __nv_bfloat16*) {
    return bits_of(__floats2bfloat162_rn(low, high));
}
inline uint32_t pack(float low, float high, __half*) {
    return bits_of(__floats2half2_rn(low, high));
}

inline float exp2_approx(float x) {
    float const y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

template <class T>
__forceinline__ T load_global(T const* p) {
    emu::note_global(p, sizeof(T), false);
    return *p;
}

template <class T>
__forceinline__ void store_global(T* p, std::type_identity_t<T> value) {
    emu::note_global(p, sizeof(T), true);
    *p = value;
}

template <class T>
__forceinline__ T load_shared(T const* p) {
    T value;
    emu::load_shared(&value, p, sizeof(T));
    return value;
}

template <class T>
__forceinline__ void store_shared(T* p, std::type_identity_t<T> value) {
    emu::store_shared(p, &value, sizeof(T));
}

inline void cp_async16(uint32_t destination, void const* source, bool valid) {
    emu::cp_async(destination, source, 16, valid ? 16 : 0);
}

inline void cp_async4(uint32_t destination, void const* source, bool valid) {
    emu::cp_async(destination, source, 4, valid ? 4 : 0);
}

inline void cp_async_commit() {
    emu::cp_async_commit();
}

template <int Pending>
void cp_async_wait() {
    if constexpr (Pending == 0) {
        emu::cp_async_wait_all();
    } else {
        emu::cp_async_wait(Pending);
    }
}

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem_bytes, void*,
            P... params) {
    auto body = [&] { kernel(params...); };
    emu::launch(
        {grid, block, smem_bytes, reinterpret_cast<void const*>(kernel)},
        [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
}

template <class... P>
void launch_together(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem_bytes, void*,
                     P... params) {
    auto body = [&] { kernel(params...); };
    emu::launch(
        {grid, block, smem_bytes, reinterpret_cast<void const*>(kernel), true},
        [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
}

template <class... P>
int blocks_together(void (*)(P...), dim3 block, std::size_t) {
    return emu::blocks_together(block.x * block.y * block.z);
}

inline int multiprocessors() {
    return emu::multiprocessors();
}

}  // namespace lsm
