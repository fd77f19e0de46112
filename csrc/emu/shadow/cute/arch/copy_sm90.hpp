// stmatrix on the emulator.
#pragma once

#include "emu/emu.h"

#define SM90_U32x1_STSM_N cutlass_SM90_U32x1_STSM_N
#define SM90_U32x2_STSM_N cutlass_SM90_U32x2_STSM_N
#define SM90_U32x4_STSM_N cutlass_SM90_U32x4_STSM_N
#define SM90_U16x2_STSM_T cutlass_SM90_U16x2_STSM_T
#define SM90_U16x4_STSM_T cutlass_SM90_U16x4_STSM_T
#define SM90_U16x8_STSM_T cutlass_SM90_U16x8_STSM_T
#include_next <cute/arch/copy_sm90.hpp>
#undef SM90_U32x1_STSM_N
#undef SM90_U32x2_STSM_N
#undef SM90_U32x4_STSM_N
#undef SM90_U16x2_STSM_T
#undef SM90_U16x4_STSM_T
#undef SM90_U16x8_STSM_T

namespace lsm::emu {

template <class Original, bool Transposed, int Count>
struct Stmatrix;

template <class Original, bool Transposed>
struct Stmatrix<Original, Transposed, 1> : Original {
    [[gnu::always_inline]] static inline void copy(u32 const& r0, cute::uint128_t& destination) {
        stmatrix(&r0, 1, Transposed, shared_offset(&destination));
    }
};

template <class Original, bool Transposed>
struct Stmatrix<Original, Transposed, 2> : Original {
    [[gnu::always_inline]] static inline void copy(u32 const& r0, u32 const& r1,
                                                   cute::uint128_t& destination) {
        u32 const r[2] = {r0, r1};
        stmatrix(r, 2, Transposed, shared_offset(&destination));
    }
};

template <class Original, bool Transposed>
struct Stmatrix<Original, Transposed, 4> : Original {
    [[gnu::always_inline]] static inline void copy(u32 const& r0, u32 const& r1, u32 const& r2,
                                                   u32 const& r3, cute::uint128_t& destination) {
        u32 const r[4] = {r0, r1, r2, r3};
        stmatrix(r, 4, Transposed, shared_offset(&destination));
    }
};

}  // namespace lsm::emu

namespace cute {

struct SM90_U32x1_STSM_N : lsm::emu::Stmatrix<cutlass_SM90_U32x1_STSM_N, false, 1> {};
struct SM90_U32x2_STSM_N : lsm::emu::Stmatrix<cutlass_SM90_U32x2_STSM_N, false, 2> {};
struct SM90_U32x4_STSM_N : lsm::emu::Stmatrix<cutlass_SM90_U32x4_STSM_N, false, 4> {};
struct SM90_U16x2_STSM_T : lsm::emu::Stmatrix<cutlass_SM90_U16x2_STSM_T, true, 1> {};
struct SM90_U16x4_STSM_T : lsm::emu::Stmatrix<cutlass_SM90_U16x4_STSM_T, true, 2> {};
struct SM90_U16x8_STSM_T : lsm::emu::Stmatrix<cutlass_SM90_U16x8_STSM_T, true, 4> {};

}  // namespace cute
