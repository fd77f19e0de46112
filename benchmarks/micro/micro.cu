// What an SM does per clock where the models of docs/kernels/ have to guess: a line of json per measurement,
//   {"name": "wgmma rs n32", "at": "2 warpgroups", "value": 1.0, "unit": "..."}
// A program, not a part of the library; pack.py builds it and gpu_suite.py runs it.
//
// A block per SM times its own loop by the SM's clock, so that neither launch nor frequency counts; printed is the
// median over blocks, the best of kRepeats launches.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/matrix.cuh"
#if defined(LSM_SM90A)
#include "kernels/sm90.cuh"
#endif

namespace lsm {
#if defined(LSM_SM90A)
template <>
struct WarpgroupOps<bf16, 32> {
    using Shared = gmma::MMA_64x32x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
    using Mixed = gmma::MMA_64x32x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};
#endif

namespace {

constexpr int kRepeats = 5, kLoop = 512, kChains = 8;

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "micro: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

// Where a block says how long it took, and leaves what nobody reads, so that nothing is optimised away.
struct Out {
    long long* clocks;
    float* sink;
};

// f() of all threads between two looks at the clock.
template <class F>
LSM_DEVICE void timed(Out const& out, F const& f) {
    __syncthreads();
    long long const start = clock64();
    float const result = f();
    __syncthreads();
    if (threadIdx.x == 0) out.clocks[blockIdx.x] = clock64() - start;
    if (result == 12345.f) out.sink[threadIdx.x] = result;
}

// ---- Products ----

__global__ void mma_sync(Out const out) {
    float d[kChains][4] = {};
    u32 const a[4] = {threadIdx.x, 1, 2, 3};
    timed(out, [&] {
        LSM_UNROLL_BY(1)
        for (int i = 0; i < kLoop; ++i) {
            LSM_UNROLL
            for (int n = 0; n < kChains; ++n)
                mma_16x8x16(d[n], a, 4, 5, static_cast<bf16*>(nullptr));
        }
        float sum = 0;
        LSM_UNROLL
        for (int n = 0; n < kChains; ++n) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
        return sum;
    });
}

__global__ void load_matrices(Out const out) {
    u32 const from = smem_u32(dyn_smem()) + threadIdx.x * 16;
    timed(out, [&] {
        u32 sum = 0;
        LSM_UNROLL_BY(4)
        for (int i = 0; i < kLoop; ++i) {
            u32 x[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                         : "r"(from));
            sum ^= x[0] ^ x[1] ^ x[2] ^ x[3];
        }
        return static_cast<float>(sum);
    });
}

#if defined(LSM_SM90A)
// Two accumulators in turn, kDepth products in flight on each.
template <int N, bool kMixed>
__global__ void __launch_bounds__(384) wgmma_loop(Out const out) {
    constexpr int kDepth = 4;
    float d[2][N / 8][4] = {};
    u32 a[1][4] = {{threadIdx.x, 1, 2, 3}};
    u32 const at = smem_u32(dyn_smem());
    uint64_t const left = describe_slabs(at, 8192), right = describe_slabs(at + 8192, 8192);
    timed(out, [&] {
        LSM_UNROLL_BY(1)
        for (int i = 0; i < kLoop / 16; ++i) {
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                keep_registers(d[n]);
                cute::warpgroup_arrive();
                LSM_UNROLL
                for (int k = 0; k < kDepth; ++k) {
                    if constexpr (kMixed) {
                        wgmma<bf16, N>(d[n], a[0], right);
                    } else {
                        wgmma<bf16, N>(d[n], left, right, true);
                    }
                }
                cute::warpgroup_commit_batch();
                cute::warpgroup_wait<1>();
            }
        }
        cute::warpgroup_wait<0>();
        keep_registers(d[0]);
        keep_registers(d[1]);
        return d[0][0][0] + d[1][0][0];
    });
}
#endif

// ---- Numbers ----

__global__ void exponentials(Out const out) {
    float x[kChains];
    LSM_UNROLL
    for (int n = 0; n < kChains; ++n) x[n] = -0.01f * (threadIdx.x + n);
    timed(out, [&] {
        LSM_UNROLL_BY(4)
        for (int i = 0; i < kLoop; ++i) {
            LSM_UNROLL
            for (int n = 0; n < kChains; ++n) x[n] = exp2_approx(x[n]);
        }
        float sum = 0;
        LSM_UNROLL
        for (int n = 0; n < kChains; ++n) sum += x[n];
        return sum;
    });
}

// The selective scan's inner step, five issue slots a state: a = 2^(dt A), h = a h + (dt u) b, y += c h.
__global__ void selective_steps(Out const out) {
    float h[16] = {}, A[16], b[16], c[16];
    LSM_UNROLL
    for (int s = 0; s < 16; ++s) {
        A[s] = -0.01f * (s + 1) - threadIdx.x;
        b[s] = 0.5f + s + threadIdx.x, c[s] = 1.f - s - threadIdx.x;
    }
    timed(out, [&] {
        float total = 0, dt = 0.1f + threadIdx.x;
        LSM_UNROLL_BY(1)
        for (int i = 0; i < kLoop; ++i) {
            float const du = dt * total;
            float y = 0;
            LSM_UNROLL
            for (int s = 0; s < 16; ++s) {
                h[s] = exp2_approx(dt * A[s]) * h[s] + du * b[s];
                y += c[s] * h[s];
            }
            total = y, dt += 0.001f;
        }
        return total;
    });
}

// ---- Memory ----

// Groups of `readers` blocks read the same `bytes` of the second-level cache, past the first.
__global__ void cached_reads(Out const out, uint4 const* data, int readers, int bytes) {
    int const vectors = bytes / 16;
    uint4 const* const from = data + static_cast<size_t>(blockIdx.x / readers) * vectors;
    timed(out, [&] {
        uint4 sum{};
        LSM_UNROLL_BY(1)
        for (int i = threadIdx.x; i + 7 * static_cast<int>(blockDim.x) < vectors;
             i += 8 * blockDim.x) {
            uint4 x[8];
            LSM_UNROLL
            for (int n = 0; n < 8; ++n) x[n] = __ldcg(from + i + n * blockDim.x);
            LSM_UNROLL
            for (int n = 0; n < 8; ++n) sum.x ^= x[n].x ^ x[n].y ^ x[n].z ^ x[n].w;
        }
        return static_cast<float>(sum.x);
    });
}

// Pairs of blocks hand a number over and back.
__global__ void handoffs(Out const out, int* flags) {
    int* const mine = flags + (blockIdx.x / 2 * 2 + blockIdx.x % 2) * 32;
    int* const theirs = flags + (blockIdx.x / 2 * 2 + 1 - blockIdx.x % 2) * 32;
    bool const paired = blockIdx.x / 2 * 2 + 1 < gridDim.x;
    timed(out, [&] {
        if (threadIdx.x == 0 && paired) {
            int const before = *mine;  // of earlier launches, and theirs are as many
            for (int i = before + 1; i <= before + kLoop; ++i) {
                int const due = blockIdx.x % 2 == 0 ? i - 1 : i;
                int seen;
                do {
                    asm volatile("ld.acquire.gpu.b32 %0, [%1];"
                                 : "=r"(seen)
                                 : "l"(theirs)
                                 : "memory");
                } while (seen < due);
                asm volatile("st.release.gpu.b32 [%0], %1;" ::"l"(mine), "r"(i) : "memory");
            }
        }
        return 0.f;
    });
}

__global__ void barriers(Out const out) {
    timed(out, [&] {
        LSM_UNROLL_BY(1)
        for (int i = 0; i < kLoop; ++i) __syncthreads();
        return 0.f;
    });
}

// ---- The program ----

class Machine {
  public:
    Machine() {
        check(cudaGetDeviceProperties(&properties_, 0));
        check(cudaMalloc(&out_.clocks, blocks() * sizeof(long long)));
        check(cudaMalloc(&out_.sink, 1024 * sizeof(float)));
    }
    int blocks() const { return properties_.multiProcessorCount; }
    bool hopper() const { return properties_.major == 9; }

    // Clocks of the loop of a block, one block per SM.
    template <class Kernel, class... Rest>
    double clocks(Kernel kernel, int threads, Rest... rest) const {
        constexpr int kShared = 100 * 1024;  // no room for a second block
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
        std::vector<long long> found(blocks());
        long long best = 0;
        for (int i = 0; i <= kRepeats; ++i) {  // the first one warms up
            kernel<<<blocks(), threads, kShared>>>(out_, rest...);
            check(cudaGetLastError());
            check(cudaDeviceSynchronize());
            check(cudaMemcpy(found.data(), out_.clocks, found.size() * sizeof(long long),
                             cudaMemcpyDeviceToHost));
            std::nth_element(found.begin(), found.begin() + found.size() / 2, found.end());
            long long const middle = found[found.size() / 2];
            if (i == 1 || (i > 1 && middle < best)) best = middle;
        }
        return static_cast<double>(best);
    }

  private:
    cudaDeviceProp properties_{};
    Out out_{};
};

void say(char const* name, int count, char const* of, double value, char const* unit) {
    std::printf("{\"name\": \"%s\", \"at\": \"%d %s\", \"value\": %.4g, \"unit\": \"%s\"}\n", name,
                count, of, value, unit);
    std::fflush(stdout);
}

#if defined(LSM_SM90A)
template <int N>
void products_of_warpgroups(Machine const& machine) {
    constexpr double kCount = kLoop / 16 * 2 * 4;
    char name[32];
    for (int groups : {1, 2, 3}) {
        for (bool mixed : {true, false}) {
            double const clocks = mixed ? machine.clocks(wgmma_loop<N, true>, 128 * groups)
                                        : machine.clocks(wgmma_loop<N, false>, 128 * groups);
            std::snprintf(name, sizeof(name), "wgmma %s n%d", mixed ? "rs" : "ss", N);
            say(name, groups, "warpgroups", clocks / (groups * kCount), "clocks per product");
        }
    }
}
#endif

void run() {
    Machine const machine;
    for (int warps : {4, 8, 16}) {
        double const clocks = machine.clocks(mma_sync, 32 * warps);
        say("mma.sync m16n8k16", warps, "warps", clocks * 4 / (warps * kLoop * kChains),
            "clocks per product and scheduler");
    }
#if defined(LSM_SM90A)
    if (machine.hopper()) {
        products_of_warpgroups<32>(machine);
        products_of_warpgroups<64>(machine);
        products_of_warpgroups<128>(machine);
    }
#endif
    for (int warps : {4, 8, 16}) {
        int const threads = 32 * warps;
        say("ldmatrix.x4", warps, "warps",
            threads * 16.0 * kLoop / machine.clocks(load_matrices, threads), "bytes per clock");
    }
    for (int warps : {4, 8, 16, 32}) {
        int const threads = 32 * warps;
        say("ex2.approx", warps, "warps",
            double(threads) * kLoop * kChains / machine.clocks(exponentials, threads), "per clock");
    }
    for (int warps : {4, 8, 12, 16}) {
        int const threads = 32 * warps;
        say("selective scan's step", warps, "warps",
            warps * 16.0 * 5 * kLoop / machine.clocks(selective_steps, threads),
            "slots issued per clock, of 4");
    }
    constexpr int kRound = 512 * 8 * 16, kMost = 1 << 20, kData = 16 << 20;  // bytes
    uint4* data;
    check(cudaMalloc(&data, kData));
    check(cudaMemset(data, 0, kData));
    for (int readers : {8, 16, 32, 64, machine.blocks()}) {
        int const groups = (machine.blocks() + readers - 1) / readers;
        int const bytes = std::min(kMost, kData / groups) / kRound * kRound;
        say("second-level cache", readers, "readers",
            bytes / machine.clocks(cached_reads, 512, data, readers, bytes),
            "bytes per clock and SM");
    }
    int* flags;
    size_t const size = (machine.blocks() + 1) * 128;
    check(cudaMalloc(&flags, size));
    check(cudaMemset(flags, 0, size));
    say("handoff between blocks", machine.blocks() / 2, "pairs",
        machine.clocks(handoffs, 32, flags) / (2 * kLoop), "clocks one way");
    for (int warps : {4, 8, 16})
        say("__syncthreads", warps, "warps", machine.clocks(barriers, 32 * warps) / kLoop,
            "clocks");
}

}  // namespace
}  // namespace lsm

int main() {
    lsm::run();
}
