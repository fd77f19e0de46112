// The SIMT emulator's interface: what platform.h and the shadowed cute/arch headers call.
//
// A launch runs every CUDA thread as a fiber on the calling CPU thread. Warp-level operations are a
// rendezvous: each lane posts its operands, the last to arrive computes for all of them. Anything a
// GPU would leave undefined ends the launch with an exception that says what happened, where, and
// under which seed.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#pragma GCC visibility push(hidden)

namespace lsm::emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// ---- Control, from tests ----

enum class Schedule { by_seed, in_order, uniform, run_ahead };

void set_seed(u64 seed);
void set_schedule(Schedule schedule);  // by_seed: 0 in order, odd uniform, even run-ahead
char const* schedule_name(Schedule schedule);
void set_multiprocessors(int count);
int multiprocessors();
void set_residents(int count);  // blocks that run side by side, at most
// That can be launched together: as many as have 512 threads on each multiprocessor.
int blocks_together(u32 threads);
std::string last_report();  // of the last launch that failed, empty if none did

struct Launch {
    dim3 grid, block;
    std::size_t smem_bytes;
    void const* kernel;
    bool together = false;  // all blocks side by side, whatever set_residents says
};

// Runs body(arguments) once per thread of the grid; throws std::runtime_error with the report if
// anything was wrong.
void launch(Launch const& config, void (*body)(void*), void* arguments);

// Ends the launch (inside one) or throws (outside).
[[noreturn]] void fail(std::string const& what);

// ---- Shared memory ----

// Shared-window offsets start here rather than at 0, so that an offset mistaken for an index shows.
constexpr u32 kSharedWindow = 1024;

char* shared_base();
u32 shared_offset(void const* pointer);
// The host address of [offset, offset + bytes), which must lie in the block's shared memory,
// aligned to `bytes`.
char* shared_pointer(u32 offset, u32 bytes, char const* what, void const* site);

// One lane's access, of a power of two up to 16 bytes: checked, counted, carried out.
void load_shared(void* destination, void const* source, u32 bytes);
void store_shared(void* destination, void const* source, u32 bytes);

// ---- Threads and barriers ----

enum class Reduce { none, count, all, any };

void yield();  // lets other threads run: to be called by every polling loop
void syncwarp(u32 mask);
int syncthreads(Reduce reduce, int predicate);
void barrier_sync(u32 barrier, u32 threads);
void barrier_arrive(u32 barrier, u32 threads);
void require_warpgroup_uniform(char const* what, u32 value);
void fence_proxy_async();
u32 lane();
bool elect_one();

// ---- Warp operations ----

enum class Shuffle { index, up, down, exclusive_or };
enum class Vote { any, all, ballot };
enum class WarpReduce { add, minimum, maximum, bit_and, bit_or, bit_xor };

u64 shuffle(Shuffle kind, u32 mask, u64 value, int operand, int width);
u32 vote(Vote kind, u32 mask, bool predicate);
u32 match_any(u32 mask, u64 value);
u32 warp_reduce(WarpReduce kind, bool is_signed, u32 mask, u32 value);

void ldmatrix(u32* registers, int matrices, bool transposed, u32 offset);
void stmatrix(u32 const* registers, int matrices, bool transposed, u32 offset);
u32 movmatrix(u32 value);

// d = a b + d on one 16x8xk tile; `d` is float[4], or int32_t[4] for int8.
enum class Mma { bf16_k8, bf16_k16, f16_k8, f16_k16, tf32_k4, tf32_k8, s8_k16, s8_k32 };
void mma(Mma kind, void* d, u32 const* a, u32 const* b);

// ---- Asynchronous copies ----

// `source_bytes` < `bytes` fills the rest with zeros. The bytes land at the wait.
void cp_async(u32 destination, void const* source, u32 bytes, u32 source_bytes);
void cp_async_commit();
void cp_async_wait(u32 pending);
void cp_async_wait_all();
void cp_async_mbarrier_arrive(u32 barrier, bool no_increment);

void mbarrier_init(u32 barrier, u32 count);
void mbarrier_invalidate(u32 barrier);
void mbarrier_arrive(u32 barrier, u32 count);
void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes);
void mbarrier_expect_tx(u32 barrier, u32 bytes);
void mbarrier_complete_tx(u32 barrier, u32 bytes);
bool mbarrier_test_parity(u32 barrier, u32 parity);
void mbarrier_wait_parity(u32 barrier, u32 parity);

// Coordinates of the innermost dimension first. The map is what cuTensorMapEncodeTiled wrote
// (tma.cpp).
void tma_load(void const* map, u32 barrier, u32 destination, int rank, int const* coordinate);
void tma_store(void const* map, u32 source, int rank, int const* coordinate, bool add);
void bulk_load(void const* source, u32 barrier, u32 destination, u32 bytes);
void bulk_store(void* destination, u32 source, u32 bytes);
void bulk_commit();
void bulk_wait(u32 pending);

// ---- Warpgroup matrix multiply ----

enum class Wgmma { bf16, f16, tf32, s8 };
struct WgmmaShape {
    Wgmma kind;
    int n;
    bool a_is_mn_major, b_is_mn_major;
    int a_scale, b_scale;
};
// Accumulators, float or int32_t, are captured by address and written at the wait. `a` is a
// descriptor, or four registers if `a_registers`.
void wgmma(WgmmaShape const& shape, void* const* d, u64 a, u32 const* const* a_registers, u64 b,
           bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(u32 pending);

// ---- Global memory ----

// Counts one lane's access; must precede the access itself.
void note_global(void const* address, u32 bytes, bool write);

enum class Atomic {
    add,
    minimum,
    maximum,
    bit_and,
    bit_or,
    bit_xor,
    exchange,
    compare_exchange,
    increment,
    decrement
};
enum class Number { i32, u32, u64, f32, f64, f16x2, bf16x2 };
// One read-modify-write on shared or global memory; returns the old bits.
u64 atomic(Atomic operation, Number type, void* address, u64 value, u64 compare = 0);
void threadfence();

}  // namespace lsm::emu

// CUDA's built-in variables: real objects, rewritten at every switch, because CuTe wants their
// exact types.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#pragma GCC visibility pop
