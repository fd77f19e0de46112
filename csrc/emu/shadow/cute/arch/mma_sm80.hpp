// mma.sync on the emulator: each op keeps CUTLASS's register types and gets a new fma.
#pragma once

#include "emu/emu.h"

#define SM80_16x8x8_F32BF16BF16F32_TN cutlass_SM80_16x8x8_F32BF16BF16F32_TN
#define SM80_16x8x16_F32BF16BF16F32_TN cutlass_SM80_16x8x16_F32BF16BF16F32_TN
#define SM80_16x8x8_F32F16F16F32_TN cutlass_SM80_16x8x8_F32F16F16F32_TN
#define SM80_16x8x16_F32F16F16F32_TN cutlass_SM80_16x8x16_F32F16F16F32_TN
#define SM80_16x8x4_F32TF32TF32F32_TN cutlass_SM80_16x8x4_F32TF32TF32F32_TN
#define SM80_16x8x8_F32TF32TF32F32_TN cutlass_SM80_16x8x8_F32TF32TF32F32_TN
#define SM80_16x8x16_S32S8S8S32_TN cutlass_SM80_16x8x16_S32S8S8S32_TN
#define SM80_16x8x32_S32S8S8S32_TN cutlass_SM80_16x8x32_S32S8S8S32_TN
#include_next <cute/arch/mma_sm80.hpp>
#undef SM80_16x8x8_F32BF16BF16F32_TN
#undef SM80_16x8x16_F32BF16BF16F32_TN
#undef SM80_16x8x8_F32F16F16F32_TN
#undef SM80_16x8x16_F32F16F16F32_TN
#undef SM80_16x8x4_F32TF32TF32F32_TN
#undef SM80_16x8x8_F32TF32TF32F32_TN
#undef SM80_16x8x16_S32S8S8S32_TN
#undef SM80_16x8x32_S32S8S8S32_TN

namespace lsm::emu {

// D is float or uint32_t; two registers of A and one of B, or four and two.
template <Mma Kind, class Original, class D>
struct MmaHalf : Original {
    [[gnu::always_inline]] static inline void fma(D& d0, D& d1, D& d2, D& d3, u32 const& a0,
                                                  u32 const& a1, u32 const& b0, D const& c0,
                                                  D const& c1, D const& c2, D const& c3) {
        D d[4] = {c0, c1, c2, c3};
        u32 const a[2] = {a0, a1}, b[1] = {b0};
        mma(Kind, d, a, b);
        d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
    }
};

template <Mma Kind, class Original, class D>
struct MmaFull : Original {
    [[gnu::always_inline]] static inline void fma(D& d0, D& d1, D& d2, D& d3, u32 const& a0,
                                                  u32 const& a1, u32 const& a2, u32 const& a3,
                                                  u32 const& b0, u32 const& b1, D const& c0,
                                                  D const& c1, D const& c2, D const& c3) {
        D d[4] = {c0, c1, c2, c3};
        u32 const a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
        mma(Kind, d, a, b);
        d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
    }
};

}  // namespace lsm::emu

namespace cute {

struct SM80_16x8x8_F32BF16BF16F32_TN
    : lsm::emu::MmaHalf<lsm::emu::Mma::bf16_k8, cutlass_SM80_16x8x8_F32BF16BF16F32_TN, float> {};
struct SM80_16x8x16_F32BF16BF16F32_TN
    : lsm::emu::MmaFull<lsm::emu::Mma::bf16_k16, cutlass_SM80_16x8x16_F32BF16BF16F32_TN, float> {};
struct SM80_16x8x8_F32F16F16F32_TN
    : lsm::emu::MmaHalf<lsm::emu::Mma::f16_k8, cutlass_SM80_16x8x8_F32F16F16F32_TN, float> {};
struct SM80_16x8x16_F32F16F16F32_TN
    : lsm::emu::MmaFull<lsm::emu::Mma::f16_k16, cutlass_SM80_16x8x16_F32F16F16F32_TN, float> {};
struct SM80_16x8x4_F32TF32TF32F32_TN
    : lsm::emu::MmaHalf<lsm::emu::Mma::tf32_k4, cutlass_SM80_16x8x4_F32TF32TF32F32_TN, float> {};
struct SM80_16x8x8_F32TF32TF32F32_TN
    : lsm::emu::MmaFull<lsm::emu::Mma::tf32_k8, cutlass_SM80_16x8x8_F32TF32TF32F32_TN, float> {};
struct SM80_16x8x16_S32S8S8S32_TN
    : lsm::emu::MmaHalf<lsm::emu::Mma::s8_k16, cutlass_SM80_16x8x16_S32S8S8S32_TN, uint32_t> {};
struct SM80_16x8x32_S32S8S8S32_TN
    : lsm::emu::MmaFull<lsm::emu::Mma::s8_k32, cutlass_SM80_16x8x32_S32S8S8S32_TN, uint32_t> {};

}  // namespace cute
