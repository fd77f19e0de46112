// Bugs planted on purpose: each must be reported.
#include "kernels/matrix.cuh"
#include "pipeline.cuh"

namespace lsm::test {
namespace {

Case const no_wait("planted/cp_async_wait_missing",
                   [] { expect_race("in flight", [] { return run_add_tiles<Bug::no_wait>(); }); });
Case const no_barrier_before("planted/barrier_before_reading_missing", [] {
    expect_race("", [] { return run_add_tiles<Bug::no_barrier_before>(); });
});
Case const no_barrier_before_race("planted/barrier_before_reading_missing_is_named", [] {
    expect_only_race("shared memory", [] { return run_add_tiles<Bug::no_barrier_before>(); });
});
Case const no_barrier_after("planted/barrier_after_reading_missing", [] {
    expect_race("is not ordered after the read by",
                [] { return run_add_tiles<Bug::no_barrier_after>(); });
});

// Lanes exchange through shared memory. kFence: 0 nothing, 1 a shuffle, 2 __syncwarp.
template <int kFence>
__global__ void exchange(u32* y) {
    u32 volatile unused = 0;
    u32* const strip = reinterpret_cast<u32*>(dyn_smem());
    int const t = static_cast<int>(threadIdx.x);
    strip[t] = static_cast<u32>(t + 1);
    if constexpr (kFence == 1) unused = __shfl_xor_sync(0xffffffffu, static_cast<u32>(t), 1);
    if constexpr (kFence == 2) __syncwarp();
    y[t] = strip[t ^ 1];
    (void)unused;
}

template <int kFence>
bool run_exchange() {
    std::vector<u32> y(64);
    launch(exchange<kFence>, dim3(1), dim3(64), 256, nullptr, y.data());
    for (u32 t = 0; t < 64; ++t) {
        if (y[t] != (t ^ 1) + 1) return false;
    }
    return true;
}

Case const no_syncwarp("planted/syncwarp_missing",
                       [] { expect_race("", [] { return run_exchange<0>(); }); });
Case const shuffle_as_fence("planted/shuffle_used_as_fence", [] {
    expect_only_race("race on shared memory", [] { return run_exchange<1>(); });
});
Case const syncwarp_is_enough("legal/syncwarp_exchange",
                              [] { expect_silence([] { return run_exchange<2>(); }); });

__global__ void divergent_collective(u32* y) {
    u32 v = threadIdx.x;
    if (threadIdx.x % 32 < 16) {
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    } else {
        v = __shfl_down_sync(0xffffffffu, v, 1);
    }
    y[threadIdx.x] = v;
}
Case const divergent("planted/divergent_collective", [] {
    expect_report("divergent warp", [] {
        std::vector<u32> y(32);
        launch(divergent_collective, dim3(1), dim3(32), 0, nullptr, y.data());
    });
});

__global__ void divergent_mma(float* y) {
    float d[4] = {};
    u32 const a[4] = {};
    if (threadIdx.x < 31) mma_16x8x16(d, a, 0, 0, static_cast<bf16 const*>(nullptr));
    y[threadIdx.x] = d[0];
}
Case const lane_missing("planted/lane_missing_from_mma", [] {
    expect_report("deadlock", [] {
        std::vector<float> y(32);
        launch(divergent_mma, dim3(1), dim3(32), 0, nullptr, y.data());
    });
});

__global__ void skipped_barrier(u32* y) {
    if (threadIdx.x < 96) __syncthreads();
    y[threadIdx.x] = 1;
}
Case const skipped("planted/skipped_barrier", [] {
    expect_report("threads 96-127 have exited", [] {
        std::vector<u32> y(128);
        launch(skipped_barrier, dim3(1), dim3(128), 0, nullptr, y.data());
    });
});

__global__ void mismatched_barrier() {
    emu::barrier_sync(1, threadIdx.x < 32 ? 64 : 96);
}
Case const mismatch("planted/barrier_count_mismatch", [] {
    expect_report("barrier mismatch",
                  [] { launch(mismatched_barrier, dim3(1), dim3(96), 0, nullptr); });
});

__global__ void outside_mask(u32* y) {
    u32 v = threadIdx.x;
    if (threadIdx.x < 16) v = __shfl_sync(0xffffu, v, 20);
    y[threadIdx.x] = v;
}
Case const mask("planted/shuffle_from_outside_the_mask", [] {
    expect_report("not in the mask", [] {
        std::vector<u32> y(32);
        launch(outside_mask, dim3(1), dim3(32), 0, nullptr, y.data());
    });
});

__global__ void not_in_own_mask() {
    __syncwarp(threadIdx.x == 0 ? ~1u : 1u);
}
Case const own_mask("planted/lane_not_in_its_own_mask", [] {
    expect_report("the calling lane is not in its mask",
                  [] { launch(not_in_own_mask, dim3(1), dim3(32), 0, nullptr); });
});

__global__ void width_of_three(int* y) {
    y[threadIdx.x] = __shfl_sync(~0u, 0, 0, 3);
}
Case const width("planted/shuffle_width_no_power_of_two", [] {
    expect_report("not a power of two", [] {
        std::vector<int> y(32);
        launch(width_of_three, dim3(1), dim3(32), 0, nullptr, y.data());
    });
});

__global__ void multiply_alone() {
    float d[4] = {};
    u32 const a[4] = {};
    mma_16x8x16(d, a, 0, 0, static_cast<bf16 const*>(nullptr));
}
Case const half_warp("planted/mma_in_half_a_warp", [] {
    expect_report("needs a warp of 32 threads",
                  [] { launch(multiply_alone, dim3(1), dim3(16), 0, nullptr); });
});

__global__ void arrive_alone(u32 barrier, u32 threads) {
    if (threadIdx.x < 32) emu::barrier_arrive(barrier, threads);
}
void expect_bad_barrier(char const* expected, u32 barrier, u32 threads) {
    expect_report(expected,
                  [=] { launch(arrive_alone, dim3(1), dim3(64), 0, nullptr, barrier, threads); });
}
Case const barrier_index("planted/barrier_index_or_count_out_of_range", [] {
    expect_bad_barrier("there is no barrier 16", 16, 64);
    expect_bad_barrier("48 threads", 1, 48);
});
Case const left_over("planted/barrier_left_incomplete",
                     [] { expect_bad_barrier("was left with 32 of 64", 1, 64); });

// ---- Launches no GPU would accept ----

__global__ void nothing() {}
void expect_refused(char const* expected, dim3 grid, dim3 block, std::size_t smem_bytes) {
    expect_report(expected, [=] { launch(nothing, grid, block, smem_bytes, nullptr); });
}
Case const bad_launches("planted/impossible_launches", [] {
    expect_refused("a block of (1025,1,1)", dim3(1), dim3(1025), 0);
    expect_refused("a grid of (1,65536,1)", dim3(1, 65536), dim3(32), 0);
    expect_refused("a grid of (0,1,1)", dim3(0), dim3(32), 0);
    expect_refused("more than a block can have", dim3(1), dim3(32), 232449);
});

// ---- Addresses ----

__global__ void write_shared(int index) {
    reinterpret_cast<float*>(dyn_smem())[index] = 1.0f;
}
void expect_write_outside(int index) {
    expect_report("out of bounds",
                  [=] { launch(write_shared, dim3(1), dim3(1), 256, nullptr, index); });
}
Case const shared_past_end("planted/shared_write_just_past_the_end",
                           [] { expect_write_outside(64); });
Case const shared_far("planted/shared_write_far_past_the_end", [] { expect_write_outside(5000); });
Case const shared_before("planted/shared_write_far_before_the_start",
                         [] { expect_write_outside(-100000); });

__global__ void load_tile(int offset) {
    u32 r[4];
    reinterpret_cast<uint4*>(dyn_smem())[threadIdx.x] = uint4{0, 0, 0, 0};
    __syncwarp();
    ldmatrix_x4(r, smem_u32(dyn_smem()) + 16 * threadIdx.x + static_cast<u32>(offset));
}
Case const tile_outside("planted/ldmatrix_out_of_bounds", [] {
    expect_report("out of bounds: ldmatrix",
                  [] { launch(load_tile, dim3(1), dim3(32), 512, nullptr, 16); });
});
Case const tile_misaligned("planted/ldmatrix_misaligned", [] {
    expect_report(kRace ? "misaligned: " : "misaligned: ldmatrix",
                  [] { launch(load_tile, dim3(1), dim3(32), 1024, nullptr, 8); });
});

__global__ void copy_at(char const* x, int to, int from) {
    cp_async16(smem_u32(dyn_smem()) + static_cast<u32>(to), x + from, true);
    cp_async_commit();
}
void expect_bad_copy(char const* expected, int to, int from) {
    alignas(16) static char x[64];
    expect_report(expected, [=] {
        launch(copy_at, dim3(1), dim3(1), 64, nullptr, static_cast<char const*>(x), to, from);
    });
}
Case const copy_outside("planted/cp_async_out_of_bounds",
                        [] { expect_bad_copy("out of bounds", 64, 0); });
Case const copy_misaligned("planted/cp_async_misaligned_destination",
                           [] { expect_bad_copy("misaligned", 8, 0); });
Case const copy_source("planted/cp_async_misaligned_source",
                       [] { expect_bad_copy("misaligned", 0, 4); });
Case const copy_in_flight("planted/exit_with_cp_async_in_flight",
                          [] { expect_bad_copy("exited with a cp.async in flight", 0, 0); });

__global__ void load_wide(float const* x, float* y) {
    y[threadIdx.x] = load_global(reinterpret_cast<float4 const*>(x)).x;
}
Case const wide_misaligned("planted/global_load_misaligned", [] {
    expect_report("misaligned: a 16-byte global access", [] {
        alignas(16) static float x[8], y[1];
        launch(load_wide, dim3(1), dim3(1), 0, nullptr, static_cast<float const*>(x + 1),
               static_cast<float*>(y));
    });
});

__global__ void store_shared_pair(int offset) {
    *reinterpret_cast<float2*>(dyn_smem() + offset) = float2{0.0f, 0.0f};
}
Case const shared_misaligned("planted/shared_vector_store_misaligned", [] {
    if (kRace) {
        expect_report("misaligned",
                      [] { launch(store_shared_pair, dim3(1), dim3(1), 64, nullptr, 4); });
    }
});

template <bool kStore>
__global__ void access_named(float* y, int offset) {
    auto* const p = reinterpret_cast<float2*>(dyn_smem() + offset);
    if constexpr (kStore) {
        store_shared(p, float2{0.0f, 0.0f});
    } else {
        *y = load_shared(p).x;
    }
}
template <bool kStore>
void expect_bad_access(char const* expected, int offset) {
    expect_report(expected, [=] {
        float y;
        launch(access_named<kStore>, dim3(1), dim3(1), 64, nullptr, &y, offset);
    });
}
Case const named_outside("planted/named_shared_access_just_past_the_end", [] {
    expect_bad_access<true>("out of bounds: store of 8 bytes", 64);
    expect_bad_access<false>("out of bounds: load of 8 bytes", 64);
    expect_bad_access<true>("out of bounds", -8);
});
Case const named_misaligned("planted/named_shared_access_misaligned", [] {
    expect_bad_access<true>("misaligned: store of 8 bytes", 4);
    expect_bad_access<false>("misaligned: load of 8 bytes", 12);
});

__global__ void null_store(float* p) {
    *p = 1.0f;
}
Case const null_pointer("planted/null_pointer", [] {
    expect_report("invalid access", [] {
        launch(null_store, dim3(1), dim3(1), 0, nullptr, static_cast<float*>(nullptr));
    });
});

__global__ void read_unwritten(float* y) {
    float const* const s = reinterpret_cast<float const*>(dyn_smem());
    y[threadIdx.x] = s[threadIdx.x];
}
Case const unwritten("planted/uninitialised_shared_read", [] {
    expect_race("uninitialised", [] {
        std::vector<float> y(32);
        launch(read_unwritten, dim3(1), dim3(32), 128, nullptr, y.data());
        return !std::isnan(y[0]);
    });
});

// ---- Races whose values look right ----

__global__ void same_value() {
    reinterpret_cast<int*>(dyn_smem())[0] = 7;
}
Case const same_write("planted/same_value_written_by_two_threads", [] {
    expect_only_race("race on shared memory",
                     [] { launch(same_value, dim3(1), dim3(2), 16, nullptr); });
});

__global__ void write_same_global(int* y) {
    *y = 7;
}
Case const global_write("planted/two_blocks_write_one_location", [] {
    expect_only_race("race on global memory", [] {
        std::vector<int> y(1);
        launch(write_same_global, dim3(2), dim3(1), 0, nullptr, y.data());
    });
});

__global__ void read_other_block(int* y) {
    y[blockIdx.x] = 1;
    if (blockIdx.x == 1) y[4] = y[0];
}
Case const global_read("planted/block_reads_what_another_wrote", [] {
    expect_only_race("race on global memory", [] {
        std::vector<int> y(5);
        launch(read_other_block, dim3(2), dim3(1), 0, nullptr, y.data());
    });
});

// The last block to finish adds up what all of them stored.
template <bool kFenced>
__global__ void add_last(u32* parts, u32* ticket, u32* total) {
    bool* const last = reinterpret_cast<bool*>(dyn_smem());
    parts[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
    if constexpr (kFenced) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        if constexpr (kFenced) __threadfence();
        *last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!*last) return;
    u32 sum = 0;
    for (u32 b = 0; b < gridDim.x; ++b) sum += parts[b * blockDim.x + threadIdx.x];
    total[threadIdx.x] = sum;
}
template <bool kFenced>
bool run_add_last() {
    std::vector<u32> parts(5 * 64), ticket(1), total(64);
    launch(add_last<kFenced>, dim3(5), dim3(64), 16, nullptr, parts.data(), ticket.data(),
           total.data());
    for (u32 t = 0; t < 64; ++t) {
        if (total[t] != 5 * t) return false;
    }
    return true;
}
Case const no_fence("planted/threadfence_missing_before_ticket", [] {
    expect_only_race("race on global memory", [] { return run_add_last<false>(); });
});
Case const ticket("legal/last_block_adds_up",
                  [] { expect_silence([] { return run_add_last<true>(); }); });

// ---- Global memory ----

template <bool kAsync>
__global__ void read_past_end(float4 const* x, float4* y) {
    float4* const s = reinterpret_cast<float4*>(dyn_smem());
    if constexpr (kAsync) {
        cp_async16(smem_u32(s + threadIdx.x), x + threadIdx.x, true);
        cp_async_commit();
        cp_async_wait<0>();
    } else {
        s[threadIdx.x] = load_global(x + threadIdx.x);
    }
    y[threadIdx.x] = s[threadIdx.x];
}
template <bool kAsync>
void run_read_past_end() {
    std::vector<float4> x(31), y(32);
    launch(read_past_end<kAsync>, dim3(1), dim3(32), 512, nullptr,
           static_cast<float4 const*>(x.data()), y.data());
}
Case const past_end("planted/global_read_past_the_end", [] {
    expect_out_of_bounds("out of bounds: read of", [] { run_read_past_end<false>(); });
});
Case const async_past_end("planted/cp_async_past_the_end", [] {
    expect_out_of_bounds("out of bounds: read of", [] { run_read_past_end<true>(); });
});

// ---- Never ending ----

__global__ void poll_forever(int volatile* flag) {
    while (*flag == 0) __nanosleep(20);
}
Case const livelock("planted/polling_a_flag_nobody_sets", [] {
    std::vector<int> flag(1);
    std::string const report = report_of(2, [&] {
        launch(poll_forever, dim3(1), dim3(2), 0, nullptr, static_cast<int volatile*>(flag.data()));
    });
    require(report.find("livelock") != std::string::npos, report);
});

__attribute__((noinline)) int descend(int n, int volatile* p) {
    int volatile frame[1024];
    frame[n % 1024] = *p;
    return n == 0 ? frame[0] : descend(n - 1, p) + frame[n % 1024];
}
__global__ void recurse(int* p) {
    *p = descend(100000, p);
}
Case const stack("planted/stack_exhausted", [] {
    expect_report("stack is exhausted", [] {
        std::vector<int> y(1);
        launch(recurse, dim3(1), dim3(1), 0, nullptr, y.data());
    });
});

// ---- Reports ----

Case const names_lines("report/names_both_source_lines", [] {
    if (!kRace) return;
    std::string const report = report_of(0, [] { run_add_tiles<Bug::no_barrier_after>(); });
    auto const first = report.find("pipeline.cuh:"), second = report.rfind("pipeline.cuh:");
    require(first != std::string::npos && first != second, report);
    require(report.find("kernel ") != std::string::npos &&
                report.find("add_tiles") != std::string::npos,
            report);
    require(emu::last_report() == report, emu::last_report());
});
Case const goes_on("report/next_launch_is_unharmed", [] {
    expect_report("divergent warp", [] {
        std::vector<u32> y(32);
        launch(divergent_collective, dim3(1), dim3(32), 0, nullptr, y.data());
    });
    expect_silence([] { return run_add_tiles<Bug::none>(); });
});

}  // namespace
}  // namespace lsm::test
