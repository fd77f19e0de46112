// Blocks that run side by side.
#include "emu/cache.h"
#include "harness.h"
#include "kernels/matrix.cuh"

namespace lsm::test {
namespace {

struct SideBySide {  // for one case
    explicit SideBySide(int blocks) { emu::set_residents(blocks); }
    ~SideBySide() {
        emu::set_residents(1);
        emu::set_seed(0);
    }
};

LSM_DEVICE void raise_flag(u32* flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicExch(flag, 1u);
    }
}
LSM_DEVICE void await_flag(u32* flag) {
    if (threadIdx.x == 0) {
        u32 const volatile& raised = *flag;
        while (raised == 0) __nanosleep(20);
        __threadfence();
    }
    __syncthreads();
}

// Every block leaves a number a thread and reads those of the block after it, the last of the first. kFenced: in the
// order of flags.
template <bool kFenced>
__global__ void read_next(u32* left, u32* flags, u32* y) {
    u32* const mine = reinterpret_cast<u32*>(dyn_smem());
    u32 const b = blockIdx.x, next = (b + 1) % gridDim.x, t = threadIdx.x;
    mine[t] = 100 * b + t;
    left[b * blockDim.x + t] = mine[t];
    if constexpr (kFenced) {
        raise_flag(flags + b);
        await_flag(flags + next);
    } else {
        __syncthreads();
    }
    y[b * blockDim.x + t] = left[next * blockDim.x + t] - mine[t];
}
template <bool kFenced>
bool run_read_next(u32 blocks) {
    std::vector<u32> left(blocks * 64), flags(blocks), y(blocks * 64);
    launch(read_next<kFenced>, dim3(blocks), dim3(64), 256, nullptr, left.data(), flags.data(),
           y.data());
    for (u32 i = 0; i < y.size(); ++i) {
        if (y[i] != (i / 64 + 1 == blocks ? 100u - 100u * blocks : 100u)) return false;
    }
    return true;
}
Case const ring("legal/blocks_side_by_side_wait_for_each_other", [] {
    SideBySide const blocks(5);
    expect_silence([] { return run_read_next<true>(5); });
});
Case const unordered("planted/blocks_side_by_side_read_too_early", [] {
    SideBySide const blocks(5);
    expect_race("race on global memory", [] { return run_read_next<false>(5); });
});
Case const alone("planted/a_block_waits_for_one_that_begins_later", [] {
    std::string const report = report_of(0, [] { run_read_next<true>(5); });
    require(report.find("livelock") != std::string::npos, report);
});

__global__ void meet_all(u32* arrived) {
    atomicAdd(arrived, 1u);
    u32 const volatile& here = *arrived;
    while (here < gridDim.x) __nanosleep(20);
}
Case const grid_barrier("planted/all_blocks_meet_and_one_has_no_place", [] {
    for (int places : {5, 4}) {
        SideBySide const blocks(places);
        for (uint64_t seed : {0, 1, 2}) {
            u32 arrived = 0;
            std::string const report =
                report_of(seed, [&] { launch(meet_all, dim3(5), dim3(1), 0, nullptr, &arrived); });
            bool const all = places == 5;
            require(all ? report.empty() : report.find("livelock") != std::string::npos, report);
        }
    }
});

Case const together("legal/blocks_launched_together_all_have_places", [] {
    for (uint64_t seed : {0, 1, 2}) {
        u32 arrived = 0;
        std::string const report = report_of(
            seed, [&] { launch_together(meet_all, dim3(9), dim3(1), 0, nullptr, &arrived); });
        require(report.empty() && arrived == 9, report);
    }
});
Case const too_many("planted/more_blocks_launched_together_than_have_places", [] {
    u32 arrived = 0;
    int const most = blocks_together(meet_all, dim3(512), 0);
    std::string const report = report_of(0, [&] {
        launch_together(meet_all, dim3(static_cast<u32>(most) + 1), dim3(512), 0, nullptr,
                        &arrived);
    });
    require(report.find("cannot be launched together") != std::string::npos, report);
});

// Blocks in places of those that have ended: tickets make any number of places do.
__global__ void sum_before(u32* ticket, u32* flags, u32* sums) {
    u32* const place = reinterpret_cast<u32*>(dyn_smem());
    if (threadIdx.x == 0) *place = atomicAdd(ticket, 1u);
    __syncthreads();
    u32 const b = *place, t = threadIdx.x;
    u32 sum = b + t;
    if (b > 0) {
        await_flag(flags + b - 1);
        sum += sums[(b - 1) * blockDim.x + t];
    }
    sums[b * blockDim.x + t] = sum;
    raise_flag(flags + b);
}
Case const chained("legal/blocks_that_took_tickets_need_no_places", [] {
    for (int places : {1, 2, 3, 7, 32}) {
        SideBySide const blocks(places);
        expect_silence([] {
            constexpr u32 kBlocks = 20;
            std::vector<u32> ticket(1), flags(kBlocks), sums(kBlocks * 64);
            launch(sum_before, dim3(kBlocks), dim3(64), 16, nullptr, ticket.data(), flags.data(),
                   sums.data());
            for (u32 i = 0; i < sums.size(); ++i) {
                u32 const b = i / 64, t = i % 64;
                if (sums[i] != b * (b + 1) / 2 + (b + 1) * t) return false;
            }
            return true;
        });
    }
});

// A block of which some threads have left, beside one that goes on.
__global__ void leave_early(int volatile* y) {
    for (int i = 0; i < 8; ++i) {
        if (blockIdx.x == 1 && threadIdx.x > 32 && i == 4) return;
        __syncthreads();
    }
    y[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
Case const deadlock("planted/deadlock_of_one_of_two_blocks", [] {
    SideBySide const blocks(2);
    expect_report("deadlock: no thread can go on", [] {
        std::vector<int> y(128);
        launch(leave_early, dim3(2), dim3(64), 0, nullptr, static_cast<int volatile*>(y.data()));
    });
});
Case const recovered("legal/blocks_side_by_side_after_a_report", [] {
    SideBySide const blocks(2);
    std::vector<int> y(128);
    std::string const report = report_of(0, [&] {
        launch(leave_early, dim3(2), dim3(64), 0, nullptr, static_cast<int volatile*>(y.data()));
    });
    require(report.find("in block (1,0,0)") != std::string::npos, report);
    expect_silence([] { return run_read_next<true>(2); });
});

// Every block reads all rows, one after another.
__global__ void read_rows(float const* x, int rows) {
    for (int r = 0; r < rows; ++r) {
        load_global(x + r * 32 + static_cast<int>(threadIdx.x));
        __syncthreads();
    }
}
Case const shared_reads("cache/blocks_side_by_side_read_the_same_rows_once", [] {
    constexpr uint64_t kRow = 128, kRows = 64, kBlocks = 4;
    struct alignas(emu::kCacheLine) Row {
        float x[32];
    };
    std::vector<Row> rows(kRows);
    emu::set_cache(8 * kRow);
    for (uint64_t seed : {0, 1}) {
        for (int places : {1, 2, 4}) {
            SideBySide const blocks(places);
            emu::set_seed(seed);
            launch(read_rows, dim3(kBlocks), dim3(32), 0, nullptr,
                   static_cast<float const*>(rows.data()->x), static_cast<int>(kRows));
            auto const& c = last_counters();
            require(c.global_read_bytes == kBlocks * kRows * kRow, "asked for");
            uint64_t const read = c.memory_read_bytes, once = kRows * kRow;
            // In order, from barrier to barrier; else as far apart as it happens.
            if (seed == 0) {
                require(read == kBlocks / static_cast<uint64_t>(places) * once, places,
                        " places: ", read);
            } else {
                require(read >= once && read <= kBlocks * once, places, " places: ", read);
            }
        }
    }
    emu::set_cache(0);
});

Case const refused("legal/places_of_blocks_are_1_to_32", [] {
    for (int count : {0, 33}) {
        try {
            emu::set_residents(count);
        } catch (std::invalid_argument const& e) {
            require(std::string(e.what()).find(std::to_string(count)) != std::string::npos,
                    e.what());
            continue;
        }
        emu::set_residents(1);
        fail(count, " places");
    }
});

}  // namespace
}  // namespace lsm::test
