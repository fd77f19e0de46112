// ldmatrix and movmatrix on the emulator.
#pragma once

#include "emu/emu.h"

#define SM75_U32x1_LDSM_N cutlass_SM75_U32x1_LDSM_N
#define SM75_U32x2_LDSM_N cutlass_SM75_U32x2_LDSM_N
#define SM75_U32x4_LDSM_N cutlass_SM75_U32x4_LDSM_N
#define SM75_U16x2_LDSM_T cutlass_SM75_U16x2_LDSM_T
#define SM75_U16x4_LDSM_T cutlass_SM75_U16x4_LDSM_T
#define SM75_U16x8_LDSM_T cutlass_SM75_U16x8_LDSM_T
#define SM75_U32x1_MOVM_T cutlass_SM75_U32x1_MOVM_T
#include_next <cute/arch/copy_sm75.hpp>
#undef SM75_U32x1_LDSM_N
#undef SM75_U32x2_LDSM_N
#undef SM75_U32x4_LDSM_N
#undef SM75_U16x2_LDSM_T
#undef SM75_U16x4_LDSM_T
#undef SM75_U16x8_LDSM_T
#undef SM75_U32x1_MOVM_T

namespace lsm::emu {

template <class Original, bool Transposed>
struct Ldmatrix : Original {
    template <class... R>
    [[gnu::always_inline]] static inline void copy(cute::uint128_t const& source, R&... registers) {
        u32 r[sizeof...(R)];
        ldmatrix(r, sizeof...(R), Transposed, shared_offset(&source));
        u32 i = 0;
        ((registers = r[i++]), ...);
    }
};

}  // namespace lsm::emu

namespace cute {

struct SM75_U32x1_LDSM_N : lsm::emu::Ldmatrix<cutlass_SM75_U32x1_LDSM_N, false> {};
struct SM75_U32x2_LDSM_N : lsm::emu::Ldmatrix<cutlass_SM75_U32x2_LDSM_N, false> {};
struct SM75_U32x4_LDSM_N : lsm::emu::Ldmatrix<cutlass_SM75_U32x4_LDSM_N, false> {};
struct SM75_U16x2_LDSM_T : lsm::emu::Ldmatrix<cutlass_SM75_U16x2_LDSM_T, true> {};
struct SM75_U16x4_LDSM_T : lsm::emu::Ldmatrix<cutlass_SM75_U16x4_LDSM_T, true> {};
struct SM75_U16x8_LDSM_T : lsm::emu::Ldmatrix<cutlass_SM75_U16x8_LDSM_T, true> {};

struct SM75_U32x1_MOVM_T : cutlass_SM75_U32x1_MOVM_T {
    [[gnu::always_inline]] static inline void copy(uint32_t const& source, uint32_t& destination) {
        destination = lsm::emu::movmatrix(source);
    }
};

}  // namespace cute
