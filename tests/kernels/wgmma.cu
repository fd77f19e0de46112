// wgmma through CuTe's own layouts and descriptors, and every shape through its fragment maps.
#include "harness.h"

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace lsm::test {
namespace {

using namespace cute;

using Bf = cute::bfloat16_t;
using Half = cute::half_t;
using Tf32 = cute::tfloat32_t;
constexpr auto kK = GMMA::Major::K, kMn = GMMA::Major::MN;

// Small integers: exact in every format and in any order of summation.
template <class T>
std::vector<T> numbers(int count, int step, int modulus) {
    std::vector<T> x(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
        int const value = i * step % modulus - modulus / 2;
        if constexpr (std::is_same_v<T, int8_t>) {
            x[static_cast<std::size_t>(i)] = static_cast<int8_t>(value);
        } else {
            x[static_cast<std::size_t>(i)] = T(static_cast<float>(value));
        }
    }
    return x;
}

// The product of [64][depth] and [columns][depth]^T.
template <class Sum, class T>
std::vector<Sum> product(std::vector<T> const& a, std::vector<T> const& b, int columns, int depth) {
    std::vector<Sum> d(static_cast<std::size_t>(64 * columns));
    for (int m = 0; m < 64; ++m) {
        for (int n = 0; n < columns; ++n) {
            for (int k = 0; k < depth; ++k) {
                d[m * columns + n] +=
                    static_cast<Sum>(a[m * depth + k]) * static_cast<Sum>(b[n * depth + k]);
            }
        }
    }
    return d;
}

// ---- Tiles laid out by CuTe and described by its make_gmma_desc ----

enum class Slip { none, no_wait, no_fence, no_proxy_fence, no_barrier, overwrite };

template <class Op>
using ElementOf = typename MMA_Traits<Op>::ValTypeA;
template <class Op>
using SumOf = typename MMA_Traits<Op>::ValTypeC;
template <class Op>
constexpr bool kARegisters = std::extent_v<typename Op::ARegisters> == 4;

// D [64][N] = A [64][depth] B [N][depth]^T, one warpgroup.
template <class Op, class LayoutA, class LayoutB, int kDepth, Slip kSlip>
__global__ void multiply_tiles(ElementOf<Op> const* a, ElementOf<Op> const* b, SumOf<Op>* d) {
    constexpr int kN = size<1>(typename MMA_Traits<Op>::Shape_MNK{});
    auto* const smem = reinterpret_cast<ElementOf<Op>*>(dyn_smem());
    auto const layout_a = tile_to_shape(LayoutA{}, Shape<Int<64>, Int<kDepth>>{});
    auto const layout_b = tile_to_shape(LayoutB{}, Shape<Int<kN>, Int<kDepth>>{});
    Tensor sA = make_tensor(make_smem_ptr(smem), layout_a);
    Tensor sB = make_tensor(make_smem_ptr(smem + 64 * kDepth), layout_b);
    int const t = static_cast<int>(threadIdx.x);
    for (int i = t; i < 64 * kDepth; i += 128) sA(i / kDepth, i % kDepth) = a[i];
    for (int i = t; i < kN * kDepth; i += 128) sB(i / kDepth, i % kDepth) = b[i];
    if constexpr (kSlip != Slip::no_proxy_fence) cutlass::arch::fence_view_async_shared();
    if constexpr (kSlip != Slip::no_barrier) __syncthreads();

    auto mma = make_tiled_mma(Op{});
    auto thread = mma.get_slice(threadIdx.x);
    Tensor gD =
        make_tensor(make_gmem_ptr(d), make_layout(Shape<Int<64>, Int<kN>>{}, LayoutRight{}));
    Tensor tD = thread.partition_C(gD);
    Tensor accumulator = thread.make_fragment_C(tD);
    clear(accumulator);
    Tensor rB = thread.make_fragment_B(thread.partition_B(sB));
    Tensor rA = [&] {
        if constexpr (kARegisters<Op>) {
            Tensor tA = thread.partition_A(sA);
            Tensor fragment = thread.make_fragment_A(tA);
            copy(tA, fragment);
            return fragment;
        } else {
            return thread.make_fragment_A(thread.partition_A(sA));
        }
    }();
    if constexpr (kSlip != Slip::no_fence) warpgroup_arrive();
    gemm(mma, rA, rB, accumulator);
    warpgroup_commit_batch();
    if constexpr (kSlip == Slip::overwrite) clear(rA);
    if constexpr (kSlip != Slip::no_wait) warpgroup_wait<0>();
    copy(accumulator, tD);
    if constexpr (kSlip == Slip::no_wait) warpgroup_wait<0>();
}

template <class Op, class LayoutA, class LayoutB, int kDepth = 64, Slip kSlip = Slip::none>
bool run_tiles() {
    constexpr int kN = size<1>(typename MMA_Traits<Op>::Shape_MNK{});
    using Element = ElementOf<Op>;
    using Sum = SumOf<Op>;
    auto const a = numbers<Element>(64 * kDepth, 7, 31), b = numbers<Element>(kN * kDepth, 5, 29);
    std::vector<Sum> d(64 * kN);
    launch(multiply_tiles<Op, LayoutA, LayoutB, kDepth, kSlip>, dim3(1), dim3(128),
           sizeof(Element) * (64 + kN) * kDepth, nullptr, a.data(), b.data(), d.data());
    return d == product<Sum>(a, b, kN, kDepth);
}

template <GMMA::Major A, GMMA::Major B>
using BfShared = SM90_64x64x16_F32BF16BF16_SS<A, B>;
template <GMMA::Major A, GMMA::Major B>
using HalfShared = SM90_64x64x16_F32F16F16_SS<A, B>;

#define LSM_TILE_CASE(name, ...)            \
    Case const tiles_##name("wgmma/" #name, \
                            [] { expect_silence([] { return run_tiles<__VA_ARGS__>(); }); });
LSM_TILE_CASE(k_major_128, BfShared<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
              GMMA::Layout_K_SW128_Atom<Bf>)
LSM_TILE_CASE(k_major_64, BfShared<kK, kK>, GMMA::Layout_K_SW64_Atom<Bf>,
              GMMA::Layout_K_SW64_Atom<Bf>)
LSM_TILE_CASE(k_major_32, BfShared<kK, kK>, GMMA::Layout_K_SW32_Atom<Bf>,
              GMMA::Layout_K_SW32_Atom<Bf>)
LSM_TILE_CASE(k_major_plain, BfShared<kK, kK>, GMMA::Layout_K_INTER_Atom<Bf>,
              GMMA::Layout_K_INTER_Atom<Bf>)
LSM_TILE_CASE(mn_major_128, BfShared<kMn, kMn>, GMMA::Layout_MN_SW128_Atom<Bf>,
              GMMA::Layout_MN_SW128_Atom<Bf>)
LSM_TILE_CASE(mn_major_64, BfShared<kMn, kMn>, GMMA::Layout_MN_SW64_Atom<Bf>,
              GMMA::Layout_MN_SW64_Atom<Bf>)
LSM_TILE_CASE(mn_major_32, BfShared<kMn, kMn>, GMMA::Layout_MN_SW32_Atom<Bf>,
              GMMA::Layout_MN_SW32_Atom<Bf>)
LSM_TILE_CASE(mn_major_plain, BfShared<kMn, kMn>, GMMA::Layout_MN_INTER_Atom<Bf>,
              GMMA::Layout_MN_INTER_Atom<Bf>)
LSM_TILE_CASE(mixed_majors, BfShared<kK, kMn>, GMMA::Layout_K_SW64_Atom<Bf>,
              GMMA::Layout_MN_SW128_Atom<Bf>)
LSM_TILE_CASE(n128_k128, SM90_64x128x16_F32BF16BF16_SS<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
              GMMA::Layout_K_SW128_Atom<Bf>, 128)
LSM_TILE_CASE(registers, SM90_64x64x16_F32BF16BF16_RS<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
              GMMA::Layout_K_SW128_Atom<Bf>)
LSM_TILE_CASE(registers_mn, SM90_64x64x16_F32BF16BF16_RS<kK, kMn>, GMMA::Layout_K_SW64_Atom<Bf>,
              GMMA::Layout_MN_SW64_Atom<Bf>)
LSM_TILE_CASE(f16_k_major, HalfShared<kK, kK>, GMMA::Layout_K_SW128_Atom<Half>,
              GMMA::Layout_K_SW64_Atom<Half>)
LSM_TILE_CASE(f16_mn_major, HalfShared<kMn, kMn>, GMMA::Layout_MN_SW128_Atom<Half>,
              GMMA::Layout_MN_SW32_Atom<Half>)
LSM_TILE_CASE(f16_registers, SM90_64x64x16_F32F16F16_RS<kK, kMn>, GMMA::Layout_K_SW128_Atom<Half>,
              GMMA::Layout_MN_SW128_Atom<Half>)
LSM_TILE_CASE(tf32_128, SM90_64x64x8_F32TF32TF32_SS_TN<>, GMMA::Layout_K_SW128_Atom<Tf32>,
              GMMA::Layout_K_SW128_Atom<Tf32>)
LSM_TILE_CASE(tf32_plain, SM90_64x64x8_F32TF32TF32_SS_TN<>, GMMA::Layout_K_INTER_Atom<Tf32>,
              GMMA::Layout_K_SW32_Atom<Tf32>)
LSM_TILE_CASE(tf32_registers, SM90_64x64x8_F32TF32TF32_RS_TN<>, GMMA::Layout_K_SW64_Atom<Tf32>,
              GMMA::Layout_K_SW128_Atom<Tf32>)
LSM_TILE_CASE(s8_128, SM90_64x64x32_S32S8S8_SS_TN, GMMA::Layout_K_SW128_Atom<int8_t>,
              GMMA::Layout_K_SW128_Atom<int8_t>, 128)
LSM_TILE_CASE(s8_plain, SM90_64x64x32_S32S8S8_SS_TN, GMMA::Layout_K_INTER_Atom<int8_t>,
              GMMA::Layout_K_SW32_Atom<int8_t>)
LSM_TILE_CASE(s8_registers, SM90_64x64x32_S32S8S8_RS_TN, GMMA::Layout_K_SW64_Atom<int8_t>,
              GMMA::Layout_K_SW64_Atom<int8_t>)
#undef LSM_TILE_CASE

template <Slip kSlip, class Op = BfShared<kK, kK>>
bool run_slip() {
    using Layout = GMMA::Layout_K_SW128_Atom<Bf>;
    return run_tiles<Op, Layout, Layout, 64, kSlip>();
}
Case const early_read("planted/accumulators_read_before_wgmma_wait",
                      [] { expect_seen(run_slip<Slip::no_wait>); });
Case const no_fence("planted/wgmma_fence_missing",
                    [] { expect_report("without wgmma.fence", run_slip<Slip::no_fence>); });
Case const no_proxy("planted/fence_proxy_missing_before_wgmma",
                    [] { expect_only_race("fence.proxy.async", run_slip<Slip::no_proxy_fence>); });
Case const no_barrier("planted/barrier_missing_before_wgmma", [] {
    expect_only_race("race on shared memory", run_slip<Slip::no_barrier>);
});
Case const overwritten("planted/wgmma_register_operand_overwritten_before_its_wait", [] {
    expect_seen(run_slip<Slip::overwrite, SM90_64x64x16_F32BF16BF16_RS<kK, kK>>);
});

// ---- One instruction of each shape; fragments as in CuTe's maps, descriptors by hand ----

// Without swizzle, 8 rows of 16 bytes are a matrix; the two of a row are 128 bytes apart, the next
// 8 rows 256.
LSM_DEVICE int place(int row, int byte) {
    return row / 8 * 256 + byte / 16 * 128 + row % 8 * 16 + byte % 16;
}
LSM_DEVICE uint64_t describe(char const* tile) {
    return uint64_t{smem_u32(tile) >> 4} | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
}

template <class Op>
using RegisterOf = std::remove_extent_t<typename Op::CRegisters>;

template <class Op, std::size_t... I>
LSM_DEVICE void multiply_once(char const* a, uint32_t const (&ra)[4], char const* b,
                              RegisterOf<Op>* d, GMMA::ScaleOut accumulate,
                              std::index_sequence<I...>) {
    if constexpr (kARegisters<Op>) {
        Op::fma(ra[0], ra[1], ra[2], ra[3], describe(b), d[I]..., accumulate);
    } else {
        Op::fma(describe(a), describe(b), d[I]..., accumulate);
    }
}

// D [64][N] = A B^T once without and `repeats` times with accumulation, in groups of one.
template <class Op>
__global__ void accumulate_products(ElementOf<Op> const* a, ElementOf<Op> const* b, SumOf<Op>* d,
                                    int repeats) {
    using Traits = MMA_Traits<Op>;
    using Element = ElementOf<Op>;
    constexpr int kN = size<1>(typename Traits::Shape_MNK{}),
                  kDepth = size<2>(typename Traits::Shape_MNK{});
    char *const sA = dyn_smem(), *const sB = sA + 64 * 32;
    int const t = static_cast<int>(threadIdx.x);
    auto const put = [=](char* tile, Element const* x, int rows) {
        for (int i = t; i < rows * kDepth; i += 128) {
            int const byte = i % kDepth * static_cast<int>(sizeof(Element));
            *reinterpret_cast<Element*>(tile + place(i / kDepth, byte)) = x[i];
        }
    };
    put(sA, a, 64);
    put(sB, b, kN);
    cutlass::arch::fence_view_async_shared();
    __syncthreads();

    // CuTe numbers elements column-major: row + 64 * column.
    alignas(16) Element fragment[16 / sizeof(Element)] = {};
    if constexpr (kARegisters<Op>) {
        for (int i = 0; i < static_cast<int>(16 / sizeof(Element)); ++i) {
            int const at = static_cast<int>(typename Traits::ALayout{}(t, i));
            fragment[i] = a[at % 64 * kDepth + at / 64];
        }
    }
    uint32_t ra[4];
    memcpy(ra, fragment, sizeof ra);
    RegisterOf<Op> sum[kN / 2];
    for (auto& s : sum) s = RegisterOf<Op>(12345);
    warpgroup_arrive();
    for (int i = 0; i <= repeats; ++i) {
        multiply_once<Op>(sA, ra, sB, sum, i == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One,
                          std::make_index_sequence<kN / 2>{});
        warpgroup_commit_batch();
    }
    warpgroup_wait<0>();
    for (int i = 0; i < kN / 2; ++i) {
        int const at = static_cast<int>(typename Traits::CLayout{}(t, i));
        d[at % 64 * kN + at / 64] = static_cast<SumOf<Op>>(sum[i]);
    }
}

template <class Op>
std::vector<SumOf<Op>> run_shape(int repeats = 1) {
    constexpr int kN = size<1>(typename MMA_Traits<Op>::Shape_MNK{}),
                  kDepth = size<2>(typename MMA_Traits<Op>::Shape_MNK{});
    auto const a = numbers<ElementOf<Op>>(64 * kDepth, 7, 31),
               b = numbers<ElementOf<Op>>(kN * kDepth, 5, 29);
    std::vector<SumOf<Op>> d(64 * kN), expected = product<SumOf<Op>>(a, b, kN, kDepth);
    launch(accumulate_products<Op>, dim3(1), dim3(128), (64 + kN) * 32, nullptr, a.data(), b.data(),
           d.data(), repeats);
    require(last_counters().mma_flops == uint64_t{2} * 64 * kN * kDepth * (repeats + 1), "flops");
    for (std::size_t i = 0; i < d.size(); ++i) d[i] -= (repeats + 1) * expected[i];
    return d;
}

template <class... Ops>
void check_shapes() {
    emu::set_seed(2);
    auto const check = [](auto const& differences) {
        for (auto const& x : differences) require(x == 0, "differs by ", x);
    };
    (check(run_shape<Ops>()), ...);
}

#define LSM_SHAPES_CASE(name, middle, ...)                                                  \
    Case const shapes_##name("wgmma/every_n_" #name, [] {                                   \
        check_shapes<SM90_64x8x##middle __VA_ARGS__, SM90_64x16x##middle __VA_ARGS__,       \
                     SM90_64x32x##middle __VA_ARGS__, SM90_64x64x##middle __VA_ARGS__,      \
                     SM90_64x96x##middle __VA_ARGS__, SM90_64x128x##middle __VA_ARGS__,     \
                     SM90_64x192x##middle __VA_ARGS__, SM90_64x256x##middle __VA_ARGS__>(); \
    });
LSM_SHAPES_CASE(bf16_shared, 16_F32BF16BF16_SS, <kK, kK>)
LSM_SHAPES_CASE(bf16_registers, 16_F32BF16BF16_RS, <kK, kK>)
LSM_SHAPES_CASE(f16_shared, 16_F32F16F16_SS, <kK, kK>)
LSM_SHAPES_CASE(f16_registers, 16_F32F16F16_RS, <kK, kK>)
LSM_SHAPES_CASE(tf32_shared, 8_F32TF32TF32_SS_TN, <>)
LSM_SHAPES_CASE(tf32_registers, 8_F32TF32TF32_RS_TN, <>)
LSM_SHAPES_CASE(s8_shared, 32_S32S8S8_SS_TN)
LSM_SHAPES_CASE(s8_registers, 32_S32S8S8_RS_TN)
#undef LSM_SHAPES_CASE

template <GMMA::ScaleIn A, GMMA::ScaleIn B>
float first_product() {
    emu::set_seed(2);
    // The differences from once the product: 0 or, negated, minus two products.
    return run_shape<SM90_64x8x16_F32BF16BF16_SS<kK, kK, A, B>>(0)[0];
}
Case const negated("wgmma/negated_operands", [] {
    using GMMA::ScaleIn;
    float const once = -first_product<ScaleIn::Neg, ScaleIn::One>() / 2;
    require(once != 0 && first_product<ScaleIn::One, ScaleIn::Neg>() == -2 * once, once);
    require(first_product<ScaleIn::Neg, ScaleIn::Neg>() == 0, "minus times minus");
});

// ---- Groups and warpgroups ----

// Two products in flight: the first has landed when one group may be pending.
template <bool kWaited>
__global__ void two_groups(float* y) {
    using Op = SM90_64x8x16_F32BF16BF16_SS<kK, kK>;
    char* const tile = dyn_smem();
    for (int i = static_cast<int>(threadIdx.x); i < 72 * 16; i += 128)
        reinterpret_cast<Bf*>(tile)[i] = Bf(1.0f);
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    float first[4] = {}, second[4] = {};
    uint32_t const unused[4] = {};
    warpgroup_arrive();
    for (float* d : {first, second}) {
        multiply_once<Op>(tile, unused, tile + 64 * 32, d, GMMA::ScaleOut::One,
                          std::make_index_sequence<4>{});
        warpgroup_commit_batch();
    }
    warpgroup_wait<1>();
    y[threadIdx.x] = first[0];
    if constexpr (kWaited) warpgroup_wait<0>();
    y[128 + threadIdx.x] = second[0];
}
template <bool kWaited>
bool run_groups() {
    std::vector<float> y(256);
    launch(two_groups<kWaited>, dim3(1), dim3(128), 72 * 32, nullptr, y.data());
    return y[0] == 16 && y[255] == 16;
}
Case const groups("wgmma/groups_land_in_order",
                  [] { expect_silence([] { return run_groups<true>(); }); });
Case const in_flight("planted/block_ends_with_wgmma_in_flight", [] {
    expect_report("ended with a wgmma in flight", [] { run_groups<false>(); });
});

enum class Difference { descriptor, instruction };
template <Difference kDifference>
__global__ void disagree() {
    using Op = SM90_64x8x16_F32BF16BF16_SS<kK, kK>;
    float d[4] = {};
    uint32_t const unused[4] = {};
    bool const odd = threadIdx.x / 32 == 1;
    warpgroup_arrive();
    if (kDifference == Difference::instruction && odd) {
        warpgroup_wait<0>();
    } else {
        multiply_once<Op>(dyn_smem() + (odd ? 16 : 0), unused, dyn_smem(), d, GMMA::ScaleOut::One,
                          std::make_index_sequence<4>{});
    }
}
Case const descriptors("planted/wgmma_descriptors_differ", [] {
    expect_report("different descriptors", [] {
        launch(disagree<Difference::descriptor>, dim3(1), dim3(128), 4096, nullptr);
    });
});
Case const instructions("planted/divergent_warpgroup", [] {
    expect_report("divergent warpgroup", [] {
        launch(disagree<Difference::instruction>, dim3(1), dim3(128), 4096, nullptr);
    });
});

}  // namespace
}  // namespace lsm::test
