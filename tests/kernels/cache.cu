// The model of the second-level cache against hand counts.
#include "emu/cache.h"
#include "harness.h"
#include "kernels/matrix.cuh"

namespace lsm::test {
namespace {

// Zeros in whole lines of the cache.
template <class T>
class Buffer {
    struct alignas(emu::kCacheLine) Line {
        char bytes[emu::kCacheLine];
    };
    std::vector<Line> lines;

  public:
    explicit Buffer(std::size_t count)
        : lines((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)) {}
    T* data() { return reinterpret_cast<T*>(lines.data()); }
};

struct Cache {  // for one case
    explicit Cache(uint64_t bytes) { emu::set_cache(bytes); }
    ~Cache() {
        emu::set_cache(0);
        emu::set_seed(0);
    }
};

void require_memory(uint64_t read, uint64_t written, char const* what) {
    auto const& c = last_counters();
    require(c.memory_read_bytes == read, what, ": read ", c.memory_read_bytes, ", not ", read);
    require(c.memory_write_bytes == written, what, ": wrote ", c.memory_write_bytes, ", not ",
            written);
}

__global__ void copy(float const* x, float* y) {
    int const i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    store_global(y + i, load_global(x + i));
}

// 16 KiB to 16 KiB by 64 blocks, twice.
void check_copies(uint64_t seed, uint64_t capacity, uint64_t again) {
    constexpr uint64_t kBytes = 16384;
    Cache const cache(capacity);
    emu::set_seed(seed);
    Buffer<float> x(kBytes / 4), y(kBytes / 4);
    for (uint64_t expected : {kBytes, again}) {
        launch(copy, dim3(64), dim3(64), 0, nullptr, static_cast<float const*>(x.data()), y.data());
        require_memory(expected, expected, "copy");
        auto const& c = last_counters();
        require(c.global_read_bytes == kBytes && c.global_write_bytes == kBytes, "asked for");
    }
}
Case const fits("cache/what_fits_moves_once", [] {
    for (uint64_t seed : {0, 1, 2}) check_copies(seed, 32768, 0);
});
Case const streams("cache/what_is_twice_its_size_moves_each_time",
                   [] { check_copies(0, 16384, 16384); });
Case const none("cache/off_counts_nothing", [] {
    Buffer<float> x(64), y(64);
    launch(copy, dim3(1), dim3(64), 0, nullptr, static_cast<float const*>(x.data()), y.data());
    require_memory(0, 0, "without");
});
Case const emptied("cache/emptied_with_the_counters", [] {
    Cache const cache(4096);
    Buffer<float> x(64), y(64);
    for (uint64_t expected : {256, 0, 256}) {
        if (expected != 0) emu::reset_counters();
        launch(copy, dim3(1), dim3(64), 0, nullptr, static_cast<float const*>(x.data()), y.data());
        require_memory(expected, expected, "copy");
    }
});

// Every block reads the shared rows, and one of its own.
__global__ void share(float const* shared, float const* own, float* y, int rows) {
    int const t = static_cast<int>(threadIdx.x), b = static_cast<int>(blockIdx.x);
    float sum = load_global(own + b * 32 + t);
    for (int r = 0; r < rows; ++r) sum += load_global(shared + r * 32 + t);
    store_global(y + b * 32 + t, sum);
}
Case const shared_rows("cache/rows_that_every_block_reads", [] {
    constexpr uint64_t kRow = 128, kRows = 64, kBlocks = 16;
    for (uint64_t seed : {0, 1, 2}) {
        // With room for them and two blocks' own; without room for all of them.
        for (uint64_t room : {kRows + 4, kRows - 1}) {
            Cache const cache(room * kRow);
            emu::set_seed(seed);
            Buffer<float> shared(kRows * 32), own(kBlocks * 32), y(kBlocks * 32);
            launch(share, dim3(kBlocks), dim3(32), 0, nullptr,
                   static_cast<float const*>(shared.data()), static_cast<float const*>(own.data()),
                   y.data(), static_cast<int>(kRows));
            uint64_t const times = room > kRows ? 1 : kBlocks;
            require_memory((times * kRows + kBlocks) * kRow, kBlocks * kRow, "shared rows");
        }
    }
});

// One thread visits lines in a given order, digits of `order` from the right; 0 ends.
__global__ void visit(float* x, int64_t order, bool write) {
    for (; order != 0; order /= 10) {
        float* const p = x + order % 10 * 16;
        if (write) {
            store_global(p, 1.f);
        } else {
            load_global(p);
        }
    }
}
Case const order("cache/the_least_recently_used_line_goes", [] {
    Buffer<float> x(160);
    auto const misses = [&](int64_t visits) {
        Cache const cache(3 * emu::kCacheLine);
        launch(visit, dim3(1), dim3(1), 0, nullptr, x.data(), visits, false);
        return last_counters().memory_read_bytes / 32;
    };
    require(misses(321321) == 3, "all fit");
    require(misses(1'4'1'321) == 4, "1 was used last: 4 takes the place of 2");
    require(misses(2'4'1'321) == 5, "2 was in the place that 4 took");
    require(misses(3'4'1'321) == 4, "3 was not");
    require(misses(4321'4321) == 8, "a circle of one more than there is room for");
});
Case const write_back("cache/a_line_is_written_once_until_it_goes", [] {
    Buffer<float> x(160);
    Cache const cache(2 * emu::kCacheLine);
    launch(visit, dim3(1), dim3(1), 0, nullptr, x.data(), int64_t{121212}, true);
    require_memory(0, 64, "in turns");
    launch(visit, dim3(1), dim3(1), 0, nullptr, x.data(), int64_t{12}, true);
    require_memory(0, 0, "still dirty");
    launch(visit, dim3(1), dim3(1), 0, nullptr, x.data(), int64_t{12}, false);
    require_memory(0, 0, "what was written is read");
    launch(visit, dim3(1), dim3(1), 0, nullptr, x.data(), int64_t{1'43}, true);
    require_memory(0, 96, "gone and written again");
});

// 32 rows of half numbers, a lane each, written in columns [from, to); then read likewise.
__global__ void fill_columns(uint16_t* x, int pitch, int from, int to) {
    for (int i = from; i < to; ++i)
        store_global(x + static_cast<int>(threadIdx.x) * pitch + i, static_cast<uint16_t>(i));
}
__global__ void read_columns(uint16_t const* x, int pitch, int from, int to) {
    for (int i = from; i < to; ++i) load_global(x + static_cast<int>(threadIdx.x) * pitch + i);
}
Case const partial("cache/sectors_written_in_parts", [] {
    constexpr int kPitch = 32;
    Cache const cache(1 << 16);
    Buffer<uint16_t> x(32 * kPitch);
    auto const fill = [&](int from, int to) {
        launch(fill_columns, dim3(1), dim3(32), 0, nullptr, x.data(), kPitch, from, to);
    };
    auto const read = [&](int from, int to) {
        launch(read_columns, dim3(1), dim3(32), 0, nullptr, static_cast<uint16_t const*>(x.data()),
               kPitch, from, to);
    };
    fill(0, 24);
    require_memory(0, 2 * 32 * 32, "one sector and half of one");
    fill(20, 23);
    require_memory(0, 0, "over what was written");
    read(0, 24);
    require_memory(0, 0, "what was written");
    read(23, 25);
    require_memory(32 * 32, 0, "a byte that was not");
    fill(24, 32);
    require_memory(0, 0, "the rest of a dirty sector");
    read(0, 32);
    require_memory(0, 0, "all");
});

// A warp goes along its rows, each lane a half number, and reads each row once more one step later;
// odd lanes leave out the last rows.
__global__ void walk(uint16_t const* x, int rows, bool ragged) {
    int const t = static_cast<int>(threadIdx.x);
    for (int r = 0; r < rows - (ragged ? t % 2 : 0); ++r) {
        load_global(x + r * 32 + t);
        if (r > 0) load_global(x + (r - 1) * 32 + t);
    }
}
Case const together("cache/lanes_of_a_warp_go_together", [] {
    constexpr int kRows = 256;
    Buffer<uint16_t> x(kRows * 32);
    for (bool ragged : {false, true}) {
        for (uint64_t seed : {0, 1, 2}) {
            for (uint64_t lines : {3, 2}) {
                Cache const cache(lines * emu::kCacheLine);
                emu::set_seed(seed);
                launch(walk, dim3(1), dim3(32), 0, nullptr, static_cast<uint16_t const*>(x.data()),
                       kRows, ragged);
                // With two, a new row takes the place of the one before, which is read next.
                require_memory((lines == 3 ? kRows : 2 * kRows - 2) * 64, 0, "walk");
            }
        }
    }
});

__global__ void count_up(unsigned* x) {
    auto* const shared = reinterpret_cast<unsigned*>(dyn_smem());
    if (threadIdx.x == 0) store_shared(shared, 0u);
    __syncthreads();
    atomicAdd(shared, 1u);
    atomicAdd(x + threadIdx.x % 16, 1u);
}
Case const atomics("cache/atomics_read_and_write_where_they_are", [] {
    Cache const cache(4096);
    Buffer<unsigned> x(16);
    launch(count_up, dim3(4), dim3(64), 16, nullptr, x.data());
    require(x.data()[0] == 16, "sum ", x.data()[0]);
    require_memory(64, 64, "atomics");
    require(last_counters().global_read_bytes == 0 && last_counters().global_write_bytes == 0,
            "not asked for");
});

__global__ void copy_async(char const* x, int valid) {
    for (int i = 0; i < 2; ++i) {
        cp_async16(smem_u32(dyn_smem()) + 16 * threadIdx.x, x + 16 * threadIdx.x,
                   static_cast<int>(threadIdx.x) < valid);
        cp_async_commit();
        cp_async_wait<0>();
    }
}
Case const async("cache/cp_async", [] {
    Cache const cache(4096);
    Buffer<char> x(1024);
    launch(copy_async, dim3(2), dim3(64), 1024, nullptr, static_cast<char const*>(x.data()), 41);
    require_memory(21 * 32, 0, "cp.async");
});

// One lane fetches a row ahead of the warp, and one that nobody wants.
__global__ void fetch_ahead(float const* x) {
    int const t = static_cast<int>(threadIdx.x);
    if (t % 8 == 0) emu::note_prefetch(x + t);
    if (t == 0) emu::note_prefetch(x + 32);
    __syncwarp();
    load_global(x + t);
}
Case const prefetches("cache/prefetches", [] {
    Cache const cache(4096);
    Buffer<float> x(64);
    launch(fetch_ahead, dim3(1), dim3(32), 0, nullptr, static_cast<float const*>(x.data()));
    require_memory(128 + 32, 0, "prefetches");
    require(last_counters().global_read_bytes == 128 && last_counters().global_reads == 1,
            "asked for");
});

Case const too_small("cache/holds_a_line_at_least", [] {
    try {
        emu::set_cache(emu::kCacheLine - 1);
    } catch (std::invalid_argument const& e) {
        require(std::string(e.what()).find("64 bytes, got 63") != std::string::npos, e.what());
        return;
    }
    fail("a cache of nothing");
});

}  // namespace
}  // namespace lsm::test
