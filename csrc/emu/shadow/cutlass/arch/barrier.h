// Named barriers and mbarriers through CUTLASS's classes, on the emulator, for one block.
#pragma once

#include "emu/emu.h"

#define NamedBarrier cutlass_NamedBarrier
#define ClusterBarrier cutlass_ClusterBarrier
#define ClusterTransactionBarrier cutlass_ClusterTransactionBarrier
#define fence_barrier_init cutlass_fence_barrier_init
#define fence_view_async_shared cutlass_fence_view_async_shared
#define cpasync_barrier_arrive cutlass_cpasync_barrier_arrive
#define cpasync_barrier_arrive_noinc cutlass_cpasync_barrier_arrive_noinc
#include_next <cutlass/arch/barrier.h>
#undef NamedBarrier
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef fence_barrier_init
#undef fence_view_async_shared
#undef cpasync_barrier_arrive
#undef cpasync_barrier_arrive_noinc

namespace cutlass::arch {

class NamedBarrier {
  public:
    NamedBarrier(uint32_t threads, uint32_t id) : threads_(threads), id_(id + kReserved) {}
    NamedBarrier(uint32_t threads, ReservedNamedBarriers id)
        : threads_(threads), id_(static_cast<uint32_t>(id)) {}

    [[gnu::always_inline]] void arrive_and_wait() const { lsm::emu::barrier_sync(id_, threads_); }
    [[gnu::always_inline]] void arrive() const { lsm::emu::barrier_arrive(id_, threads_); }
    [[gnu::always_inline]] void sync() const { lsm::emu::barrier_sync(id_, threads_); }

    [[gnu::always_inline]] static void arrive_and_wait(uint32_t threads, uint32_t id) {
        lsm::emu::barrier_sync(id + kReserved, threads);
    }
    [[gnu::always_inline]] static void arrive_and_wait(uint32_t threads, ReservedNamedBarriers id) {
        lsm::emu::barrier_sync(static_cast<uint32_t>(id), threads);
    }
    [[gnu::always_inline]] static void arrive(uint32_t threads, uint32_t id) {
        lsm::emu::barrier_arrive(id + kReserved, threads);
    }
    [[gnu::always_inline]] static void arrive(uint32_t threads, ReservedNamedBarriers id) {
        lsm::emu::barrier_arrive(static_cast<uint32_t>(id), threads);
    }
    [[gnu::always_inline]] static void sync(uint32_t threads, uint32_t id) {
        arrive_and_wait(threads, id);
    }
    [[gnu::always_inline]] static void sync(uint32_t threads, ReservedNamedBarriers id) {
        arrive_and_wait(threads, id);
    }

  private:
    static constexpr uint32_t kReserved = cutlass_NamedBarrier::ReservedNamedBarrierCount;
    uint32_t threads_, id_;
};

struct ClusterBarrier {
    using ValueType = uint64_t;

    [[gnu::always_inline]] void init(uint32_t count) const { init(&barrier_, count); }
    [[gnu::always_inline]] bool test_wait(uint32_t phase, uint32_t wanted = true) const {
        return test_wait(&barrier_, phase, wanted);
    }
    [[gnu::always_inline]] bool try_wait(uint32_t phase) const {
        return try_wait(&barrier_, phase);
    }
    [[gnu::always_inline]] void wait(uint32_t phase) const { wait(&barrier_, phase); }
    [[gnu::always_inline]] void arrive() const { arrive(&barrier_); }

    [[gnu::always_inline]] static void init(ValueType const* p, uint32_t count) {
        lsm::emu::mbarrier_init(lsm::emu::shared_offset(p), count);
    }
    [[gnu::always_inline]] static void wait(ValueType const* p, uint32_t phase) {
        lsm::emu::mbarrier_wait_parity(lsm::emu::shared_offset(p), phase);
    }
    [[gnu::always_inline]] static bool test_wait(ValueType const* p, uint32_t phase,
                                                 uint32_t wanted) {
        return wanted != 0 && lsm::emu::mbarrier_test_parity(lsm::emu::shared_offset(p), phase);
    }
    [[gnu::always_inline]] static bool try_wait(ValueType const* p, uint32_t phase) {
        return lsm::emu::mbarrier_test_parity(lsm::emu::shared_offset(p), phase);
    }
    [[gnu::always_inline]] static void arrive(ValueType const* p) {
        lsm::emu::mbarrier_arrive(lsm::emu::shared_offset(p), 1);
    }
    [[gnu::always_inline]] static void invalidate(ValueType const* p) {
        lsm::emu::mbarrier_invalidate(lsm::emu::shared_offset(p));
    }

  protected:
    ValueType barrier_;
};

struct ClusterTransactionBarrier : ClusterBarrier {
    [[gnu::always_inline]] void arrive_and_expect_tx(uint32_t bytes) const {
        arrive_and_expect_tx(&barrier_, bytes);
    }
    [[gnu::always_inline]] void expect_transaction(uint32_t bytes) const {
        expect_transaction(&barrier_, bytes);
    }
    [[gnu::always_inline]] void complete_transaction(uint32_t bytes, uint32_t wanted = 1) const {
        if (wanted != 0) lsm::emu::mbarrier_complete_tx(lsm::emu::shared_offset(&barrier_), bytes);
    }

    [[gnu::always_inline]] static void arrive_and_expect_tx(ValueType const* p, uint32_t bytes) {
        lsm::emu::mbarrier_arrive_expect_tx(lsm::emu::shared_offset(p), bytes);
    }
    [[gnu::always_inline]] static void expect_transaction(ValueType const* p, uint32_t bytes) {
        lsm::emu::mbarrier_expect_tx(lsm::emu::shared_offset(p), bytes);
    }
};

// The barrier that has to follow it orders the initialisation.
inline void fence_barrier_init() {}

[[gnu::always_inline]] inline void fence_view_async_shared() {
    lsm::emu::fence_proxy_async();
}

[[gnu::always_inline]] inline void cpasync_barrier_arrive(uint64_t const* p) {
    lsm::emu::cp_async_mbarrier_arrive(lsm::emu::shared_offset(p), false);
}
[[gnu::always_inline]] inline void cpasync_barrier_arrive_noinc(uint64_t const* p) {
    lsm::emu::cp_async_mbarrier_arrive(lsm::emu::shared_offset(p), true);
}

}  // namespace cutlass::arch
