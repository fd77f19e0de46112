// Counters against hand counts.
#include "harness.h"
#include "kernels/matrix.cuh"

namespace lsm::test {
namespace {

__global__ void copy_vectors(float4 const* x, float4* y, int stride) {
    int const i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    store_global(y + i, load_global(x + i * stride));
}

std::vector<float4> aligned_floats(std::size_t n) {
    return std::vector<float4>(n + 2);
}
float4* align(std::vector<float4>& v) {
    return reinterpret_cast<float4*>((reinterpret_cast<uintptr_t>(v.data()) + 31) / 32 * 32);
}

void check_copy(int stride, uint64_t sectors) {
    auto x = aligned_floats(static_cast<std::size_t>(256 * stride)), y = aligned_floats(256);
    for (uint64_t seed : {0, 1, 2}) {
        emu::set_seed(seed);
        launch(copy_vectors, dim3(4), dim3(64), 0, nullptr, static_cast<float4 const*>(align(x)),
               align(y), stride);
        auto const& c = last_counters();
        require(c.global_read_bytes == 4096 && c.global_write_bytes == 4096, "bytes");
        require(c.global_read_sectors == sectors, "read sectors ", c.global_read_sectors);
        require(c.global_write_sectors == 128, "written sectors ", c.global_write_sectors);
        require(c.global_reads == 8 && c.global_writes == 8, "instructions ", c.global_reads);
        require(c.blocks == 4 && c.launches == 1, "blocks");
    }
}
Case const coalesced("counters/coalesced_copy", [] { check_copy(1, 128); });
Case const strided("counters/strided_copy_reads_twice_the_bytes", [] { check_copy(2, 256); });

// Some lanes are masked, and the rest go through a loop of different lengths.
__global__ void ragged(float const* x, float* y, int n) {
    int const t = static_cast<int>(threadIdx.x);
    float sum = 0;
    for (int i = t; i < n; i += 32) sum += load_global(x + i);
    if (t % 2 == 0) store_global(y + t, sum);
}
Case const diverged("counters/diverged_lanes_are_matched_by_occurrence", [] {
    auto x = aligned_floats(32), y = aligned_floats(16);
    launch(ragged, dim3(1), dim3(32), 0, nullptr, reinterpret_cast<float const*>(align(x)),
           reinterpret_cast<float*>(align(y)), 50);
    auto const& c = last_counters();
    require(c.global_read_bytes == 200 && c.global_reads == 2, "reads ", c.global_reads);
    require(c.global_read_sectors == 4 + 3, "sectors ", c.global_read_sectors);
    require(c.global_writes == 1 && c.global_write_sectors == 4 && c.global_write_bytes == 64,
            "writes");
});

__global__ void load_rows(int pitch) {
    u32 r[4];
    for (int i = 0; i < pitch; i += 16) {
        *reinterpret_cast<uint4*>(dyn_smem() + static_cast<int>(threadIdx.x) * pitch + i) =
            uint4{0, 0, 0, 0};
    }
    __syncwarp();
    ldmatrix_x4(r, smem_u32(dyn_smem()) + static_cast<u32>(threadIdx.x) * static_cast<u32>(pitch));
}
void check_rows(int pitch, uint64_t wavefronts) {
    launch(load_rows, dim3(1), dim3(32), static_cast<std::size_t>(32 * pitch), nullptr, pitch);
    auto const& c = last_counters();
    require(c.ldmatrix == 4 && c.ldmatrix_wavefronts == wavefronts, "wavefronts ",
            c.ldmatrix_wavefronts);
    require(c.ldmatrix_conflicts == wavefronts - 4, "conflicts ", c.ldmatrix_conflicts);
}
Case const padded("counters/ldmatrix_padded_rows", [] { check_rows(144, 4); });
Case const two_way("counters/ldmatrix_two_way_conflict", [] { check_rows(32, 8); });
Case const eight_way("counters/ldmatrix_eight_way_conflict", [] { check_rows(128, 32); });

// A store and a load by 32 lanes, `pitch` elements apart; through the helpers or a plain pointer.
template <class T, bool kNamed>
__global__ void store_and_load(T* y, int pitch) {
    T* const p = reinterpret_cast<T*>(dyn_smem()) + static_cast<int>(threadIdx.x) * pitch;
    T const value = static_cast<T>(threadIdx.x);
    if constexpr (kNamed) {
        store_shared(p, value);
        y[threadIdx.x] = load_shared(p);
    } else {
        *p = value;
        y[threadIdx.x] = *static_cast<T volatile*>(p);
    }
}
template <class T, bool kNamed>
void check_banks(int pitch, uint64_t wavefronts, uint64_t conflicts) {
    std::vector<T> y(32);
    for (uint64_t seed : {0, 1, 2}) {
        emu::set_seed(seed);
        launch(store_and_load<T, kNamed>, dim3(1), dim3(32),
               sizeof(T) * 32 * static_cast<std::size_t>(pitch), nullptr, y.data(), pitch);
        for (int t = 0; t < 32; ++t) require(y[t] == static_cast<T>(t), "lane ", t);
        auto const& c = last_counters();
        uint64_t const times = kNamed || kRace ? 2 : 0;
        require(c.shared_accesses == times, "accesses ", c.shared_accesses);
        require(
            c.shared_wavefronts == times * wavefronts && c.shared_conflicts == times * conflicts,
            "wavefronts ", c.shared_wavefronts, " conflicts ", c.shared_conflicts);
    }
}
template <bool kNamed>
void check_all_banks() {
    check_banks<float, kNamed>(1, 1, 0);
    check_banks<float, kNamed>(2, 2, 1);
    check_banks<float, kNamed>(32, 32, 31);
    check_banks<float, kNamed>(33, 1, 0);
    check_banks<uint64_t, kNamed>(1, 2, 0);
    check_banks<uint64_t, kNamed>(2, 4, 2);
    check_banks<uint16_t, kNamed>(1, 1, 0);
}
Case const plain_banks("counters/plain_shared_accesses_in_the_race_build", check_all_banks<false>);
Case const named_banks("counters/named_shared_accesses", [] {
    check_all_banks<true>();
    check_banks<__uint128_t, true>(1, 4, 0);
    check_banks<__uint128_t, true>(2, 8, 4);
    check_banks<__uint128_t, true>(8, 32, 28);
});

__global__ void broadcast(float* y) {
    float* const s = reinterpret_cast<float*>(dyn_smem());
    if (threadIdx.x < 2) store_shared(s + threadIdx.x * 32, 1.0f);
    __syncwarp();
    y[threadIdx.x] = load_shared(s) + load_shared(s + threadIdx.x % 2 * 32);
}
Case const broadcasts("counters/equal_words_are_read_once", [] {
    std::vector<float> y(32);
    launch(broadcast, dim3(1), dim3(32), 256, nullptr, y.data());
    auto const& c = last_counters();
    // Two stores into one bank, one word for all, two words of one bank.
    require(c.shared_accesses == 3, "accesses ", c.shared_accesses);
    require(c.shared_wavefronts == 2 + 1 + 2 && c.shared_conflicts == 2, "wavefronts ",
            c.shared_wavefronts);
});

__global__ void copy_async(char const* x, int valid) {
    cp_async16(smem_u32(dyn_smem()) + 16 * threadIdx.x, x + 16 * threadIdx.x,
               static_cast<int>(threadIdx.x) < valid);
    cp_async_commit();
    cp_async_wait<0>();
}
Case const async("counters/cp_async_counts_what_it_reads", [] {
    auto x = aligned_floats(64);
    launch(copy_async, dim3(2), dim3(64), 1024, nullptr, reinterpret_cast<char const*>(align(x)),
           40);
    auto const& c = last_counters();
    require(c.async_bytes == 2 * 640 && c.global_read_bytes == 2 * 640, "bytes ", c.async_bytes);
    require(c.global_read_sectors == 2 * 20, "sectors ", c.global_read_sectors);
    // 16 bytes of each of 32 lanes, side by side, by four warps.
    require(c.shared_accesses == 4 && c.shared_wavefronts == 16 && c.shared_conflicts == 0,
            "shared memory ", c.shared_wavefronts);
});

}  // namespace
}  // namespace lsm::test
