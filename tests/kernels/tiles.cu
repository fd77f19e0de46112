// Instructions against plain loops, over CUTLASS's own fragment layouts where it has them.
#include "harness.h"
#include "kernels/matrix.cuh"

#include <cute/tensor.hpp>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace lsm::test {
namespace {

uint32_t next_random(uint32_t& state) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

// ---- mma: the fragment maps come from cute::MMA_Traits, which knows nothing of the emulator ----

template <class Op, class Element, class Accumulator>
__global__ void multiply(Element const* a, Element const* b, Accumulator* d) {
    using Traits = cute::MMA_Traits<Op>;
    using Shape = typename Traits::Shape_MNK;
    constexpr int M = cute::size<0>(Shape{}), N = cute::size<1>(Shape{}),
                  K = cute::size<2>(Shape{});
    constexpr int kA = M * K / 32, kB = N * K / 32;
    int const lane = static_cast<int>(threadIdx.x);
    alignas(16) Element fa[kA], fb[kB];
    Accumulator fd[4];
    // CuTe numbers the elements of A and B column-major: index = row + rows * k.
    for (int i = 0; i < kA; ++i) {
        int const at = static_cast<int>(typename Traits::ALayout{}(lane, i));
        fa[i] = a[at % M * K + at / M];
    }
    for (int i = 0; i < kB; ++i) {
        int const at = static_cast<int>(typename Traits::BLayout{}(lane, i));
        fb[i] = b[at % N * K + at / N];
    }
    for (int i = 0; i < 4; ++i) {
        int const at = static_cast<int>(typename Traits::CLayout{}(lane, i));
        fd[i] = d[at % M * N + at / M];
    }
    u32 ra[sizeof fa / 4], rb[sizeof fb / 4];
    memcpy(ra, fa, sizeof fa);
    memcpy(rb, fb, sizeof fb);
    if constexpr (sizeof fa == 16) {
        Op::fma(fd[0], fd[1], fd[2], fd[3], ra[0], ra[1], ra[2], ra[3], rb[0], rb[1], fd[0], fd[1],
                fd[2], fd[3]);
    } else {
        Op::fma(fd[0], fd[1], fd[2], fd[3], ra[0], ra[1], rb[0], fd[0], fd[1], fd[2], fd[3]);
    }
    for (int i = 0; i < 4; ++i) {
        int const at = static_cast<int>(typename Traits::CLayout{}(lane, i));
        d[at % M * N + at / M] = fd[i];
    }
}

template <class Op, class Element, class Accumulator, class Make, class Value>
void check_mma(Make make, Value value) {
    using Shape = typename cute::MMA_Traits<Op>::Shape_MNK;
    constexpr int M = cute::size<0>(Shape{}), N = cute::size<1>(Shape{}),
                  K = cute::size<2>(Shape{});
    std::vector<Element> a(M * K), b(N * K);
    std::vector<Accumulator> d(M * N), expected(M * N);
    uint32_t state = 1;
    for (auto& e : a) e = make(next_random(state));
    for (auto& e : b) e = make(next_random(state));
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            auto& e = expected[m * N + n];
            e = d[m * N + n] = static_cast<Accumulator>(m - n);
            for (int k = 0; k < K; ++k)
                e += static_cast<Accumulator>(value(a[m * K + k]) * value(b[n * K + k]));
        }
    }
    emu::set_seed(2);
    launch(multiply<Op, Element, Accumulator>, dim3(1), dim3(32), 0, nullptr,
           static_cast<Element const*>(a.data()), static_cast<Element const*>(b.data()), d.data());
    // Small integers: exact in every format and in any order of summation.
    for (int i = 0; i < M * N; ++i)
        require(d[i] == expected[i], "element ", i, ": ", d[i], " != ", expected[i]);
    require(last_counters().mma_flops == uint64_t{2} * M * N * K, "flops ",
            last_counters().mma_flops);
}

float small(uint32_t r) {
    return static_cast<float>(static_cast<int>(r % 17) - 8);
}
template <class T>
T make_float(uint32_t r) {
    return T(small(r));
}
template <class T>
float to_float(T x) {
    return static_cast<float>(x);
}

#define LSM_MMA_CASE(name, op, Element)                                      \
    Case const mma_##name("mma/" #name, [] {                                 \
        check_mma<cute::op, cute::Element, float>(make_float<cute::Element>, \
                                                  to_float<cute::Element>);  \
    });
LSM_MMA_CASE(m16n8k8_bf16, SM80_16x8x8_F32BF16BF16F32_TN, bfloat16_t)
LSM_MMA_CASE(m16n8k16_bf16, SM80_16x8x16_F32BF16BF16F32_TN, bfloat16_t)
LSM_MMA_CASE(m16n8k8_f16, SM80_16x8x8_F32F16F16F32_TN, half_t)
LSM_MMA_CASE(m16n8k16_f16, SM80_16x8x16_F32F16F16F32_TN, half_t)
LSM_MMA_CASE(m16n8k4_tf32, SM80_16x8x4_F32TF32TF32F32_TN, tfloat32_t)
LSM_MMA_CASE(m16n8k8_tf32, SM80_16x8x8_F32TF32TF32F32_TN, tfloat32_t)
#undef LSM_MMA_CASE
int8_t make_int8(uint32_t r) {
    return static_cast<int8_t>(r);
}
uint32_t int8_value(int8_t x) {
    return static_cast<uint32_t>(static_cast<int>(x));
}
Case const mma_s8_k16("mma/m16n8k16_s8", [] {
    check_mma<cute::SM80_16x8x16_S32S8S8S32_TN, int8_t, uint32_t>(make_int8, int8_value);
});
Case const mma_s8_k32("mma/m16n8k32_s8", [] {
    check_mma<cute::SM80_16x8x32_S32S8S8S32_TN, int8_t, uint32_t>(make_int8, int8_value);
});

__global__ void multiply_halves(u32 const* a, float* d) {
    float fd[4] = {};
    u32 const fa[4] = {a[0], a[0], a[0], a[0]};
    mma_16x8x16(fd, fa, 0x3c00u, 0,
                static_cast<half const*>(nullptr));  // b: 1 at the even k of the first half
    d[threadIdx.x] = fd[0];
}
Case const all_halves("mma/every_f16_value", [] {
    // d = 4 a: one 1.0 in each of four k positions.
    for (u32 bits = 0; bits < 0x10000; bits += bits < 0x800 || bits > 0x7b00 ? 1 : 37) {
        std::vector<float> d(32);
        std::vector<u32> a{bits};
        launch(multiply_halves, dim3(1), dim3(32), 0, nullptr, static_cast<u32 const*>(a.data()),
               d.data());
        float const x = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        // An infinity meets the zeros of b.
        bool const same = std::isfinite(x) ? d[0] == 4 * x : std::isnan(d[0]);
        require(same, "bits ", bits, ": ", d[0], " for ", x);
    }
});

// ---- ldmatrix, stmatrix, movmatrix ----

constexpr int kPitch =
    24;  // elements; 48 bytes, so rows are 16-byte aligned and in different banks

template <int kMatrices, bool kTransposed>
__global__ void load_store(uint16_t const* x, uint16_t* loaded, uint16_t* stored) {
    uint16_t* const tile = reinterpret_cast<uint16_t*>(dyn_smem());
    uint16_t* const copy = tile + 32 * kPitch;
    int const lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < kPitch; ++i)
        tile[lane * kPitch + i] = x[lane * kPitch + i], copy[lane * kPitch + i] = 0;
    __syncwarp();
    auto const& source = *reinterpret_cast<cute::uint128_t const*>(tile + lane * kPitch + 8);
    auto& target = *reinterpret_cast<cute::uint128_t*>(copy + lane * kPitch + 8);
    u32 r[kMatrices];
    if constexpr (kMatrices == 1) {
        std::conditional_t<kTransposed, cute::SM75_U16x2_LDSM_T, cute::SM75_U32x1_LDSM_N>::copy(
            source, r[0]);
        std::conditional_t<kTransposed, cute::SM90_U16x2_STSM_T, cute::SM90_U32x1_STSM_N>::copy(
            r[0], target);
    } else if constexpr (kMatrices == 2) {
        std::conditional_t<kTransposed, cute::SM75_U16x4_LDSM_T, cute::SM75_U32x2_LDSM_N>::copy(
            source, r[0], r[1]);
        std::conditional_t<kTransposed, cute::SM90_U16x4_STSM_T, cute::SM90_U32x2_STSM_N>::copy(
            r[0], r[1], target);
    } else {
        std::conditional_t<kTransposed, cute::SM75_U16x8_LDSM_T, cute::SM75_U32x4_LDSM_N>::copy(
            source, r[0], r[1], r[2], r[3]);
        std::conditional_t<kTransposed, cute::SM90_U16x8_STSM_T, cute::SM90_U32x4_STSM_N>::copy(
            r[0], r[1], r[2], r[3], target);
    }
    __syncwarp();
    for (int i = 0; i < kMatrices; ++i) {
        loaded[(lane * kMatrices + i) * 2] = static_cast<uint16_t>(r[i]);
        loaded[(lane * kMatrices + i) * 2 + 1] = static_cast<uint16_t>(r[i] >> 16);
    }
    for (int i = 0; i < 8; ++i) stored[lane * 8 + i] = copy[lane * kPitch + 8 + i];
}

template <int kMatrices, bool kTransposed>
void check_matrices() {
    std::vector<uint16_t> x(32 * kPitch), loaded(64 * kMatrices), stored(256);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
    emu::set_seed(2);
    launch(load_store<kMatrices, kTransposed>, dim3(1), dim3(32), 32 * kPitch * 4, nullptr,
           static_cast<uint16_t const*>(x.data()), loaded.data(), stored.data());
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < kMatrices; ++i) {
            for (int e = 0; e < 2; ++e) {
                int const row = kTransposed ? lane % 4 * 2 + e : lane / 4;
                int const column = kTransposed ? lane / 4 : lane % 4 * 2 + e;
                int const got = loaded[static_cast<std::size_t>((lane * kMatrices + i) * 2 + e)];
                int const expected = (8 * i + row) * kPitch + 8 + column;
                require(got == expected, "lane ", lane, " matrix ", i, ": ", got, " != ", expected);
            }
        }
    }
    for (int row = 0; row < 32; ++row) {
        for (int c = 0; c < 8; ++c) {
            int const got = stored[static_cast<std::size_t>(row * 8 + c)];
            int const expected = row < 8 * kMatrices ? row * kPitch + 8 + c : 0;
            require(got == expected, "stored row ", row, ": ", got, " != ", expected);
        }
    }
}
Case const x1("matrix/x1", check_matrices<1, false>);
Case const x2("matrix/x2", check_matrices<2, false>);
Case const x4("matrix/x4", check_matrices<4, false>);
Case const x1_trans("matrix/x1_trans", check_matrices<1, true>);
Case const x2_trans("matrix/x2_trans", check_matrices<2, true>);
Case const x4_trans("matrix/x4_trans", check_matrices<4, true>);

__global__ void transpose_registers(u32* y) {
    u32 const lane = threadIdx.x, element = lane / 4 * 8 + lane % 4 * 2;
    u32 r = 0;
    cute::SM75_U32x1_MOVM_T::copy(element | (element + 1) << 16, r);
    y[lane] = r;
}
Case const movm("matrix/movmatrix", [] {
    std::vector<u32> y(32);
    launch(transpose_registers, dim3(1), dim3(32), 0, nullptr, y.data());
    for (u32 lane = 0; lane < 32; ++lane) {
        u32 const row = lane % 4 * 2, column = lane / 4;
        require(y[lane] == (((row * 8 + 8 + column) << 16 | (row * 8 + column))), "lane ", lane);
    }
});

// ---- cp.async ----

template <class Word>
__global__ void copy_words(Word const* x, Word* y) {
    Word* const s = reinterpret_cast<Word*>(dyn_smem());
    int const t = static_cast<int>(threadIdx.x);
    cute::SM80_CP_ASYNC_CACHEALWAYS<Word>::copy(x[t], s[t]);
    cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Word>::copy(x[t], s[32 + t], t % 2 == 0);
    cute::cp_async_fence();
    cute::cp_async_wait<0>();
    y[t] = s[t];
    y[32 + t] = s[32 + t];
}
template <class Word>
void check_copy() {
    std::vector<Word> x(32), y(64);
    for (std::size_t i = 0; i < 32 * sizeof(Word); ++i)
        reinterpret_cast<unsigned char*>(x.data())[i] = static_cast<unsigned char>(i + 1);
    launch(copy_words<Word>, dim3(1), dim3(32), 64 * sizeof(Word), nullptr,
           static_cast<Word const*>(x.data()), y.data());
    Word const zero{};
    for (std::size_t t = 0; t < 32; ++t) {
        require(std::memcmp(&y[t], &x[t], sizeof(Word)) == 0, "word ", t);
        require(std::memcmp(&y[32 + t], t % 2 == 0 ? &x[t] : &zero, sizeof(Word)) == 0,
                "filled word ", t);
    }
    require(last_counters().async_bytes == 48 * sizeof(Word), "bytes ",
            last_counters().async_bytes);
}
Case const copy4("cp_async/4_bytes", check_copy<uint32_t>);
Case const copy8("cp_async/8_bytes", check_copy<uint64_t>);
Case const copy16("cp_async/16_bytes", check_copy<cute::uint128_t>);

__global__ void early_read(uint32_t const* x, uint32_t* y) {
    uint32_t* const s = reinterpret_cast<uint32_t*>(dyn_smem());
    for (int i = 0; i < 3; ++i) {
        cute::SM80_CP_ASYNC_CACHEALWAYS<uint32_t>::copy(x[i], s[i]);
        cute::cp_async_fence();
    }
    cute::cp_async_wait<1>();
    y[0] = s[0], y[1] = s[1];
    if (!kRace) y[2] = s[2];
    cute::cp_async_wait<0>();
    y[3] = s[2];
}
Case const groups("cp_async/groups_land_in_order", [] {
    std::vector<uint32_t> x{1, 2, 3}, y(4);
    launch(early_read, dim3(1), dim3(1), 16, nullptr, static_cast<uint32_t const*>(x.data()),
           y.data());
    require(y[0] == 1 && y[1] == 2 && y[3] == 3, "landed wrongly");
    require(kRace || y[2] == 0xffffffffu, "landed before its wait");
});

// ---- Shuffles ----

// Calls f(lane) with the lane's results; y is [operation][32].
template <class F>
void each_lane_of(std::vector<int> const& y, F&& expected) {
    for (int t = 0; t < 32; ++t) {
        std::vector<int> const want = expected(t);
        require(want.size() * 32 == y.size(), "operations");
        for (std::size_t i = 0; i < want.size(); ++i) {
            int const got = y[32 * i + static_cast<std::size_t>(t)];
            require(got == want[i], "operation ", i, " lane ", t, ": ", got, " != ", want[i]);
        }
    }
}

__global__ void shuffle_all(int* y) {
    int const t = static_cast<int>(threadIdx.x);
    y[t] = __shfl_sync(~0u, t, t + 3, 8);
    y[32 + t] = __shfl_up_sync(~0u, t, 3, 8);
    y[64 + t] = __shfl_down_sync(~0u, t, 3, 16);
    y[96 + t] = __shfl_xor_sync(~0u, t, 5, 8);
    y[128 + t] = static_cast<int>(__match_any_sync(~0u, t / 16));
    y[160 + t] = __shfl_xor_sync(~0u, 1.5 * t, 31) == 1.5 * (31 - t);
}
Case const shuffles("warp/shuffles", [] {
    std::vector<int> y(192);
    launch(shuffle_all, dim3(1), dim3(32), 0, nullptr, y.data());
    each_lane_of(y, [](int t) {
        return std::vector<int>{t / 8 * 8 + (t + 3) % 8,
                                t % 8 < 3 ? t : t - 3,
                                t % 16 >= 13 ? t : t + 3,
                                t / 8 * 8 + ((t % 8) ^ 5),
                                t < 16 ? 0xffff : static_cast<int>(0xffff0000u),
                                1};
    });
});

__global__ void vote_all(int* y) {
    int const t = static_cast<int>(threadIdx.x);
    u32 const odd = t % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;  // the lanes of this lane's parity
    y[t] = __any_sync(odd, t == 4);
    y[32 + t] = __all_sync(odd, t % 2 == 1);
    y[64 + t] = static_cast<int>(__ballot_sync(odd, t < 5));
}
Case const votes("warp/votes", [] {
    std::vector<int> y(96);
    launch(vote_all, dim3(1), dim3(32), 0, nullptr, y.data());
    each_lane_of(y, [](int t) {
        return std::vector<int>{t % 2 == 0, t % 2 == 1, t % 2 == 0 ? 0b10101 : 0b01010};
    });
});

__global__ void reduce_all(int* y) {
    int const t = static_cast<int>(threadIdx.x);
    u32 const word = 1u << t | 0x80000001u;
    u32 const half = t < 16 ? 0xffffu : 0xffff0000u;
    u32 const results[] = {
        __reduce_add_sync(half, static_cast<u32>(t)),
        __reduce_min_sync(half, word),
        __reduce_max_sync(half, word),
        __reduce_and_sync(half, ~word),
        __reduce_or_sync(half, word),
        __reduce_xor_sync(half, 1u << t),
        static_cast<u32>(__reduce_add_sync(half, t - 20)),
        static_cast<u32>(__reduce_min_sync(half, t - 20)),
        static_cast<u32>(__reduce_max_sync(half, t - 20)),
    };
    for (int i = 0; i < 9; ++i) y[32 * i + t] = static_cast<int>(results[i]);
}
Case const reductions("warp/reductions", [] {
    std::vector<int> y(9 * 32);
    launch(reduce_all, dim3(1), dim3(32), 0, nullptr, y.data());
    each_lane_of(y, [](int t) {
        auto const word = [](u32 bits) { return static_cast<int>(bits); };
        return t < 16 ? std::vector<int>{120,
                                         word(0x80000001u),
                                         word(0x80008001u),
                                         word(0x7fff0000u),
                                         word(0x8000ffffu),
                                         0xffff,
                                         120 - 320,
                                         -20,
                                         -5}
                      : std::vector<int>{376,
                                         word(0x80000001u),
                                         word(0xc0000001u),
                                         0xfffe,
                                         word(0xffff0001u),
                                         word(0xffff0000u),
                                         376 - 320,
                                         -4,
                                         11};
    });
});

// ---- Atomics ----

__global__ void atomics_on_words(unsigned* u, int* i) {
    unsigned const bit = 1u << threadIdx.x;
    int const t = static_cast<int>(threadIdx.x);
    atomicAdd(u, 2u);
    atomicMin(u + 1, 40u - threadIdx.x);
    atomicMax(u + 2, 40u - threadIdx.x);
    atomicAnd(u + 3, ~bit);
    atomicOr(u + 4, bit);
    atomicXor(u + 5, threadIdx.x);
    atomicExch(u + 6, 9u);
    atomicCAS(u + 7, 0u, 7u);
    atomicInc(u + 8, 9u);
    atomicDec(u + 9, 9u);
    atomicAdd(i, -t);
    atomicMin(i + 1, -t);
    atomicMax(i + 2, t - 10);
}
Case const atomic_words("atomics/words", [] {
    std::vector<unsigned> u{0, 100, 0, ~0u, 0, 0, 0, 0, 0, 0};
    std::vector<int> i{0, 0, -100};
    launch(atomics_on_words, dim3(1), dim3(32), 0, nullptr, u.data(), i.data());
    // 32 steps through 0 .. 9 up, and down.
    require(u == std::vector<unsigned>{64, 9, 40, 0, ~0u, 0, 9, 7, 2, 8}, "unsigned");
    require(i == std::vector<int>{-496, -31, 21}, "int");
    require(last_counters().atomics == 32 * 13, "count");
});

__global__ void atomics_on_others(float* f, double* d, unsigned long long* l, __half2* h,
                                  __nv_bfloat162* b) {
    atomicAdd(f, 0.5f);
    atomicExch(f + 1, 2.0f);
    atomicAdd(d, 0.25);
    atomicAdd(l, 3000000000ull);
    atomicMax(l + 1, 1ull << threadIdx.x << 8);
    atomicCAS(l + 2, 0ull, 1ull << 40);
    atomicAdd(h, __floats2half2_rn(1.0f, -0.5f));
    atomicAdd(b, __floats2bfloat162_rn(1.0f, -0.5f));
}
Case const atomic_others("atomics/floats_pairs_and_long_words", [] {
    std::vector<float> f(2);
    std::vector<double> d(1);
    std::vector<unsigned long long> l(3);
    std::vector<__half2> h{__floats2half2_rn(0.0f, 0.0f)};
    std::vector<__nv_bfloat162> b{__floats2bfloat162_rn(0.0f, 0.0f)};
    launch(atomics_on_others, dim3(1), dim3(32), 0, nullptr, f.data(), d.data(), l.data(), h.data(),
           b.data());
    require(f[0] == 16.0f && f[1] == 2.0f && d[0] == 8.0, "float and double");
    require(l[0] == 96000000000ull && l[1] == 1ull << 39 && l[2] == 1ull << 40, "64 bits");
    require(__low2float(h[0]) == 32.0f && __high2float(h[0]) == -16.0f, "half2");
    require(__low2float(b[0]) == 32.0f && __high2float(b[0]) == -16.0f, "bfloat162");
});

// ---- Arithmetic that the host has no name for ----

__global__ void count_bits(u32 const* x, u32* y) {
    u32 const a = x[0], b = x[1];
    u32 const results[] = {
        static_cast<u32>(__popc(a)),
        static_cast<u32>(__clz(static_cast<int>(b))),
        static_cast<u32>(__ffs(static_cast<int>(b))),
        __brev(a),
        __byte_perm(a, b, 0x7531),
        __byte_perm(a, b, 0x9c40),  // signs of bytes 1 and 4, bytes 4 and 0
        __funnelshift_l(a, b, 8),
        __funnelshift_r(a, b, 8),
        __umulhi(a, b),
        static_cast<u32>(__dp4a(static_cast<int>(a), static_cast<int>(b), 5)),
    };
    for (int i = 0; i < 10; ++i) y[i] = results[i];
}
Case const bits("arithmetic/bits", [] {
    std::vector<u32> x{0x80c0ff01u, 0x00012002u}, y(10);
    launch(count_bits, dim3(1), dim3(1), 0, nullptr, static_cast<u32 const*>(x.data()), y.data());
    std::vector<u32> const expected{
        12,          15,
        2,           0x80ff0301u,
        0x002080ffu, 0xff000201u,
        0x01200280u, 0x0280c0ffu,
        0x000090dau, static_cast<u32>(5 + 1 * 2 - 1 * 32 - 64 * 1 - 128 * 0)};
    for (std::size_t i = 0; i < y.size(); ++i)
        require(y[i] == expected[i], "operation ", i, ": ", y[i], " != ", expected[i]);
});

__global__ void approximate(float const* x, float* y) {
    y[0] = exp2_approx(x[0]);
    y[1] = exp2_approx(x[1]);
    y[2] = exp2_approx(x[2]);
}
Case const exp2("arithmetic/exp2_approx_flushes_denormals", [] {
    std::vector<float> x{3.0f, -126.0f, -127.0f}, y(3);
    launch(approximate, dim3(1), dim3(1), 0, nullptr, static_cast<float const*>(x.data()),
           y.data());
    require(y[0] == 8.0f && y[1] == 0x1p-126f && y[2] == 0.0f, y[1], " ", y[2]);
});

}  // namespace
}  // namespace lsm::test
