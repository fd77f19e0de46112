// elect.sync on the emulator. Clusters of more than one block are not emulated.
#pragma once

#include "emu/emu.h"

#define elect_one_sync cutlass_elect_one_sync
#include_next <cute/arch/cluster_sm90.hpp>
#undef elect_one_sync

namespace cute {

[[gnu::always_inline]] inline uint32_t elect_one_sync() {
    return lsm::emu::elect_one();
}

}  // namespace cute
