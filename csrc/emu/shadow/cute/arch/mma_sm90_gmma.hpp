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
#define MMA_64x8x32_S32S8S8_SS_TN cutlass_MMA_64x8x32_S32S8S8_SS_TN
#define MMA_64x8x32_S32S8S8_RS_TN cutlass_MMA_64x8x32_S32S8S8_RS_TN
#define MMA_64x16x32_S32S8S8_SS_TN cutlass_MMA_64x16x32_S32S8S8_SS_TN
#define MMA_64x16x32_S32S8S8_RS_TN cutlass_MMA_64x16x32_S32S8S8_RS_TN
#define MMA_64x32x32_S32S8S8_SS_TN cutlass_MMA_64x32x32_S32S8S8_SS_TN
#define MMA_64x32x32_S32S8S8_RS_TN cutlass_MMA_64x32x32_S32S8S8_RS_TN
#define MMA_64x64x32_S32S8S8_SS_TN cutlass_MMA_64x64x32_S32S8S8_SS_TN
#define MMA_64x64x32_S32S8S8_RS_TN cutlass_MMA_64x64x32_S32S8S8_RS_TN
#define MMA_64x96x32_S32S8S8_SS_TN cutlass_MMA_64x96x32_S32S8S8_SS_TN
#define MMA_64x96x32_S32S8S8_RS_TN cutlass_MMA_64x96x32_S32S8S8_RS_TN
#define MMA_64x128x32_S32S8S8_SS_TN cutlass_MMA_64x128x32_S32S8S8_SS_TN
#define MMA_64x128x32_S32S8S8_RS_TN cutlass_MMA_64x128x32_S32S8S8_RS_TN
#define MMA_64x192x32_S32S8S8_SS_TN cutlass_MMA_64x192x32_S32S8S8_SS_TN
#define MMA_64x192x32_S32S8S8_RS_TN cutlass_MMA_64x192x32_S32S8S8_RS_TN
#define MMA_64x256x32_S32S8S8_SS_TN cutlass_MMA_64x256x32_S32S8S8_SS_TN
#define MMA_64x256x32_S32S8S8_RS_TN cutlass_MMA_64x256x32_S32S8S8_RS_TN
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
#undef MMA_64x8x32_S32S8S8_SS_TN
#undef MMA_64x8x32_S32S8S8_RS_TN
#undef MMA_64x16x32_S32S8S8_SS_TN
#undef MMA_64x16x32_S32S8S8_RS_TN
#undef MMA_64x32x32_S32S8S8_SS_TN
#undef MMA_64x32x32_S32S8S8_RS_TN
#undef MMA_64x64x32_S32S8S8_SS_TN
#undef MMA_64x64x32_S32S8S8_RS_TN
#undef MMA_64x96x32_S32S8S8_SS_TN
#undef MMA_64x96x32_S32S8S8_RS_TN
#undef MMA_64x128x32_S32S8S8_SS_TN
#undef MMA_64x128x32_S32S8S8_RS_TN
#undef MMA_64x192x32_S32S8S8_SS_TN
#undef MMA_64x192x32_S32S8S8_RS_TN
#undef MMA_64x256x32_S32S8S8_SS_TN
#undef MMA_64x256x32_S32S8S8_RS_TN

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

template <gmma::Major A, gmma::Major B, gmma::ScaleIn ScaleA, gmma::ScaleIn ScaleB>
struct WgmmaOptions {
    static constexpr WgmmaShape shape(Wgmma kind, std::size_t n) {
        return {kind,
                static_cast<int>(n),
                A == gmma::Major::MN,
                B == gmma::Major::MN,
                static_cast<int>(ScaleA),
                static_cast<int>(ScaleB)};
    }
};

// float, or uint32_t for int8.
template <class Original, std::size_t>
using Accumulator = std::remove_extent_t<typename Original::CRegisters>;

// CuTe takes the address of fma: a plain function with one reference per accumulator, N / 2 of
// them.
template <class Original, Wgmma Kind, class Options,
          class Indices = std::make_index_sequence<std::extent_v<typename Original::CRegisters>>>
struct WgmmaShared;
template <class Original, Wgmma Kind, class Options,
          class Indices = std::make_index_sequence<std::extent_v<typename Original::CRegisters>>>
struct WgmmaRegisters;
template <class Original, Wgmma Kind, class Options>
using WgmmaOp = std::conditional_t<std::extent_v<typename Original::ARegisters> == 1,
                                   WgmmaShared<Original, Kind, Options>,
                                   WgmmaRegisters<Original, Kind, Options>>;

template <class Original, Wgmma Kind, class Options, std::size_t... I>
struct WgmmaShared<Original, Kind, Options, std::index_sequence<I...>> : Original {
    [[gnu::always_inline]] static inline void fma(
        u64 const& a, u64 const& b, Accumulator<Original, I>&... d,
        gmma::ScaleOut const scale_d = gmma::ScaleOut::One) {
        static constexpr WgmmaShape kShape = Options::shape(Kind, 2 * sizeof...(I));
        void* const accumulators[] = {&d...};
        wgmma(kShape, accumulators, a, nullptr, b, scale_d == gmma::ScaleOut::One);
    }
};

template <class Original, Wgmma Kind, class Options, std::size_t... I>
struct WgmmaRegisters<Original, Kind, Options, std::index_sequence<I...>> : Original {
    [[gnu::always_inline]] static inline void fma(
        u32 const& a0, u32 const& a1, u32 const& a2, u32 const& a3, u64 const& b,
        Accumulator<Original, I>&... d, gmma::ScaleOut const scale_d = gmma::ScaleOut::One) {
        static constexpr WgmmaShape kShape = Options::shape(Kind, 2 * sizeof...(I));
        void* const accumulators[] = {&d...};
        u32 const* const a[] = {&a0, &a1, &a2, &a3};
        wgmma(kShape, accumulators, 0, a, b, scale_d == gmma::ScaleOut::One);
    }
};

}  // namespace lsm::emu

namespace cute::SM90::GMMA {

#define LSM_WGMMA(name, kind)                                                                    \
    template <Major A, Major B, ScaleIn ScaleA = ScaleIn::One, ScaleIn ScaleB = ScaleIn::One>    \
    struct name : lsm::emu::WgmmaOp<cutlass_##name<A, B, ScaleA, ScaleB>, lsm::emu::Wgmma::kind, \
                                    lsm::emu::WgmmaOptions<A, B, ScaleA, ScaleB>> {};
#define LSM_WGMMA_TN(name, kind)                                                                  \
    template <ScaleIn ScaleA = ScaleIn::One, ScaleIn ScaleB = ScaleIn::One>                       \
    struct name : lsm::emu::WgmmaOp<cutlass_##name<ScaleA, ScaleB>, lsm::emu::Wgmma::kind,        \
                                    lsm::emu::WgmmaOptions<Major::K, Major::K, ScaleA, ScaleB>> { \
    };
#define LSM_WGMMA_INT8(name)                               \
    struct name : lsm::emu::WgmmaOp<                       \
                      cutlass_##name, lsm::emu::Wgmma::s8, \
                      lsm::emu::WgmmaOptions<Major::K, Major::K, ScaleIn::One, ScaleIn::One>> {};

LSM_WGMMA(MMA_64x8x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x8x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x16x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x16x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x32x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x32x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x64x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x64x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x96x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x96x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x128x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x128x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x192x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x192x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x256x16_F32BF16BF16_SS, bf16)
LSM_WGMMA(MMA_64x256x16_F32BF16BF16_RS, bf16)
LSM_WGMMA(MMA_64x8x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x8x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x16x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x16x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x32x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x32x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x64x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x64x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x96x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x96x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x128x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x128x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x192x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x192x16_F32F16F16_RS, f16)
LSM_WGMMA(MMA_64x256x16_F32F16F16_SS, f16)
LSM_WGMMA(MMA_64x256x16_F32F16F16_RS, f16)
LSM_WGMMA_TN(MMA_64x8x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x8x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x16x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x16x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x32x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x32x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x64x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x64x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x96x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x96x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x128x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x128x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x192x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x192x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_TN(MMA_64x256x8_F32TF32TF32_SS_TN, tf32)
LSM_WGMMA_TN(MMA_64x256x8_F32TF32TF32_RS_TN, tf32)
LSM_WGMMA_INT8(MMA_64x8x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x8x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x16x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x16x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x32x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x32x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x64x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x64x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x96x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x96x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x128x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x128x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x192x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x192x32_S32S8S8_RS_TN)
LSM_WGMMA_INT8(MMA_64x256x32_S32S8S8_SS_TN)
LSM_WGMMA_INT8(MMA_64x256x32_S32S8S8_RS_TN)

#undef LSM_WGMMA
#undef LSM_WGMMA_TN
#undef LSM_WGMMA_INT8

}  // namespace cute::SM90::GMMA
