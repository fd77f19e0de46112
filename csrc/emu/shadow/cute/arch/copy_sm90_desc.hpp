// mbarriers through CuTe's functions, on the emulator.
#pragma once

#include "emu/emu.h"

#define initialize_barrier cutlass_initialize_barrier
#define set_barrier_transaction_bytes cutlass_set_barrier_transaction_bytes
#define wait_barrier cutlass_wait_barrier
#define arrive_barrier cutlass_arrive_barrier
#define prefetch_tma_descriptor cutlass_prefetch_tma_descriptor
#include_next <cute/arch/copy_sm90_desc.hpp>
#undef initialize_barrier
#undef set_barrier_transaction_bytes
#undef wait_barrier
#undef arrive_barrier
#undef prefetch_tma_descriptor

namespace cute {

[[gnu::always_inline]] inline void initialize_barrier(uint64_t& barrier, int thread_count = 1) {
    lsm::emu::mbarrier_init(lsm::emu::shared_offset(&barrier), static_cast<uint32_t>(thread_count));
}

[[gnu::always_inline]] inline void set_barrier_transaction_bytes(uint64_t& barrier,
                                                                 uint32_t bytes) {
    lsm::emu::mbarrier_arrive_expect_tx(lsm::emu::shared_offset(&barrier), bytes);
}

[[gnu::always_inline]] inline void wait_barrier(uint64_t& barrier, int phase_bit) {
    lsm::emu::mbarrier_wait_parity(lsm::emu::shared_offset(&barrier),
                                   static_cast<uint32_t>(phase_bit));
}

[[gnu::always_inline]] inline void arrive_barrier(uint64_t& barrier) {
    lsm::emu::mbarrier_arrive(lsm::emu::shared_offset(&barrier), 1);
}

inline void prefetch_tma_descriptor(TmaDescriptor const*) {}

}  // namespace cute
