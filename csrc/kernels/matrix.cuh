// Tensor-core instructions, through CuTe's ops. Apart from platform.cuh: CuTe's headers take longer to compile than many
// a kernel that has no use for them.
#pragma once

#include "kernels/platform.cuh"

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

namespace lsm {

// Four 8x8 b16 matrices; lane l gives the address of row l % 8 of matrix l / 8.
LSM_DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    cute::SM75_U32x4_LDSM_N::copy(at_shared<cute::uint128_t const>(address), r[0], r[1], r[2],
                                  r[3]);
}

LSM_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    cute::SM75_U16x8_LDSM_T::copy(at_shared<cute::uint128_t const>(address), r[0], r[1], r[2],
                                  r[3]);
}

// Transposes an 8x8 b16 matrix: lane l holds row l / 4, columns 2 (l % 4) and the next, before and after.
LSM_DEVICE u32 movmatrix(u32 value) {
    u32 transposed;
    cute::SM75_U32x1_MOVM_T::copy(value, transposed);
    return transposed;
}

// d += a · b on one 16x8x16 tile, fp32 accumulators. Fragment maps as in the PTX manual (m16n8k16).
LSM_DEVICE void mma_16x8x16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1, bf16 const*) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0,
                                              b1, d[0], d[1], d[2], d[3]);
}

LSM_DEVICE void mma_16x8x16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1, half const*) {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1,
                                            d[0], d[1], d[2], d[3]);
}

}  // namespace lsm
