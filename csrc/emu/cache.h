// A second-level cache, where one was asked for: which of the counted accesses go to memory.
#pragma once

#include "emu/emu.h"

#pragma GCC visibility push(hidden)

namespace lsm::emu {

constexpr u32 kCacheLine = 64;

void set_cache(u64 bytes);  // how much it holds, 0: there is none; empty at first
void empty_cache();
bool has_cache();

// Adds to the running launch's memory_read_bytes and memory_write_bytes what this access causes.
void cache_access(u64 address, u64 bytes, bool reads, bool writes);

// One lane's prefetch of the 32-byte sector at `address`: nothing is asked for, but it is brought.
void note_prefetch(void const* address);

}  // namespace lsm::emu

#pragma GCC visibility pop
