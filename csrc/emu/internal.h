// What the emulator's own files share: threads, warps, the running block, and the scheduler's entry
// points.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emu/emu.h"

#ifndef LSM_EMU_RACE
#define LSM_EMU_RACE 0
#endif
#ifndef LSM_EMU_STACK_KIB
#define LSM_EMU_STACK_KIB 256
#endif

#pragma GCC visibility push(hidden)

namespace lsm::emu {

constexpr bool kRace = LSM_EMU_RACE;
constexpr u32 kMaxThreads = 1024;
constexpr u32 kMaxShared = 232448;  // 227 KiB, the most a block may have on sm_90
constexpr u32 kBarriers = 16;

// The caller's address, for reports. Only meaningful in functions that are not inlined.
#define LSM_EMU_SITE __builtin_return_address(0)

struct Thread;

struct Copy {
    char* destination;
    char const* source;
    u32 bytes, source_bytes;
    void const* site;
};

enum class Element : u8 { bytes, f16, bf16, f32, i32 };

// A contiguous piece, at most a row of the box, of a copy by TMA.
struct BulkCopy {
    char* destination;
    char const* source;  // null: zeros
    u32 bytes;
    bool add;
    Element element;
    void const* site;
    std::shared_ptr<struct Clock> clock;  // race build: what the issuing thread knew
};

enum class AccessKind : u8 {
    global_read,
    global_write,
    shared_read,
    shared_write,
    atomic,  // on global memory; like a prefetch, of interest to the cache only
    prefetch
};

// One lane's access to memory, kept until its whole warp has passed the same point.
struct Access {
    u64 address;
    void const* site;
    u16 bytes;
    AccessKind kind;

    // Of the instruction: a cp.async is a global read and a shared write at one site.
    u64 key() const { return reinterpret_cast<u64>(site) << 3 | static_cast<u64>(kind); }
};

// One wgmma instruction of a warpgroup, not yet executed.
struct PendingWgmma {
    WgmmaShape shape;
    u64 a, b;
    bool accumulate, a_in_registers;
    void const* site;
    std::vector<void*> d;                 // n / 2 addresses for each of 128 threads
    std::vector<u32 const*> a_registers;  // 4 for each of 128 threads
};

struct Thread {
    void* stack_pointer = nullptr;
    char* stack_top = nullptr;
    uint3 index{};
    u32 id = 0, warp = 0, lane = 0;
    bool finished = false;
    char const* waiting = nullptr;  // what for, null while it can run
    void const* site = nullptr;     // where it waits, or was last seen
    int result = 0;                 // of a barrier with a predicate

    std::vector<Copy> copies;      // cp.async, in issue order
    std::vector<u32> copy_groups;  // end of each committed group in `copies`
    u32 copies_landed = 0;

    std::vector<BulkCopy> bulk_stores;  // shared -> global, carried out at the wait
    std::vector<u32> bulk_groups;

    std::vector<Access> accesses;
};

// A set of lanes meeting at one warp-level operation.
struct WarpOp {
    char const* name;
    void (*compute)(struct Warp& warp, struct Meeting& meeting);
};

struct Meeting {
    WarpOp const* op = nullptr;
    u32 mask = 0, arrived = 0;
    void const* site = nullptr;
    void* arguments[32];
};

struct Warp {
    u32 existing = 0, alive = 0;
    u32 ready = 0;     // lanes that can run
    u32 yielded = 0;   // lanes that can run but are polling
    u32 priority = 0;  // run-ahead
    bool has_accesses = false;
    u32 first_thread = 0;
    std::vector<Meeting> meetings;  // open ones
};

struct Barrier {
    u32 expected = 0, arrived = 0;
    int predicates = 0;
    void const* site = nullptr;
    std::vector<Thread*> waiting;
    std::shared_ptr<struct Clock> clock;  // what bar.arrive published
};

struct Warpgroup {
    u32 arrived = 0;
    char const* op = nullptr;
    void const* site = nullptr;
    void* arguments[128];
    bool fenced = false;
    std::vector<PendingWgmma> pending;
    std::vector<u32> groups;  // end of each committed group in `pending`
};

// Completion of the cp.async a thread had issued before it attached them to an mbarrier.
struct AttachedCopies {
    std::vector<Copy> copies;
    std::shared_ptr<struct Clock> clock;
};

struct Mbarrier {
    u32 offset = 0;
    u32 count = 0;
    int64_t arrivals_left = 0, bytes_left = 0;
    u32 phase = 0;
    std::vector<BulkCopy> incoming;        // TMA bytes: they land when somebody waits
    std::vector<AttachedCopies> attached;  // likewise
    std::vector<Thread*> waiting;          // for the running phase
    std::shared_ptr<struct Clock> arriving,
        completed;  // race build: of the running phase, of the one before
};

// A block that has begun.
struct ResidentBlock {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::vector<Warpgroup> warpgroups;
    std::vector<Mbarrier> mbarriers;

    u64 block = 0;  // linear index
    u32 alive = 0, ready_warps = 0;
    bool passed_barrier = false;  // since its turn began

    char* shared = nullptr;
    char* shared_end = nullptr;  // of the pages that it is in
};

// The block whose turn it is, and what all have in common.
struct World : ResidentBlock {
    Launch config{};
    u32 thread_count = 0, warp_count = 0;
    u32 resident = 0;             // number of the block's place, its own while it runs
    bool has_neighbours = false;  // whether other blocks have begun and not ended
    Thread* current = nullptr;
    u64 progress =
        0;  // changes whenever something happened that a polling thread may be waiting for

    u32 shared_bytes = 0;

    Schedule schedule = Schedule::by_seed;  // as resolved for this launch
    u64 seed = 0;
    u64 random = 1;
    u32 lane_rotation = 0;

    bool running = false;
    bool failed = false;
    std::string report;
};

extern World world;

inline u64 draw() {  // xorshift64*
    u64 x = world.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    world.random = x;
    return x * 0x2545f4914f6cdd1dull;
}

inline bool in_shared(void const* p) {
    return static_cast<u64>(static_cast<char const*>(p) - world.shared) < world.shared_bytes;
}
inline u32 offset_of(void const* p) {
    return static_cast<u32>(static_cast<char const*>(p) - world.shared) + kSharedWindow;
}
inline bool on_fiber_stack(Thread const& t, void const* p) {
    return static_cast<u64>(t.stack_top - static_cast<char const*>(p)) < LSM_EMU_STACK_KIB * 1024u;
}

u32 random_below(u32 n);
void redraw_priorities();
Thread& pick();  // the next of the block; reports a deadlock if there is none
// Whether another block is to go on now. In order, blocks go from barrier to barrier in turns.
bool turn_is_over();

// Stops the current thread until wake(); `what` names the operation in reports.
void wait_here(char const* what, void const* site);
void wake(Thread& thread);

// Meets the other lanes of `mask` at `op`; returns when it has been computed.
void meet(WarpOp const& op, u32 mask, void* arguments, void const* site);
void meet_full_warp(WarpOp const& op, void* arguments, void const* site);

std::string hex(u64 value);
std::string describe_thread(Thread const& thread);  // "thread (3,0,0) of warp 0"
std::string describe_shared(u64 address, u32 bytes);
std::string describe_site(void const* site);  // source line, with the helpers it was inlined from
// `site`, or, if that lies in CuTe's code, the first address of the running thread's callers that
// does not.
void const* nearest_in_kernel(void const* site);
[[noreturn]] void fail_at(std::string const& what, void const* site);

void check_global_alignment(void const* address, u32 bytes, void const* site);
void land_copies(Thread& thread, u32 end);
void check_thread_exit(Thread& thread);
void check_block_exit();
void check_mbarriers_at_exit();
// The bank pattern of TMA and wgmma: bits 4.. of a shared offset are flipped by bits 7.., as many
// as `bits`.
inline u32 swizzle(u32 offset, u32 bits) {
    return offset ^ ((offset >> 3) & (((1u << bits) - 1) << 4));
}

void install_fault_handler();
void remove_fault_handler();

}  // namespace lsm::emu

#pragma GCC visibility pop
