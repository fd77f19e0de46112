// setmaxnreg on the emulator: only checked to be uniform over the warpgroup.
#pragma once

#include "emu/emu.h"

#define warpgroup_reg_alloc cutlass_warpgroup_reg_alloc
#define warpgroup_reg_dealloc cutlass_warpgroup_reg_dealloc
#include_next <cutlass/arch/reg_reconfig.h>
#undef warpgroup_reg_alloc
#undef warpgroup_reg_dealloc

namespace cutlass::arch {

template <uint32_t Count>
[[gnu::always_inline]] inline void warpgroup_reg_alloc() {
    static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
    lsm::emu::require_warpgroup_uniform("setmaxnreg", Count);
}

template <uint32_t Count>
[[gnu::always_inline]] inline void warpgroup_reg_dealloc() {
    warpgroup_reg_alloc<Count>();
}

}  // namespace cutlass::arch
