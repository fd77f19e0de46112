// The race build: who accessed which bytes, and what orders the accesses. See race.cpp for the
// algorithm.
#pragma once

#include <memory>
#include <vector>

#include "emu/internal.h"

#pragma GCC visibility push(hidden)

namespace lsm::emu {

// What a thread knows of the others: the newest epoch of each that happened before its own present.
struct Clock {
    std::vector<u32> epochs;  // by thread of the block
};

namespace race {

enum class Kind : u8 {
    none,
    read,
    write,
    atomic,
    bulk
};  // bulk: written by TMA, past the generic proxy

void begin_launch();
void give_turn(u32 place);  // to the block there
void begin_block();
void end_block();  // throws if the block raced

// Everything before the call in any of the threads happens before everything after it in all of
// them.
void join(std::vector<Thread*> const& threads);
void join_warp(Warp const& warp, u32 mask);
// One-sided: what `thread` did so far is published in `clock`; acquire makes it known.
void release(Thread const& thread, std::shared_ptr<Clock>& clock);
void acquire(Thread const& thread, Clock const& clock);

// Of global memory (bounds.h).
void check_bounds(void const* address, u32 bytes, Kind kind, void const* site);
void access(Thread const& thread, void const* address, u32 bytes, Kind kind, void const* site);
// The same by the asynchronous proxy (wgmma, TMA): shared bytes written by plain stores must have
// been fenced for it.
void async_proxy_read(Thread const& thread, void const* address, u32 bytes, void const* site);
void proxy_fence(Thread const& thread);

// cp.async and TMA destinations: accesses between the two calls are errors.
void async_issue(Thread const& thread, void const* address, u32 bytes, void const* site);
void async_land(Thread const& thread, void const* address, u32 bytes, Kind kind, void const* site);
// The bytes stay those of the write that was issued, by a thread that may be far ahead by now.
void bulk_issue(Thread const& thread, void const* address, u32 bytes, void const* site);
void bulk_land(void const* address, u32 bytes);
void merge(std::shared_ptr<Clock>& into, std::shared_ptr<Clock> const& clock);

// Between blocks: what a thread did before its last fence is published by its next atomic, and
// known to whoever then does an atomic on the same address.
void global_fence(Thread const& thread);
void global_atomic(Thread const& thread, void const* address);

}  // namespace race
}  // namespace lsm::emu

#pragma GCC visibility pop
