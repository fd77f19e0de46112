// Fibers, rendezvous and the launch loop; schedule.cpp says whose turn it is.
//
// Single-threaded with plain globals on purpose: a switch then costs some 20 ns and a seed always
// replays the same run.
#include <sys/mman.h>

#include <bit>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/race.h"

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on the old stack, its pointer in *rdi, and continues on the
// stack rsi.
asm(R"(
.text
.hidden lsm_emu_switch
.globl lsm_emu_switch
.type lsm_emu_switch, @function
lsm_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size lsm_emu_switch, . - lsm_emu_switch
)");
extern "C" __attribute__((visibility("hidden"))) void lsm_emu_switch(void** save, void* load);

namespace lsm::emu {

World world;

namespace {

constexpr std::size_t kStackBytes = LSM_EMU_STACK_KIB * 1024;
constexpr std::size_t kPoisonedStack =
    8 * 1024;  // deep enough for the frames of kernels; the rest stays as it was
constexpr std::size_t kPage = 4096;
constexpr std::size_t kStackGuard =
    64 * 1024;  // wider than any one frame, so that none steps over it
constexpr char kCanary = static_cast<char>(0xfb);
constexpr int kMostResidents = 32;

void* main_stack_pointer;
void (*kernel_body)(void*);
void* kernel_arguments;
Schedule chosen_schedule = Schedule::by_seed;
u64 chosen_seed = 0;
int chosen_multiprocessors = 8;
int chosen_residents = 1;
std::vector<ResidentBlock> parked;  // of every place, but for the block whose turn it is
std::string failed_report;
std::mutex launch_mutex;

char* map(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("the emulator could not map memory");
    return static_cast<char*>(p);
}

// Shared memory ends within 1 KiB of an unmapped page, whatever its size; the slack holds a canary.
char* map_shared() {
    std::size_t const usable = (kMaxShared + 1024 + kPage - 1) / kPage * kPage;
    std::size_t const fence = 1 << 20;
    char* p = map(2 * fence + usable);
    mprotect(p, fence, PROT_NONE);
    mprotect(p + fence + usable, fence, PROT_NONE);
    return p + fence + usable;
}

u32 round_up(u32 n, u32 to) {
    return (n + to - 1) / to * to;
}

void switch_to(Thread& next) {
    Thread* const previous = world.current;
    if (previous == &next) return;
    world.current = &next;
    threadIdx = next.index;
    lsm_emu_switch(&previous->stack_pointer, next.stack_pointer);
}

void pause_block() {
    Thread* const t = world.current;
    world.current = nullptr;
    lsm_emu_switch(&t->stack_pointer, main_stack_pointer);
}

[[noreturn]] void leave_to_main() {
    pause_block();
    __builtin_unreachable();
}

// To whoever is next, after the current thread has stopped.
void go_on() {
    if (turn_is_over()) {
        pause_block();
    } else {
        switch_to(pick());
    }
}

void stop_running(Thread const& t) {
    Warp& warp = world.warps[t.warp];
    warp.ready &= ~(1u << t.lane);
    if (warp.ready == 0) world.ready_warps &= ~(1u << t.warp);
}

void finish_current() {
    Thread& t = *world.current;
    check_thread_exit(t);
    t.finished = true;
    ++world.progress;
    Warp& warp = world.warps[t.warp];
    warp.alive &= ~(1u << t.lane);
    if (warp.alive == 0 && warp.has_accesses) flush_accesses(warp);
    stop_running(t);
    if (--world.alive == 0) leave_to_main();
    go_on();
    __builtin_unreachable();
}

[[noreturn]] void thread_entry() {
    try {
        kernel_body(kernel_arguments);
    } catch (std::exception const& e) {
        fail(std::string("the kernel threw an exception: ") + e.what());
    }
    finish_current();
    __builtin_unreachable();
}

void prepare_stack(Thread& t) {
    std::memset(t.stack_top - kPoisonedStack, 0xff, kPoisonedStack);
    auto* top = reinterpret_cast<void**>(t.stack_top);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&thread_entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // the registers lsm_emu_switch pops
    t.stack_pointer = top - 8;
}

// In the place whose turn it is.
void allocate(u32 threads) {
    if (world.shared_end == nullptr) world.shared_end = map_shared();
    world.shared = world.shared_end - round_up(world.shared_bytes, 1024);
    if (world.warps.size() < world.warp_count) world.warps.resize(world.warp_count);
    world.warpgroups.resize((world.warp_count + 3) / 4);
    while (world.threads.size() < threads) {
        auto const i = world.threads.size();
        world.threads.reserve(kMaxThreads);
        Thread& t = world.threads.emplace_back();
        char* const low = map(kStackBytes + kStackGuard);
        mprotect(low, kStackGuard, PROT_NONE);
        // Staggered: equal tops would put every thread's frames into the same cache sets.
        t.stack_top = low + kStackGuard + kStackBytes - (i * 7 % 61) * 64;
    }
}

void begin_block(u64 block) {
    world.block = block;
    allocate(world.thread_count);
    std::memset(world.shared, 0xff, world.shared_bytes);
    std::memset(world.shared + world.shared_bytes, kCanary,
                static_cast<std::size_t>(world.shared_end - (world.shared + world.shared_bytes)));

    world.alive = world.thread_count;
    world.ready_warps = world.warp_count == 32 ? ~0u : (1u << world.warp_count) - 1;
    for (u32 w = 0; w < world.warp_count; ++w) {
        Warp& warp = world.warps[w];
        u32 const lanes = std::min(32u, world.thread_count - 32 * w);
        warp.existing = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.alive = warp.ready = warp.existing;
        warp.yielded = 0;
        warp.first_thread = 32 * w;
        warp.meetings.clear();
    }
    for (Barrier& b : world.barriers) b = Barrier{};
    for (Warpgroup& g : world.warpgroups) g = Warpgroup{};
    world.mbarriers.clear();

    auto const& dim = world.config.block;
    for (u32 i = 0; i < world.thread_count; ++i) {
        Thread& t = world.threads[i];
        t.id = i;
        t.warp = i / 32;
        t.lane = i % 32;
        t.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        t.finished = false;
        t.waiting = nullptr;
        t.site = nullptr;
        t.copies.clear();
        t.copy_groups.clear();
        t.copies_landed = 0;
        t.bulk_stores.clear();
        t.bulk_groups.clear();
        t.accesses.clear();
        prepare_stack(t);
    }
    redraw_priorities();
    if constexpr (kRace) race::begin_block();
}

// Until it ends or its turn is over.
void run_block() {
    auto const& grid = world.config.grid;
    blockIdx.x = static_cast<u32>(world.block % grid.x);
    blockIdx.y = static_cast<u32>(world.block / grid.x % grid.y);
    blockIdx.z = static_cast<u32>(world.block / grid.x / grid.y);
    world.passed_barrier = false;
    Thread& first = pick();
    world.current = &first;
    threadIdx = first.index;
    lsm_emu_switch(&main_stack_pointer, first.stack_pointer);
    world.current = nullptr;
}

// The running block changes places with the one parked at `place`.
void give_turn(u32 place) {
    if (place == world.resident) return;
    ResidentBlock& running = world;
    std::swap(parked[world.resident], running);
    std::swap(parked[place], running);
    world.resident = place;
    if constexpr (kRace) race::give_turn(place);
}

void check_canary() {
    char const* p = world.shared + world.shared_bytes;
    for (; p != world.shared_end; ++p) {
        if (*p != kCanary) {
            fail("out of bounds: something was written at shared memory + " +
                 std::to_string(p - world.shared) + ", past its " +
                 std::to_string(world.shared_bytes) + " bytes");
        }
    }
}

void end_block() {
    check_canary();
    check_block_exit();
    if constexpr (kRace) race::end_block();
}

std::string show(dim3 d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

void configure(Launch const& config) {
    auto bad = [](dim3 d) { return d.x == 0 || d.y == 0 || d.z == 0; };
    u64 const threads = u64{config.block.x} * config.block.y * config.block.z;
    if (bad(config.block) || threads > kMaxThreads || config.block.z > 64) {
        throw std::runtime_error("emulator: a block of " + show(config.block) +
                                 " threads cannot be launched");
    }
    if (bad(config.grid) || config.grid.x > 0x7fffffffu || config.grid.y > 65535 ||
        config.grid.z > 65535) {
        throw std::runtime_error("emulator: a grid of " + show(config.grid) +
                                 " blocks cannot be launched");
    }
    if (config.smem_bytes > kMaxShared) {
        throw std::runtime_error("emulator: " + std::to_string(config.smem_bytes) +
                                 " bytes of shared memory are more than a block can have");
    }
    u64 const blocks = u64{config.grid.x} * config.grid.y * config.grid.z;
    int const most = blocks_together(static_cast<u32>(threads));
    if (config.together && blocks > static_cast<u64>(most)) {
        throw std::runtime_error("emulator: a grid of " + show(config.grid) +
                                 " blocks cannot be launched together, but " +
                                 std::to_string(most) + " blocks of " + std::to_string(threads) +
                                 " threads");
    }
    world.config = config;
    world.thread_count = static_cast<u32>(threads);
    world.warp_count = (world.thread_count + 31) / 32;
    world.shared_bytes = static_cast<u32>(config.smem_bytes);
    blockDim = config.block;
    gridDim = config.grid;

    world.seed = chosen_seed;
    world.random = (chosen_seed + 1) * 0x9e3779b97f4a7c15ull;
    world.schedule = chosen_schedule;
    if (world.schedule == Schedule::by_seed) {
        world.schedule = chosen_seed == 0  ? Schedule::in_order
                         : chosen_seed % 2 ? Schedule::uniform
                                           : Schedule::run_ahead;
    }
}

// Frees what the launch held, however it ends.
struct Running {
    Running() {
        world.running = true;
        world.failed = false;
        install_fault_handler();
    }
    ~Running() {
        remove_fault_handler();
        world.running = false;
        world.current = nullptr;
    }
};

[[noreturn]] void throw_report() {
    failed_report = "emulator: " + world.report + "\n  kernel " + kernel_name(world.config.kernel) +
                    ", grid " + show(world.config.grid) + ", block " + show(world.config.block) +
                    ", in block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) +
                    "," + std::to_string(blockIdx.z) + "), seed " + std::to_string(world.seed) +
                    ", schedule " + schedule_name(world.schedule);
    throw std::runtime_error(failed_report);
}

}  // namespace

void set_seed(u64 seed) {
    chosen_seed = seed;
}
void set_schedule(Schedule schedule) {
    chosen_schedule = schedule;
}
char const* schedule_name(Schedule schedule) {
    constexpr char const* kNames[] = {"by_seed", "in_order", "uniform", "run_ahead"};
    return kNames[static_cast<int>(schedule)];
}
void set_multiprocessors(int count) {
    chosen_multiprocessors = count;
}
int multiprocessors() {
    return chosen_multiprocessors;
}
void set_residents(int count) {
    if (count < 1 || count > kMostResidents) {
        throw std::invalid_argument("blocks side by side are 1 to " +
                                    std::to_string(kMostResidents) + ", got " +
                                    std::to_string(count));
    }
    chosen_residents = count;
}
int blocks_together(u32 threads) {
    int const blocks = chosen_multiprocessors * 512 / static_cast<int>(threads);
    return std::min(blocks, kMostResidents);
}
std::string last_report() {
    return failed_report;
}

void launch(Launch const& config, void (*body)(void*), void* arguments) {
    std::lock_guard const lock(launch_mutex);
    configure(config);
    kernel_body = body;
    kernel_arguments = arguments;
    begin_counting();
    if constexpr (kRace) race::begin_launch();
    Running const running;

    u64 const blocks = u64{config.grid.x} * config.grid.y * config.grid.z;
    std::vector<u64> order(blocks);
    std::iota(order.begin(), order.end(), u64{0});
    if (world.schedule != Schedule::in_order) {
        for (u64 i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
    }
    // Blocks begin in this order, each where one has ended.
    u64 const places = config.together ? blocks : static_cast<u64>(chosen_residents);
    std::vector<u32> taken(std::min(places, blocks));
    std::iota(taken.begin(), taken.end(), 0u);
    parked.resize(std::max(parked.size(), taken.size()));
    auto next = order.begin();
    for (u32 const place : taken) {
        give_turn(place);
        begin_block(*next++);
    }
    for (std::size_t turn = 0; !taken.empty();) {
        world.has_neighbours = taken.size() > 1;
        give_turn(taken[turn]);
        try {
            run_block();
            if (!world.failed && world.alive == 0) end_block();
        } catch (std::runtime_error const& e) {
            world.failed = true;
            world.report = e.what();
        }
        if (world.failed) throw_report();
        if (world.alive == 0 && next != order.end()) begin_block(*next++);
        bool const is_free = world.alive == 0;
        if (is_free) taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(turn));
        if (taken.empty()) break;
        turn = world.schedule == Schedule::in_order ? (turn + !is_free) % taken.size()
                                                    : random_below(static_cast<u32>(taken.size()));
    }
    counters.blocks = blocks;
    end_counting(config);
}

void fail(std::string const& what) {
    if (world.current == nullptr) throw std::runtime_error(what);
    world.failed = true;
    world.report = what;
    leave_to_main();
}

void fail_at(std::string const& what, void const* site) {
    std::string text = what;
    if (world.current != nullptr) text += "\n  by " + describe_thread(*world.current);
    if (world.current != nullptr) site = nearest_in_kernel(site);
    if (site != nullptr) text += "\n  at " + describe_site(site);
    fail(text);
}

void wait_here(char const* what, void const* site) {
    Thread& t = *world.current;
    t.waiting = what;
    t.site = site;
    stop_running(t);
    go_on();
}

void wake(Thread& t) {
    t.waiting = nullptr;
    world.warps[t.warp].ready |= 1u << t.lane;
    world.ready_warps |= 1u << t.warp;
    ++world.progress;
}

void yield() {
    Thread& t = *world.current;
    t.site = LSM_EMU_SITE;
    stop_running(t);
    world.warps[t.warp].yielded |= 1u << t.lane;
    go_on();
}

u32 lane() {
    return world.current->lane;
}

void meet(WarpOp const& op, u32 mask, void* arguments, void const* site) {
    Thread& t = *world.current;
    Warp& warp = world.warps[t.warp];
    u32 const bit = 1u << t.lane;
    if ((mask & bit) == 0)
        fail_at(std::string(op.name) + ": the calling lane is not in its mask " + hex(mask), site);
    mask &= warp.existing;
    ++counters.warp_operations;

    Meeting* meeting = nullptr;
    for (Meeting& open : warp.meetings) {
        if (open.op == &op && open.mask == mask) {
            meeting = &open;
            continue;
        }
        // They wait for this lane and this lane waits for them, elsewhere.
        if ((open.mask & bit) != 0 && (open.arrived & mask) != 0) {
            fail("divergent warp: lanes of one warp are at different operations\n  " +
                 describe_thread(t) + " is in " + op.name + ", mask " + hex(mask) + ", at " +
                 describe_site(site) + "\n  lanes " + hex(open.arrived) + " are in " +
                 open.op->name + ", mask " + hex(open.mask) + ", at " + describe_site(open.site));
        }
    }
    if (meeting == nullptr) {
        meeting = &warp.meetings.emplace_back();
        meeting->op = &op;
        meeting->mask = mask;
        meeting->arrived = 0;
        meeting->site = site;
    }
    meeting->arguments[t.lane] = arguments;
    meeting->arrived |= bit;
    if (meeting->arrived != mask) {
        wait_here(op.name, site);
        return;
    }
    Meeting complete = *meeting;
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
    op.compute(warp, complete);
    for (u32 others = mask & ~bit; others != 0; others &= others - 1) {
        world.threads[warp.first_thread + static_cast<u32>(std::countr_zero(others))].waiting =
            nullptr;
    }
    warp.ready |= mask;
    world.ready_warps |= 1u << t.warp;
    ++world.progress;
    if (mask == warp.alive && warp.has_accesses) flush_accesses(warp);
}

void meet_full_warp(WarpOp const& op, void* arguments, void const* site) {
    if (world.warps[world.current->warp].existing != ~0u) {
        fail_at(std::string(op.name) + " needs a warp of 32 threads", site);
    }
    meet(op, ~0u, arguments, site);
}

}  // namespace lsm::emu
