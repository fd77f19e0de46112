// What Hopper has beyond sm_80: boxes of tensors by TMA, mbarriers, products of warpgroups. Names over cute/arch, whose
// instructions the emulator replaces. For device files that are built for sm_90a alone (*_sm90.cu).
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include <cuda.h>

#include <utility>

namespace lsm {

// ---- Tensor maps, on the host ----

#ifdef __CUDACC__
// The driver's encoder, found at run time: nothing here is linked with libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static auto const encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        constexpr char kName[] = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
        cudaError_t const status =
            cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result);
#else
        cudaError_t const status =
            cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
        if (status != cudaSuccess) cudaGetLastError();  // not the next launch's error
        bool const ok = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return ok ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
    }();
    return encode;
}
#else
inline auto tensor_map_encoder() {
    return &cuTensorMapEncodeTiled;
}
#endif

// Boxes of `tokens` tokens by 64 columns of one head of x [B, T, H, columns], 16-bit numbers: rows of 128 bytes,
// swizzled. What lies outside of the tensor is zero. False if TMA cannot read such a tensor.
inline bool encode_boxes(CUtensorMap& map, Dtype type, Rows const& x, int64_t B, int64_t T,
                         int64_t H, int64_t columns, int tokens) {
    auto const encode = tensor_map_encoder();
    if (encode == nullptr) return false;
    auto const bytes = [&](int64_t size, int64_t stride) {  // of a size of 1 no stride is used
        return static_cast<cuuint64_t>(2 * (size > 1 ? stride : 8));
    };
    cuuint64_t const size[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(H),
                                static_cast<cuuint64_t>(T), static_cast<cuuint64_t>(B)};
    cuuint64_t const stride[3] = {bytes(H, x.head), bytes(T, x.time), bytes(B, x.batch)};
    for (cuuint64_t s : stride) {
        if (s == 0) return false;  // one row for all
    }
    cuuint32_t const box[4] = {64, 1, static_cast<cuuint32_t>(tokens), 1}, one[4] = {1, 1, 1, 1};
    return encode(&map,
                  type == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  4, x.data, size, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---- Memory ----

using Mbarrier = cutlass::arch::ClusterTransactionBarrier;  // its static functions, on 8 bytes
using NamedBarrier = cutlass::arch::NamedBarrier;

LSM_DEVICE void load_box(CUtensorMap const& map, uint64_t* barrier, char* to, int column, int head,
                         int token, int batch) {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier,
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                                 column, head, token, batch);
}

// The two sides of a ring of stages: `full` when one has come, `empty` when every user is done with it. Turns count on,
// stage after stage.
template <int Stages>
struct Turns {
    uint64_t full[Stages], empty[Stages];

    LSM_DEVICE void start(int bringers, int users) {
        for (int i = 0; i < Stages; ++i) {
            Mbarrier::init(&full[i], bringers);
            Mbarrier::init(&empty[i], users);
        }
    }
    LSM_DEVICE void wait_full(int turn) { Mbarrier::wait(&full[turn % Stages], turn / Stages & 1); }
    LSM_DEVICE void wait_empty(int turn) {
        Mbarrier::wait(&empty[turn % Stages], ~(turn / Stages) & 1);
    }
    LSM_DEVICE void release(int turn) { Mbarrier::arrive(&empty[turn % Stages]); }
};

// This thread's accesses to shared memory come before what TMA and wgmma do there, once a barrier says so.
LSM_DEVICE void fence_async_proxy() {
    cutlass::arch::fence_view_async_shared();
}

// A tile [rows, columns] of 16-bit numbers as TMA leaves it there and wgmma reads it: slabs of 64 columns, in which
// piece p of row r lies at p ^ (r & 7). On a multiple of 1024 bytes.
template <int Rows, int Columns>
struct Slabs {
    static_assert(Rows % 8 == 0 && Columns % 64 == 0);
    static constexpr int kRowBytes = 128, kBytes = Rows * kRowBytes;

    LSM_DEVICE static u32 offset(int row, int column) {
        return column / 64 * kBytes + row * kRowBytes + ((column / 8 & 7) ^ (row & 7)) * 16 +
               column % 8 * 2;
    }
};

// ---- Products ----

// Of slabs, whose first row is at `address`; rows or columns from 64 on are `slab` bytes further.
LSM_DEVICE uint64_t describe_slabs(u32 address, u32 slab) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kEightRows | static_cast<uint64_t>(slab >> 4) << 16 |
           (address & 0x3ffff) >> 4;
}

namespace gmma = cute::SM90::GMMA;

template <class T, int N>
struct WarpgroupOps;
#define LSM_WARPGROUP_OPS(type, n, name)                                                  \
    template <>                                                                           \
    struct WarpgroupOps<type, n> {                                                        \
        using Shared = gmma::MMA_64x##n##x16_##name##_SS<gmma::Major::K, gmma::Major::K>; \
        using Mixed = gmma::MMA_64x##n##x16_##name##_RS<gmma::Major::K, gmma::Major::MN>; \
    };
LSM_WARPGROUP_OPS(bf16, 32, F32BF16BF16)
LSM_WARPGROUP_OPS(bf16, 64, F32BF16BF16)
LSM_WARPGROUP_OPS(bf16, 128, F32BF16BF16)
LSM_WARPGROUP_OPS(half, 32, F32F16F16)
LSM_WARPGROUP_OPS(half, 64, F32F16F16)
LSM_WARPGROUP_OPS(half, 128, F32F16F16)
#undef LSM_WARPGROUP_OPS

template <class T, int N, std::size_t... I>
LSM_DEVICE void multiply_each(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add,
                              std::index_sequence<I...>) {
    WarpgroupOps<T, N>::Shared::fma(a, b, d[I / 4][I % 4]...,
                                    add ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}
template <class T, int N, std::size_t... I>
LSM_DEVICE void multiply_each(float (&d)[N / 8][4], u32 const (&a)[4], uint64_t b,
                              std::index_sequence<I...>) {
    WarpgroupOps<T, N>::Mixed::fma(a[0], a[1], a[2], a[3], b, d[I / 4][I % 4]...);
}

// d = a b' or, to `add`, d += a b' for 64 rows of a warpgroup and N rows of b, 16 deep, both in slabs.
template <class T, int N>
LSM_DEVICE void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
    multiply_each<T, N>(d, a, b, add, std::make_index_sequence<N / 2>{});
}
// d += a b, b [16, N] in slabs; a as an operand of mma_16x8x16, not to be touched before the wait.
template <class T, int N>
LSM_DEVICE void wgmma(float (&d)[N / 8][4], u32 const (&a)[4], uint64_t b) {
    multiply_each<T, N>(d, a, b, std::make_index_sequence<N / 2>{});
}

// d = a b', of 64 rows at `a` of slabs A and N rows at `b` of slabs B, D columns each.
template <class T, int D, class A, class B, int Tiles>
LSM_DEVICE void multiply_rows(u32 a, u32 b, float (&d)[Tiles][4]) {
    LSM_UNROLL
    for (int c = 0; c < D; c += 16) {
        u32 const column = c % 64 * 2;
        wgmma<T, 8 * Tiles>(d, describe_slabs(a + c / 64 * A::kBytes + column, A::kBytes),
                            describe_slabs(b + c / 64 * B::kBytes + column, B::kBytes), c > 0);
    }
}
// d += weights b, of all rows at `b` of slabs B, D columns.
template <class T, int D, class B, int Depth>
LSM_DEVICE void add_weighed(u32 const (&weights)[Depth][4], u32 b, float (&d)[D / 8][4]) {
    LSM_UNROLL
    for (int j = 0; j < Depth; ++j)
        wgmma<T, D>(d, weights[j], describe_slabs(b + 16 * j * B::kRowBytes, B::kBytes));
}

// The compiler does not know that wgmma writes, or reads, registers until the wait.
template <class Number, int M, int N>
LSM_DEVICE void keep_registers(Number (&x)[M][N]) {
    LSM_UNROLL
    for (int i = 0; i < M * N; ++i) cute::warpgroup_fence_operand(x[i / N][i % N]);
}

}  // namespace lsm
