// What a launch did, counted: traffic by sector, bank conflicts, matrix FLOPs. Read by tests in
// place of a profiler.
#pragma once

#include <string>
#include <vector>

#include "emu/emu.h"

#pragma GCC visibility push(hidden)

namespace lsm::emu {

struct Thread;
struct Warp;
enum class AccessKind : u8;

struct Counters {
    u64 launches, blocks;
    u64 global_read_bytes, global_write_bytes;      // asked for, by counted accesses
    u64 global_read_sectors, global_write_sectors;  // 32-byte sectors touched per warp instruction
    u64 global_reads, global_writes;                // warp instructions
    u64 async_bytes;  // the part of the reads that came by cp.async or TMA
    u64 memory_read_bytes, memory_write_bytes;  // past the cache (cache.h), if there is one
    u64 mma_flops, mma_instructions;
    u64 ldmatrix, ldmatrix_wavefronts,
        ldmatrix_conflicts;  // stmatrix too; conflicts: wavefronts above the ideal
    // load_shared, store_shared, cp.async; in the race build through plain pointers too
    u64 shared_accesses, shared_wavefronts, shared_conflicts;
    u64 atomics;
    u64 block_barriers, warp_operations;
};

struct CounterField {
    char const* name;
    u64 Counters::* member;
};
extern CounterField const kCounterFields[];
extern std::size_t const kCounterFieldCount;

struct LaunchRecord {
    void const* kernel;
    dim3 grid, block;
    std::size_t smem_bytes;
    u64 seed;
    Schedule schedule;
    Counters counters;
};

extern Counters counters;  // of the running launch

std::string kernel_name(void const* function);

void reset_counters();
std::vector<LaunchRecord> const& launch_records();
void begin_counting();
void end_counting(Launch const& config);

// Queues one lane's access; flush_accesses() then counts those of a warp as instructions.
void log_access(Thread& thread, void const* address, u32 bytes, AccessKind kind, void const* site);
void flush_accesses(Warp& warp);

// Wavefronts of rows of 16 bytes read or written together, eight at a time.
void count_matrix_rows(u32 const* offsets, int rows);

}  // namespace lsm::emu

#pragma GCC visibility pop
