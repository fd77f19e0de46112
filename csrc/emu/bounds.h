// Bounds of global memory, for tests.
#pragma once

namespace lsm::emu {

// Whether accesses outside of all allocations are reported: the race build does it where the process runs under
// AddressSanitizer's library, whose allocator keeps room around every one.
bool checks_bounds();

}  // namespace lsm::emu
