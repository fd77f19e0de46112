// wgmma on the emulator: every op keeps CUTLASS's register types and gets a new fma.
#pragma once

#include "emu/emu.h"

#define warpgroup_arrive cutlass_warpgroup_arrive
#define warpgroup_wait cutlass_warpgroup_wait
#define warpgroup_commit_batch cutlass_warpgroup_commit_batch
#define MMA_64x8x16_F32BF16BF16_SS cutlass_MMA_64x8x16_F32BF16BF16_SS
#define MMA_64x8x16_F32BF16BF16_RS cutlass_MMA_64x8x16_F32BF16BF16_RS
#define MMA_64x16x16_F32BF16BF16_SS cutlass_MMA_64x16x16_F32BF16BF16_SS
#define MMA_64x16x16_F32BF16BF16_RS cutlass_MMA_64x16x16_F32BF16BF16_RS
#define MMA_64x32x16_F32BF16BF16_SS cutlass_MMA_64x32x16_F32BF16BF16_SS
#define MMA_64x32x16_F32BF16BF16_RS cutlass_MMA_64x32x16_F32BF16BF16_RS
#define MMA_64x64x16_F32BF16BF16_SS cutlass_MMA_64x64x16_F32BF16BF16_SS
#define MMA_64x64x16_F32BF16BF16_RS cutlass_MMA_64x64x16_F32BF16BF16_RS
#define MMA_64x96x16_F32BF16BF16_SS cutlass_MMA_64x96x16_F32BF16BF16_SS
#define MMA_64x96x16_F32BF16BF16_RS cutlass_MMA_64x96x16_F32BF16BF16_RS
#define MMA_64x128x16_F32BF16BF16_SS cutlass_MMA_64x128x16_F32BF16BF16_SS
#define MMA_64x128x16_F32BF16BF16_RS cutlass_MMA_64x128x16_F32BF16BF16_RS
#define MMA_64x192x16_F32BF16BF16_SS cutlass_MMA_64x192x16_F32BF16BF16_SS
#define MMA_64x192x16_F32BF16BF16_RS cutlass_MMA_64x192x16_F32BF16BF16_RS
#define MMA_64x256x16_F32BF16BF16_SS cutlass_MMA_64x256x16_F32BF16BF16_SS
#define MMA_64x256x16_F32BF16BF16_RS cutlass_MMA_64x256x16_F32BF16BF16_RS
#define MMA_64x8x16_F32F16F16_SS cutlass_MMA_64x8x16_F32F16F16_SS
#define MMA_64x8x16_F32F16F16_RS cutlass_MMA_64x8x16_F32F16F16_RS
#define MMA_64x16x16_F32F16F16_SS cutlass_MMA_64x16x16_F32F16F16_SS
#define MMA_64x16x16_F32F16F16_RS cutlass_MMA_64x16x16_F32F16F16_RS
#define MMA_64x32x16_F32F16F16_SS cutlass_MMA_64x32x16_F32F16F16_SS
#define MMA_64x32x16_F32F16F16_RS cutlass_MMA_64x32x16_F32F16F16_RS
#define MMA_64x64x16_F32F16F16_SS cutlass_MMA_64x64x16_F32F16F16_SS
#define MMA_64x64x16_F32F16F16_RS cutlass_MMA_64x64x16_F32F16F16_RS
#define MMA_64x96x16_F32F16F16_SS cutlass_MMA_64x96x16_F32F16F16_SS
#define MMA_64x96x16_F32F16F16_RS cutlass_MMA_64x96x16_F32F16F16_RS
#define MMA_64x128x16_F32F16F16_SS cutlass_MMA_64x128x16_F32F16F16_SS
#define MMA_64x128x16_F32F16F16_RS cutlass_MMA_64x128x16_F32F16F16_RS
#define MMA_64x192x16_F32F16F16_SS cutlass_MMA_64x192x16_F32F16F16_SS
#define MMA_64x192x16_F32F16F16_RS cutlass_MMA_64x192x16_F32F16F16_RS
#define MMA_64x256x16_F32F16F16_SS cutlass_MMA_64x256x16_F32F16F16_SS
#define MMA_64x256x16_F32F16F16_RS cutlass_MMA_64x256x16_F32F16F16_RS
#define MMA_64x8x8_F32TF32TF32_SS_TN cutlass_MMA_64x8x8_F32TF32TF32_SS_TN
#define MMA_64x8x8_F32TF32TF32_RS_TN cutlass_MMA_64x8x8_F32TF32TF32_RS_TN
#define MMA_64x16x8_F32TF32TF32_SS_TN cutlass_MMA_64x16x8_F32TF32TF32_SS_TN
#define MMA_64x16x8_F32TF32TF32_RS_TN cutlass_MMA_64x16x8_F32TF32TF32_RS_TN
#define MMA_64x32x8_F32TF32TF32_SS_TN cutlass_MMA_64x32x8_F32TF32TF32_SS_TN
#define MMA_64x32x8_F32TF32TF32_RS_TN cutlass_MMA_64x32x8_F32TF32TF32_RS_TN
#define MMA_64x64x8_F32TF32TF32_SS_TN cutlass_MMA_64x64x8_F32TF32TF32_SS_TN
#define MMA_64x64x8_F32TF32TF32_RS_TN cutlass_MMA_64x64x8_F32TF32TF32_RS_TN
#define MMA_64x96x8_F32TF32TF32_SS_TN cutlass_MMA_64x96x8_F32TF32TF32_SS_TN
#define MMA_64x96x8_F32TF32TF32_RS_TN cutlass_MMA_64x96x8_F32TF32TF32_RS_TN
#define MMA_64x128x8_F32TF32TF32_SS_TN cutlass_MMA_64x128x8_F32TF32TF32_SS_TN
#define MMA_64x128x8_F32TF32TF32_RS_TN cutlass_MMA_64x128x8_F32TF32TF32_RS_TN
#define MMA_64x192x8_F32TF32TF32_SS_TN cutlass_MMA_64x192x8_F32TF32TF32_SS_TN
#define MMA_64x192x8_F32TF32TF32_RS_TN cutlass_MMA_64x192x8_F32TF32TF32_RS_TN
#define MMA_64x256x8_F32TF32TF32_SS_TN cutlass_MMA_64x256x8_F32TF32TF32_SS_TN
#define MMA_64x256x8_F32TF32TF32_RS_TN cutlass_MMA_64x256x8_F32TF32TF32_RS_TN
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch
#undef MMA_64x8x16_F32BF16BF16_SS
#undef MMA_64x8x16_F32BF16BF16_RS
#undef MMA_64x16x16_F32BF16BF16_SS
#undef MMA_64x16x16_F32BF16BF16_RS
#undef MMA_64x32x16_F32BF16BF16_SS
#undef MMA_64x32x16_F32BF16BF16_RS
#undef MMA_64x64x16_F32BF16BF16_SS
#undef MMA_64x64x16_F32BF16BF16_RS
#undef MMA_64x96x16_F32BF16BF16_SS
#undef MMA_64x96x16_F32BF16BF16_RS
#undef MMA_64x128x16_F32BF16BF16_SS
#undef MMA_64x128x16_F32BF16BF16_RS
#undef MMA_64x192x16_F32BF16BF16_SS
#undef MMA_64x192x16_F32BF16BF16_RS
#undef MMA_64x256x16_F32BF16BF16_SS
#undef MMA_64x256x16_F32BF16BF16_RS
#undef MMA_64x8x16_F32F16F16_SS
#undef MMA_64x8x16_F32F16F16_RS
#undef MMA_64x16x16_F32F16F16_SS
#undef MMA_64x16x16_F32F16F16_RS
#undef MMA_64x32x16_F32F16F16_SS
#undef MMA_64x32x16_F32F16F16_RS
#undef MMA_64x64x16_F32F16F16_SS
#undef MMA_64x64x16_F32F16F16_RS
#undef MMA_64x96x16_F32F16F16_SS
#undef MMA_64x96x16_F32F16F16_RS
#undef MMA_64x128x16_F32F16F16_SS
#undef MMA_64x128x16_F32F16F16_RS
#undef MMA_64x192x16_F32F16F16_SS
#undef MMA_64x192x16_F32F16F16_RS
#undef MMA_64x256x16_F32F16F16_SS
#undef MMA_64x256x16_F32F16F16_RS
#undef MMA_64x8x8_F32TF32TF32_SS_TN
#undef MMA_64x8x8_F32TF32TF32_RS_TN
#undef MMA_64x16x8_F32TF32TF32_SS_TN
#undef MMA_64x16x8_F32TF32TF32_RS_TN
#undef MMA_64x32x8_F32TF32TF32_SS_TN
#undef MMA_64x32x8_F32TF32TF32_RS_TN
#undef MMA_64x64x8_F32TF32TF32_SS_TN
#undef MMA_64x64x8_F32TF32TF32_RS_TN
#undef MMA_64x96x8_F32TF32TF32_SS_TN
#undef MMA_64x96x8_F32TF32TF32_RS_TN
#undef MMA_64x128x8_F32TF32TF32_SS_TN
#undef MMA_64x128x8_F32TF32TF32_RS_TN
#undef MMA_64x192x8_F32TF32TF32_SS_TN
#undef MMA_64x192x8_F32TF32TF32_RS_TN
#undef MMA_64x256x8_F32TF32TF32_SS_TN
#undef MMA_64x256x8_F32TF32TF32_RS_TN

namespace cute {

[[gnu::always_inline]] inline void warpgroup_arrive() {
    lsm::emu::wgmma_fence();
}

template <int N>
[[gnu::always_inline]] inline void warpgroup_wait() {
    lsm::emu::wgmma_wait(N);
}

[[gnu::always_inline]] inline void warpgroup_commit_batch() {
    lsm::emu::wgmma_commit();
}

}  // namespace cute

namespace lsm::emu {

namespace gmma = cute::SM90::GMMA;

template <std::size_t>
using FloatAt = float;

template <class Original, Wgmma Kind, gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA,
          gmma::ScaleIn ScaleB, class Indices>
struct WgmmaShared;
template <class Original, Wgmma Kind, gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA,
          gmma::ScaleIn ScaleB, class Indices>
struct WgmmaRegisters;

template <Wgmma Kind, gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA, gmma::ScaleIn ScaleB>
constexpr WgmmaShape wgmma_shape(int n) {
    return {Kind,
            n,
            A == gmma::Major::MN,
            B == gmma::Major::MN,
            static_cast<int>(ScaleA),
            static_cast<int>(ScaleB)};
}

// CuTe takes the address of fma: a plain function with one reference per accumulator, N / 2 of
// them.
template <class Original, Wgmma Kind, gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA,
          gmma::ScaleIn ScaleB, std::size_t... I>
struct WgmmaShared<Original, Kind, A, B, ScaleA, ScaleB, std::index_sequence<I...>> : Original {
    [[gnu::always_inline]] static inline void fma(
        u64 const& a, u64 const& b, FloatAt<I>&... d,
        gmma::ScaleOut const scale_d = gmma::ScaleOut::One) {
        static constexpr WgmmaShape kShape =
            wgmma_shape<Kind, A, B, ScaleA, ScaleB>(2 * sizeof...(I));
        float* const accumulators[] = {&d...};
        wgmma(kShape, accumulators, a, nullptr, b, scale_d == gmma::ScaleOut::One);
    }
};

template <class Original, Wgmma Kind, gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA,
          gmma::ScaleIn ScaleB, std::size_t... I>
struct WgmmaRegisters<Original, Kind, A, B, ScaleA, ScaleB, std::index_sequence<I...>> : Original {
    [[gnu::always_inline]] static inline void fma(
        u32 const& a0, u32 const& a1, u32 const& a2, u32 const& a3, u64 const& b, FloatAt<I>&... d,
        gmma::ScaleOut const scale_d = gmma::ScaleOut::One) {
        static constexpr WgmmaShape kShape =
            wgmma_shape<Kind, A, B, ScaleA, ScaleB>(2 * sizeof...(I));
        float* const accumulators[] = {&d...};
        u32 const* const a[] = {&a0, &a1, &a2, &a3};
        wgmma(kShape, accumulators, 0, a, b, scale_d == gmma::ScaleOut::One);
    }
};

}  // namespace lsm::emu

namespace cute::SM90::GMMA {

#define LSM_WGMMA(name, base, kind, n)                                                           \
    template <Major A, Major B, ScaleIn ScaleA = ScaleIn::One, ScaleIn ScaleB = ScaleIn::One>    \
    struct name : lsm::emu::base<cutlass_##name<A, B, ScaleA, ScaleB>, lsm::emu::Wgmma::kind, A, \
                                 B, ScaleA, ScaleB, std::make_index_sequence<n / 2>> {};
#define LSM_WGMMA_TN(name, base, kind, n)                                                         \
    template <ScaleIn ScaleA = ScaleIn::One, ScaleIn ScaleB = ScaleIn::One>                       \
    struct name : lsm::emu::base<cutlass_##name<ScaleA, ScaleB>, lsm::emu::Wgmma::kind, Major::K, \
                                 Major::K, ScaleA, ScaleB, std::make_index_sequence<n / 2>> {};

LSM_WGMMA(MMA_64x8x16_F32BF16BF16_SS, WgmmaShared, bf16, 8)
LSM_WGMMA(MMA_64x8x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 8)
LSM_WGMMA(MMA_64x16x16_F32BF16BF16_SS, WgmmaShared, bf16, 16)
LSM_WGMMA(MMA_64x16x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 16)
LSM_WGMMA(MMA_64x32x16_F32BF16BF16_SS, WgmmaShared, bf16, 32)
LSM_WGMMA(MMA_64x32x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 32)
LSM_WGMMA(MMA_64x64x16_F32BF16BF16_SS, WgmmaShared, bf16, 64)
LSM_WGMMA(MMA_64x64x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 64)
LSM_WGMMA(MMA_64x96x16_F32BF16BF16_SS, WgmmaShared, bf16, 96)
LSM_WGMMA(MMA_64x96x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 96)
LSM_WGMMA(MMA_64x128x16_F32BF16BF16_SS, WgmmaShared, bf16, 128)
LSM_WGMMA(MMA_64x128x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 128)
LSM_WGMMA(MMA_64x192x16_F32BF16BF16_SS, WgmmaShared, bf16, 192)
LSM_WGMMA(MMA_64x192x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 192)
LSM_WGMMA(MMA_64x256x16_F32BF16BF16_SS, WgmmaShared, bf16, 256)
LSM_WGMMA(MMA_64x256x16_F32BF16BF16_RS, WgmmaRegisters, bf16, 256)
LSM_WGMMA(MMA_64x8x16_F32F16F16_SS, WgmmaShared, f16, 8)
LSM_WGMMA(MMA_64x8x16_F32F16F16_RS, WgmmaRegisters, f16, 8)
LSM_WGMMA(MMA_64x16x16_F32F16F16_SS, WgmmaShared, f16, 16)
LSM_WGMMA(MMA_64x16x16_F32F16F16_RS, WgmmaRegisters, f16, 16)
LSM_WGMMA(MMA_64x32x16_F32F16F16_SS, WgmmaShared, f16, 32)
LSM_WGMMA(MMA_64x32x16_F32F16F16_RS, WgmmaRegisters, f16, 32)
LSM_WGMMA(MMA_64x64x16_F32F16F16_SS, WgmmaShared, f16, 64)
LSM_WGMMA(MMA_64x64x16_F32F16F16_RS, WgmmaRegisters, f16, 64)
LSM_WGMMA(MMA_64x96x16_F32F16F16_SS, WgmmaShared, f16, 96)
LSM_WGMMA(MMA_64x96x16_F32F16F16_RS, WgmmaRegisters, f16, 96)
LSM_WGMMA(MMA_64x128x16_F32F16F16_SS, WgmmaShared, f16, 128)
LSM_WGMMA(MMA_64x128x16_F32F16F16_RS, WgmmaRegisters, f16, 128)
LSM_WGMMA(MMA_64x192x16_F32F16F16_SS, WgmmaShared, f16, 192)
LSM_WGMMA(MMA_64x192x16_F32F16F16_RS, WgmmaRegisters, f16, 192)
LSM_WGMMA(MMA_64x256x16_F32F16F16_SS, WgmmaShared, f16, 256)
LSM_WGMMA(MMA_64x256x16_F32F16F16_RS, WgmmaRegisters, f16, 256)
LSM_WGMMA_TN(MMA_64x8x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 8)
LSM_WGMMA_TN(MMA_64x8x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 8)
LSM_WGMMA_TN(MMA_64x16x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 16)
LSM_WGMMA_TN(MMA_64x16x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 16)
LSM_WGMMA_TN(MMA_64x32x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 32)
LSM_WGMMA_TN(MMA_64x32x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 32)
LSM_WGMMA_TN(MMA_64x64x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 64)
LSM_WGMMA_TN(MMA_64x64x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 64)
LSM_WGMMA_TN(MMA_64x96x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 96)
LSM_WGMMA_TN(MMA_64x96x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 96)
LSM_WGMMA_TN(MMA_64x128x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 128)
LSM_WGMMA_TN(MMA_64x128x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 128)
LSM_WGMMA_TN(MMA_64x192x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 192)
LSM_WGMMA_TN(MMA_64x192x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 192)
LSM_WGMMA_TN(MMA_64x256x8_F32TF32TF32_SS_TN, WgmmaShared, tf32, 256)
LSM_WGMMA_TN(MMA_64x256x8_F32TF32TF32_RS_TN, WgmmaRegisters, tf32, 256)

#undef LSM_WGMMA
#undef LSM_WGMMA_TN

}  // namespace cute::SM90::GMMA
