// wgmma, TMA, mbarriers, named barriers, setmaxnreg: through CuTe's own layouts, descriptors and
// tensor maps.
#include "harness.h"

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace lsm::test {
namespace {

using namespace cute;

// ---- wgmma ----

enum class Slip { none, no_wait, no_fence, no_proxy_fence, no_barrier };

// D [64][N] = A [64][K] B [N][K]^T, one warpgroup. Operands are laid out by CuTe and described by
// its make_gmma_desc.
template <class MmaOp, class LayoutA, class LayoutB, int kN, int kK, Slip kSlip>
__global__ void multiply_wgmma(cute::bfloat16_t const* a, cute::bfloat16_t const* b, float* d) {
    auto* const smem = reinterpret_cast<cute::bfloat16_t*>(dyn_smem());
    auto const layout_a = tile_to_shape(LayoutA{}, Shape<Int<64>, Int<kK>>{});
    auto const layout_b = tile_to_shape(LayoutB{}, Shape<Int<kN>, Int<kK>>{});
    Tensor sA = make_tensor(make_smem_ptr(smem), layout_a);
    Tensor sB = make_tensor(make_smem_ptr(smem + 64 * kK), layout_b);
    int const t = static_cast<int>(threadIdx.x);
    for (int i = t; i < 64 * kK; i += 128) sA(i / kK, i % kK) = a[i];
    for (int i = t; i < kN * kK; i += 128) sB(i / kK, i % kK) = b[i];
    if constexpr (kSlip != Slip::no_proxy_fence) cutlass::arch::fence_view_async_shared();
    if constexpr (kSlip != Slip::no_barrier) __syncthreads();

    auto mma = make_tiled_mma(MmaOp{});
    auto thread = mma.get_slice(threadIdx.x);
    Tensor gD =
        make_tensor(make_gmem_ptr(d), make_layout(Shape<Int<64>, Int<kN>>{}, LayoutRight{}));
    Tensor tD = thread.partition_C(gD);
    Tensor accumulator = thread.make_fragment_C(tD);
    clear(accumulator);
    Tensor rB = thread.make_fragment_B(thread.partition_B(sB));
    if constexpr (kSlip != Slip::no_fence) warpgroup_arrive();
    if constexpr (is_same_v<typename decltype(mma)::FrgTypeA, cute::bfloat16_t>) {
        Tensor tA = thread.partition_A(sA);
        Tensor rA = thread.make_fragment_A(tA);
        copy(tA, rA);
        warpgroup_arrive();
        gemm(mma, rA, rB, accumulator);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
    } else {
        Tensor rA = thread.make_fragment_A(thread.partition_A(sA));
        gemm(mma, rA, rB, accumulator);
        warpgroup_commit_batch();
        if constexpr (kSlip != Slip::no_wait) warpgroup_wait<0>();
    }
    copy(accumulator, tD);
    if constexpr (kSlip == Slip::no_wait) warpgroup_wait<0>();
}

template <class MmaOp, class LayoutA, class LayoutB, int kN = 64, int kK = 64,
          Slip kSlip = Slip::none>
bool run_wgmma() {
    std::vector<cute::bfloat16_t> a(64 * kK), b(kN * kK);
    std::vector<float> d(64 * kN);
    for (std::size_t i = 0; i < a.size(); ++i)
        a[i] = cute::bfloat16_t(static_cast<float>(static_cast<int>(i * 7 % 31) - 15));
    for (std::size_t i = 0; i < b.size(); ++i)
        b[i] = cute::bfloat16_t(static_cast<float>(static_cast<int>(i * 5 % 29) - 14));
    launch(multiply_wgmma<MmaOp, LayoutA, LayoutB, kN, kK, kSlip>, dim3(1), dim3(128),
           std::size_t{2} * (64 + kN) * kK, nullptr, static_cast<cute::bfloat16_t const*>(a.data()),
           static_cast<cute::bfloat16_t const*>(b.data()), d.data());
    for (int m = 0; m < 64; ++m) {
        for (int n = 0; n < kN; ++n) {
            float expected = 0;
            for (int k = 0; k < kK; ++k)
                expected += static_cast<float>(a[m * kK + k]) * static_cast<float>(b[n * kK + k]);
            if (d[m * kN + n] != expected) return false;
        }
    }
    return true;
}

using Bf = cute::bfloat16_t;
constexpr auto kK = GMMA::Major::K, kMn = GMMA::Major::MN;
template <GMMA::Major A, GMMA::Major B>
using Ss = SM90_64x64x16_F32BF16BF16_SS<A, B>;

#define LSM_WGMMA_CASE(name, ...)           \
    Case const wgmma_##name("wgmma/" #name, \
                            [] { expect_silence([] { return run_wgmma<__VA_ARGS__>(); }); });
LSM_WGMMA_CASE(k_major_128, Ss<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
               GMMA::Layout_K_SW128_Atom<Bf>)
LSM_WGMMA_CASE(k_major_64, Ss<kK, kK>, GMMA::Layout_K_SW64_Atom<Bf>, GMMA::Layout_K_SW64_Atom<Bf>)
LSM_WGMMA_CASE(k_major_32, Ss<kK, kK>, GMMA::Layout_K_SW32_Atom<Bf>, GMMA::Layout_K_SW32_Atom<Bf>)
LSM_WGMMA_CASE(k_major_plain, Ss<kK, kK>, GMMA::Layout_K_INTER_Atom<Bf>,
               GMMA::Layout_K_INTER_Atom<Bf>)
LSM_WGMMA_CASE(mn_major_128, Ss<kMn, kMn>, GMMA::Layout_MN_SW128_Atom<Bf>,
               GMMA::Layout_MN_SW128_Atom<Bf>)
LSM_WGMMA_CASE(mn_major_64, Ss<kMn, kMn>, GMMA::Layout_MN_SW64_Atom<Bf>,
               GMMA::Layout_MN_SW64_Atom<Bf>)
LSM_WGMMA_CASE(mn_major_32, Ss<kMn, kMn>, GMMA::Layout_MN_SW32_Atom<Bf>,
               GMMA::Layout_MN_SW32_Atom<Bf>)
LSM_WGMMA_CASE(mn_major_plain, Ss<kMn, kMn>, GMMA::Layout_MN_INTER_Atom<Bf>,
               GMMA::Layout_MN_INTER_Atom<Bf>)
LSM_WGMMA_CASE(mixed_majors, Ss<kK, kMn>, GMMA::Layout_K_SW64_Atom<Bf>,
               GMMA::Layout_MN_SW128_Atom<Bf>)
LSM_WGMMA_CASE(n128_k128, SM90_64x128x16_F32BF16BF16_SS<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
               GMMA::Layout_K_SW128_Atom<Bf>, 128, 128)
LSM_WGMMA_CASE(registers, SM90_64x64x16_F32BF16BF16_RS<kK, kK>, GMMA::Layout_K_SW128_Atom<Bf>,
               GMMA::Layout_K_SW128_Atom<Bf>)
LSM_WGMMA_CASE(registers_mn, SM90_64x64x16_F32BF16BF16_RS<kK, kMn>, GMMA::Layout_K_SW64_Atom<Bf>,
               GMMA::Layout_MN_SW64_Atom<Bf>)
#undef LSM_WGMMA_CASE

template <Slip kSlip>
bool run_slip() {
    using Layout = GMMA::Layout_K_SW128_Atom<Bf>;
    return run_wgmma<Ss<kK, kK>, Layout, Layout, 64, 64, kSlip>();
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

// ---- TMA and mbarriers ----

template <int kRows, int kColumns, class Layout, class Tma>
__global__ void load_box(__grid_constant__ Tma const tma, float* y, int rows, int columns,
                         bool wait) {
    auto* const barrier =
        reinterpret_cast<uint64_t*>(dyn_smem() + sizeof(float) * cosize_v<Layout>);
    Tensor sX = make_tensor(make_smem_ptr(reinterpret_cast<float*>(dyn_smem())), Layout{});
    if (threadIdx.x == 0) {
        initialize_barrier(*barrier, 1);
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    Tensor gX = local_tile(tma.get_tma_tensor(make_shape(rows, columns)),
                           Shape<Int<kRows>, Int<kColumns>>{}, make_coord(blockIdx.x, blockIdx.y));
    auto thread = tma.get_slice(Int<0>{});
    if (threadIdx.x == 0) {
        set_barrier_transaction_bytes(*barrier, sizeof(float) * kRows * kColumns);
        copy(tma.with(*barrier), thread.partition_S(gX), thread.partition_D(sX));
    }
    if (wait) wait_barrier(*barrier, 0);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns;
         i += static_cast<int>(blockDim.x)) {
        y[(blockIdx.y * gridDim.x + blockIdx.x) * kRows * kColumns + i] =
            sX(i / kColumns, i % kColumns);
    }
    if (!wait) wait_barrier(*barrier, 0);
}

template <class Atom, int kRows, int kColumns>
bool run_load_box(bool wait = true) {
    int const rows = kRows + 5,
              columns = kColumns + 4;  // ragged: the rest of the second boxes is zeros
    using Layout = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kColumns>>{}));
    std::vector<float4> memory(static_cast<std::size_t>(rows * columns / 4 + 4));
    auto* const x = reinterpret_cast<float*>(memory.data());
    for (int i = 0; i < rows * columns; ++i) x[i] = static_cast<float>(i + 1);
    std::vector<float> y(4 * kRows * kColumns);
    auto tma = make_tma_copy(
        SM90_TMA_LOAD{},
        make_tensor(make_gmem_ptr(static_cast<float const*>(x)),
                    make_layout(make_shape(rows, columns), make_stride(columns, Int<1>{}))),
        Layout{});
    launch(load_box<kRows, kColumns, Layout, decltype(tma)>, dim3(2, 2), dim3(64),
           sizeof(float) * cosize_v<Layout> + 16, nullptr, tma, y.data(), rows, columns, wait);
    for (int block = 0; block < 4; ++block) {
        for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kColumns; ++c) {
                int const row = block % 2 * kRows + r, column = block / 2 * kColumns + c;
                float const expected =
                    row < rows && column < columns ? x[row * columns + column] : 0.0f;
                if (y[static_cast<std::size_t>((block * kRows + r) * kColumns + c)] != expected)
                    return false;
            }
        }
    }
    return true;
}
Case const tma_128("tma/load_128_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW128_Atom<float>, 16, 32>(); });
});
Case const tma_64("tma/load_64_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW64_Atom<float>, 16, 16>(); });
});
Case const tma_32("tma/load_32_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW32_Atom<float>, 16, 8>(); });
});
Case const tma_plain("tma/load_without_swizzle", [] {
    expect_silence([] { return run_load_box<Layout<Shape<_8, _16>, Stride<_16, _1>>, 8, 16>(); });
});
Case const tma_early("planted/tma_destination_read_before_its_mbarrier", [] {
    expect_race("shared memory",
                [] { return run_load_box<GMMA::Layout_K_SW128_Atom<float>, 16, 32>(false); });
});

// A box of a [B, T, H, D] tensor comes in, is doubled, and goes out again; and once more by
// addition.
template <bool kFenced, bool kWaited>
__global__ void double_box(__grid_constant__ CUtensorMap const in,
                           __grid_constant__ CUtensorMap const out, bool add) {
    auto* const tile = reinterpret_cast<float*>(dyn_smem());  // [8 tokens][16]
    auto* const barrier = reinterpret_cast<uint64_t*>(dyn_smem() + 512);
    if (threadIdx.x == 0) cutlass::arch::ClusterTransactionBarrier::init(barrier, 1);
    __syncthreads();
    int const token = static_cast<int>(blockIdx.x) * 8, head = static_cast<int>(blockIdx.y),
              batch = static_cast<int>(blockIdx.z);
    if (threadIdx.x == 0) {
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, 512);
        SM90_TMA_LOAD_4D::copy(&in, barrier, 0, tile, 0, head, token, batch);
    }
    while (!cutlass::arch::ClusterBarrier::try_wait(barrier, 0)) {
    }
    for (int i = static_cast<int>(threadIdx.x); i < 128; i += 32) tile[i] *= 2;
    if constexpr (kFenced) tma_store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (add) {
            SM90_TMA_REDUCE_ADD_4D::copy(&out, tile, 0, head, token, batch);
        } else {
            SM90_TMA_STORE_4D::copy(&out, tile, 0, head, token, batch);
        }
        tma_store_arrive();
        if constexpr (kWaited) tma_store_wait<0>();
    }
    if constexpr (!kWaited) {
        __syncthreads();
        if (threadIdx.x == 1) tile[0] = -1;
        if (threadIdx.x == 0) tma_store_wait<0>();
    }
}

template <bool kFenced = true, bool kWaited = true>
bool run_double_box(bool add = false) {
    constexpr int B = 2, T = 13, H = 3, D = 16;
    std::vector<float4> x_memory(B * T * H * D / 4), y_memory(B * T * H * D / 4);
    auto *const x = reinterpret_cast<float*>(x_memory.data()), *const y = reinterpret_cast<float*>(
                                                                   y_memory.data());
    for (int i = 0; i < B * T * H * D; ++i) x[i] = static_cast<float>(i), y[i] = 1000.0f;
    alignas(64) CUtensorMap maps[2];
    cuuint64_t const size[4] = {D, H, T, B}, stride[3] = {D * 4, H * D * 4, T * H * D * 4};
    cuuint32_t const box[4] = {D, 1, 8, 1}, one[4] = {1, 1, 1, 1};
    for (int i = 0; i < 2; ++i) {
        CUresult const status = cuTensorMapEncodeTiled(
            &maps[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, i == 0 ? x : y, size, stride, box, one,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
            CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        require(status == CUDA_SUCCESS, "encode ", status);
    }
    launch(double_box<kFenced, kWaited>, dim3(2, H, B), dim3(32), 528, nullptr, maps[0], maps[1],
           add);
    require(last_counters().global_read_bytes == sizeof(float) * B * T * H * D, "bytes");
    for (int i = 0; i < B * T * H * D; ++i) {
        if (y[i] != 2 * x[i] + (add ? 1000.0f : 0.0f)) return false;
    }
    return true;
}
Case const tma_store("tma/load_and_store_4d",
                     [] { expect_silence([] { return run_double_box(); }); });
Case const tma_add("tma/reduce_add", [] { expect_silence([] { return run_double_box(true); }); });
Case const store_unfenced("planted/fence_proxy_missing_before_tma_store", [] {
    expect_only_race("fence.proxy.async", [] { return run_double_box<false>(); });
});
Case const store_overwritten("planted/tma_store_source_overwritten_before_its_wait", [] {
    expect_race("race on shared memory", [] { return run_double_box<true, false>(); });
});

// A producer warp keeps a ring of stages full for a consumer warpgroup, by bulk copies and by
// cp.async.
template <bool kBulk>
__global__ void ring(float const* x, float* y, int steps) {
    constexpr int kStages = 3;
    auto* const stage = reinterpret_cast<float*>(dyn_smem());  // [3][128]
    auto* const full = reinterpret_cast<uint64_t*>(dyn_smem() + 1536);
    uint64_t* const empty = full + kStages;
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            Barrier::init(full + s, kBulk ? 1 : 32);
            Barrier::init(empty + s, 128);
        }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (kBulk && !elect_one_sync()) return;
        for (int i = 0; i < steps; ++i) {
            int const s = i % kStages;
            if (i >= kStages)
                Barrier::wait(empty + s, static_cast<uint32_t>((i / kStages - 1) & 1));
            if constexpr (kBulk) {
                Barrier::arrive_and_expect_tx(full + s, 512);
                SM90_BULK_COPY_G2S::copy(x + 128 * i, full + s, stage + 128 * s, 512);
            } else {
                int const lane = static_cast<int>(threadIdx.x) - 128;
                cp_async16(smem_u32(stage + 128 * s + 4 * lane), x + 128 * i + 4 * lane, true);
                cutlass::arch::cpasync_barrier_arrive_noinc(full + s);
            }
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<240>();
        float sum = 0;
        for (int i = 0; i < steps; ++i) {
            int const s = i % kStages;
            Barrier::wait(full + s, static_cast<uint32_t>((i / kStages) & 1));
            sum += stage[128 * s + (127 - static_cast<int>(threadIdx.x))];
            Barrier::arrive(empty + s);
            if (i % 2 == 0) cutlass::arch::NamedBarrier::sync(128, 1);
        }
        y[threadIdx.x] = sum;
    }
}
template <bool kBulk>
bool run_ring() {
    int const steps = 8;
    std::vector<float4> memory(32 * steps);
    auto* const x = reinterpret_cast<float*>(memory.data());
    std::vector<float> y(128);
    for (int i = 0; i < 128 * steps; ++i) x[i] = static_cast<float>(i);
    launch(ring<kBulk>, dim3(1), dim3(160), 1536 + 48, nullptr, static_cast<float const*>(x),
           y.data(), steps);
    for (int t = 0; t < 128; ++t) {
        if (y[static_cast<std::size_t>(t)] != steps * (127 - t) + 128 * steps * (steps - 1) / 2)
            return false;
    }
    return true;
}
Case const bulk_ring("tma/producer_warp_with_bulk_copies", [] { expect_silence(run_ring<true>); });
Case const async_ring("tma/producer_warp_with_cp_async", [] { expect_silence(run_ring<false>); });

__global__ void unknown_barrier() {
    arrive_barrier(*reinterpret_cast<uint64_t*>(dyn_smem()));
}
Case const uninitialised("planted/mbarrier_not_initialised", [] {
    expect_report("no initialised mbarrier",
                  [] { launch(unknown_barrier, dim3(1), dim3(1), 16, nullptr); });
});

__global__ void four_phases() {
    auto& barrier = *reinterpret_cast<uint64_t*>(dyn_smem());
    if (threadIdx.x == 0) initialize_barrier(barrier, 64);
    __syncthreads();
    for (int phase = 0; phase < 4; ++phase) {
        arrive_barrier(barrier);
        wait_barrier(barrier, phase % 2);
    }
}
Case const phases("tma/four_phases", [] {
    expect_silence([] {
        launch(four_phases, dim3(1), dim3(64), 16, nullptr);
        return true;
    });
});

}  // namespace
}  // namespace lsm::test
