// Block-wide and named barriers, and what must be uniform over a warpgroup.
#include <algorithm>

#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/race.h"

namespace lsm::emu {
namespace {

void complete(Barrier& b, Reduce reduce) {
    ++counters.block_barriers;
    world.passed_barrier = true;
    int result = 0;
    int const waiting = static_cast<int>(b.waiting.size());
    switch (reduce) {
        case Reduce::none:
            break;
        case Reduce::count:
            result = b.predicates;
            break;
        case Reduce::all:
            result = b.predicates == waiting;
            break;
        case Reduce::any:
            result = b.predicates > 0;
            break;
    }
    if constexpr (kRace) {
        if (b.clock == nullptr) {
            race::join(b.waiting);
        } else {
            for (Thread* t : b.waiting) race::release(*t, b.clock);
            for (Thread* t : b.waiting) race::acquire(*t, *b.clock);
        }
    }
    for (Thread* t : b.waiting) {
        t->result = result;
        if (t != world.current) wake(*t);
    }
    b.arrived = b.expected = 0;
    b.predicates = 0;
    b.clock = nullptr;
    b.waiting.clear();
    for (u32 w = 0; w < world.warp_count; ++w) {
        Warp& warp = world.warps[w];
        if (warp.has_accesses && warp.ready == warp.alive) flush_accesses(warp);
    }
}

void enter(Barrier& b, u32 index, u32 threads, char const* name, void const* site) {
    Thread& t = *world.current;
    if (b.arrived == 0) {
        b.expected = threads;
        b.site = site;
    } else if (b.expected != threads) {
        fail("barrier mismatch: " + describe_thread(t) + " expects " + std::to_string(threads) +
             " threads at barrier " + std::to_string(index) + " (" + name + " at " +
             describe_site(site) + "), others expect " + std::to_string(b.expected) + " (at " +
             describe_site(b.site) + ")");
    }
    ++b.arrived;
}

void check_named(u32 index, u32 threads, char const* name, void const* site) {
    if (index >= kBarriers)
        fail_at(std::string(name) + ": there is no barrier " + std::to_string(index), site);
    if (threads == 0 || threads % 32 != 0 || threads > world.warp_count * 32) {
        fail_at(std::string(name) + ": " + std::to_string(threads) +
                    " threads cannot meet in this block",
                site);
    }
}

int synchronise(u32 index, u32 threads, Reduce reduce, int predicate, char const* name,
                void const* site) {
    Thread& t = *world.current;
    Barrier& b = world.barriers[index];
    enter(b, index, threads, name, site);
    b.predicates += predicate != 0;
    b.waiting.push_back(&t);
    if (b.arrived == b.expected) {
        complete(b, reduce);
    } else {
        wait_here(name, site);
    }
    return t.result;
}

}  // namespace

int syncthreads(Reduce reduce, int predicate) {
    return synchronise(0, world.thread_count, reduce, predicate, "__syncthreads", LSM_EMU_SITE);
}

void barrier_sync(u32 barrier, u32 threads) {
    check_named(barrier, threads, "bar.sync", LSM_EMU_SITE);
    synchronise(barrier, threads, Reduce::none, 0, "bar.sync", LSM_EMU_SITE);
}

void barrier_arrive(u32 barrier, u32 threads) {
    void const* const site = LSM_EMU_SITE;
    check_named(barrier, threads, "bar.arrive", site);
    Barrier& b = world.barriers[barrier];
    enter(b, barrier, threads, "bar.arrive", site);
    if constexpr (kRace) race::release(*world.current, b.clock);
    if (b.arrived == b.expected) complete(b, Reduce::none);
}

void fence_proxy_async() {
    if constexpr (kRace) race::proxy_fence(*world.current);
}

void check_block_exit() {
    check_mbarriers_at_exit();
    for (u32 i = 0; i < kBarriers; ++i) {
        Barrier const& b = world.barriers[i];
        if (b.arrived != 0) {
            fail("barrier " + std::to_string(i) + " was left with " + std::to_string(b.arrived) +
                 " of " + std::to_string(b.expected) + " arrivals, first at " +
                 describe_site(b.site));
        }
    }
    for (Warpgroup const& g : world.warpgroups) {
        if (!g.pending.empty()) {
            fail("the block ended with a wgmma in flight, issued at " +
                 describe_site(g.pending.front().site));
        }
    }
}

}  // namespace lsm::emu
