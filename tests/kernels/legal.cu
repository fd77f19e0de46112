// Legal idioms: right and silent under 40 seeds, in every build.
#include "kernels/matrix.cuh"
#include "pipeline.cuh"

namespace lsm::test {
namespace {

Case const two_barriers("legal/double_buffer",
                        [] { expect_silence([] { return run_add_tiles<Bug::none>(); }); });

// One barrier per round is enough when the copies are issued behind it.
__global__ void add_tiles_one_barrier(u32 const* x, u32* y, int steps) {
    u32* const buffer = reinterpret_cast<u32*>(dyn_smem());  // [3][512]
    int const t = static_cast<int>(threadIdx.x);
    u32 total = 0;
    for (int s = 0; s < 2; ++s) {
        bool const valid = s < steps;
        cp_async16(smem_u32(buffer + 512 * s + 4 * t), valid ? x + 512 * s + 4 * t : x, valid);
        cp_async_commit();
    }
    for (int s = 0; s < steps; ++s) {
        cp_async_wait<1>();
        __syncthreads();
        bool const valid = s + 2 < steps;
        cp_async16(smem_u32(buffer + 512 * ((s + 2) % 3) + 4 * t),
                   valid ? x + 512 * (s + 2) + 4 * t : x, valid);
        cp_async_commit();
        u32 const* const tile = buffer + 512 * (s % 3);
        for (int i = 0; i < 4; ++i) total += tile[4 * (127 - t) + i];
    }
    cp_async_wait<0>();
    y[t] = total;
}
Case const one_barrier("legal/triple_buffer_with_one_barrier", [] {
    expect_silence([] {
        int const steps = 7;
        std::vector<u32> x(512 * steps), y(128);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<u32>(i * i);
        launch(add_tiles_one_barrier, dim3(1), dim3(128), 6144, nullptr,
               static_cast<u32 const*>(x.data()), y.data(), steps);
        u32 expected = 0;
        for (std::size_t s = 0; s < steps; ++s) {
            for (std::size_t i = 0; i < 4; ++i) expected += x[512 * s + i];
        }
        return y[127] == expected;
    });
});

__global__ void warp_scan(int const* x, int* y) {
    int const lane = static_cast<int>(threadIdx.x % 32);
    int v = x[threadIdx.x];
    for (int d = 1; d < 32; d *= 2) {
        int const left = __shfl_up_sync(0xffffffffu, v, static_cast<unsigned>(d));
        if (lane >= d) v += left;
    }
    y[threadIdx.x] = v;
}
Case const scan("legal/warp_scan", [] {
    expect_silence([] {
        std::vector<int> x(96), y(96);
        for (int i = 0; i < 96; ++i) x[static_cast<std::size_t>(i)] = i;
        launch(warp_scan, dim3(1), dim3(96), 0, nullptr, static_cast<int const*>(x.data()),
               y.data());
        return y[31] == 31 * 32 / 2 && y[32] == 32 && y[95] == (64 + 95) * 16;
    });
});

// The halves of a warp do different things with disjoint masks.
__global__ void split_warp(int* y) {
    int v = static_cast<int>(threadIdx.x);
    if (threadIdx.x < 16) {
        for (int d = 8; d > 0; d /= 2) v += __shfl_xor_sync(0x0000ffffu, v, d);
    } else {
        v = static_cast<int>(__ballot_sync(0xffff0000u, v % 2) >> 16);
    }
    __syncwarp();
    y[threadIdx.x] = v;
}
Case const split("legal/disjoint_masks", [] {
    expect_silence([] {
        std::vector<int> y(32);
        launch(split_warp, dim3(1), dim3(32), 0, nullptr, y.data());
        return y[0] == 120 && y[31] == 0xaaaa;
    });
});

__global__ void histogram(int const* x, u32* y, int n) {
    u32* const bins = reinterpret_cast<u32*>(dyn_smem());
    if (threadIdx.x < 8) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
        atomicAdd(&bins[x[i] % 8], 1u);
    __syncthreads();
    if (threadIdx.x < 8) atomicAdd(&y[threadIdx.x], bins[threadIdx.x]);
}
Case const atomics("legal/shared_and_global_atomics", [] {
    expect_silence([] {
        std::vector<int> x(333);
        std::vector<u32> y(8);
        for (int i = 0; i < 333; ++i) x[static_cast<std::size_t>(i)] = i;
        launch(histogram, dim3(3), dim3(64), 32, nullptr, static_cast<int const*>(x.data()),
               y.data(), 333);
        return y[0] == 3 * 42 && y[7] == 3 * 41;
    });
});

__global__ void partial_warp(int* y) {
    int* const s = reinterpret_cast<int*>(dyn_smem());
    s[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncwarp();
    int const sum = s[threadIdx.x ^ 1] + __syncthreads_count(threadIdx.x % 3 == 0) +
                    __syncthreads_or(threadIdx.x == 47) + __syncthreads_and(threadIdx.x < 47);
    y[threadIdx.x] = sum;
}
Case const partial("legal/partial_warp_and_counting_barriers", [] {
    expect_silence([] {
        std::vector<int> y(48);
        launch(partial_warp, dim3(1), dim3(48), 192, nullptr, y.data());
        return y[0] == 1 + 16 + 1 && y[47] == 46 + 16 + 1;
    });
});

__global__ void bytes_of_one_word(unsigned char* y) {
    auto* const s = reinterpret_cast<unsigned char*>(dyn_smem());
    s[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
    __syncthreads();
    y[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}
Case const bytes("legal/neighbouring_bytes", [] {
    expect_silence([] {
        std::vector<unsigned char> y(64);
        launch(bytes_of_one_word, dim3(1), dim3(64), 64, nullptr, y.data());
        return y[0] == 1 && y[63] == 0;
    });
});

// Producer and consumer warps over named barriers: 1 says full, 2 says empty.
__global__ void producer_consumer(int* y, int rounds) {
    int* const s = reinterpret_cast<int*>(dyn_smem());
    int const lane = static_cast<int>(threadIdx.x % 32);
    if (threadIdx.x < 32) {
        for (int i = 0; i < rounds; ++i) {
            if (i > 0) emu::barrier_sync(2, 64);
            s[lane] = lane + i;
            emu::barrier_arrive(1, 64);
        }
    } else {
        int sum = 0;
        for (int i = 0; i < rounds; ++i) {
            emu::barrier_sync(1, 64);
            sum += s[31 - lane];
            if (i + 1 < rounds) emu::barrier_arrive(2, 64);
        }
        y[lane] = sum;
    }
}
Case const named("legal/named_barriers", [] {
    expect_silence([] {
        std::vector<int> y(32);
        launch(producer_consumer, dim3(1), dim3(64), 128, nullptr, y.data(), 5);
        return y[0] == 5 * 31 + 10 && y[31] == 10;
    });
});

// A strip of a tile, private to its warp, used again and again.
__global__ void private_strip(bf16 const* x, bf16* y, int rounds) {
    int const lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    bf16* const strip = reinterpret_cast<bf16*>(dyn_smem()) + warp * 256;  // [16][16]
    for (int i = 0; i < rounds; ++i) {
        *reinterpret_cast<uint4*>(strip + 8 * lane) =
            load_global(reinterpret_cast<uint4 const*>(x + 256 * warp + 8 * lane));
        __syncwarp();
        u32 r[4];
        ldmatrix_x4_trans(r, smem_u32(strip + lane % 16 * 16 + lane / 16 * 8));
        __syncwarp();
        for (int j = 0; j < 4; ++j) {
            reinterpret_cast<u32*>(strip)[(lane / 4 + 8 * (j / 2)) * 8 + lane % 4 + 4 * (j % 2)] =
                r[j];
        }
        __syncwarp();
        store_global(reinterpret_cast<uint4*>(y + 256 * warp + 8 * lane),
                     *reinterpret_cast<uint4*>(strip + 8 * lane));
        __syncwarp();
    }
}
Case const strip("legal/warp_private_strip", [] {
    expect_silence([] {
        std::vector<bf16> x(512), y(512);
        for (int i = 0; i < 512; ++i)
            x[static_cast<std::size_t>(i)] = __float2bfloat16(static_cast<float>(i % 256));
        launch(private_strip, dim3(1), dim3(64), 1024, nullptr, static_cast<bf16 const*>(x.data()),
               y.data(), 3);
        for (std::size_t r = 0; r < 16; ++r) {
            for (std::size_t c = 0; c < 16; ++c) {
                if (__bfloat162float(y[16 * r + c]) != static_cast<float>(16 * c + r)) return false;
            }
        }
        return true;
    });
});

}  // namespace
}  // namespace lsm::test
