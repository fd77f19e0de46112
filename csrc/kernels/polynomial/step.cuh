// One token of polynomial attention: S += phi(k) v^T and z += phi(k) in place, o = S^T phi(q) / (|z . phi(q)| + eps).
//
// A block has 32 columns of one head's S, eight threads along them, and walks all features; each thread makes those of its
// rows from the token's channels. Every block of a head needs z as it was, so that where there are several nobody changes
// it but a launch after them.
#pragma once

#include "kernels/polynomial/common.cuh"

namespace lsm::polynomial {

struct StepTile {
    static constexpr int kThreads = 256, kColumns = 32, kRows = kThreads / 8,
                         kWarps = kThreads / 32;
};

struct StepOperands {
    Basis basis;
    Rows q, k, v, o;
    Dtype type;
    float *S, *z;
    i64 row, column;  // strides of S in a head
    int H, HV, F, V, channels, tiles;
    float scale, eps;
    bool divides, whole_vectors;  // rows of S are whole pieces of 16 bytes
};

// Features first, first + kRows, ... of a row.
struct Strided {
    int i, offset;

    LSM_DEVICE Strided(Basis const& basis, int first) : i(0), offset(first) { settle(basis); }
    LSM_DEVICE void next(Basis const& basis) {
        offset += StepTile::kRows;
        settle(basis);
    }
    LSM_DEVICE void settle(Basis const& basis) {
        while (i < basis.n && offset >= basis.n - i) offset -= basis.n - i, ++i;
    }
    LSM_DEVICE float of(Basis const& basis, float const* factors) const {
        return i == basis.n ? 0.f : basis.weight(i, i + offset) * factors[i] * factors[i + offset];
    }
};

// q and k with their constants, in shared memory.
LSM_DEVICE void load_factors(StepOperands const& p, i64 batch, int head, float* q, float* k) {
    int const group_head = head / (p.HV / p.H);
    for (int c = threadIdx.x; c < p.basis.n; c += blockDim.x) {
        int const channel = c - p.basis.constants;
        auto const load = [&](Rows const& x) {
            return load_number(x.data, batch * x.batch + group_head * x.head + channel, p.type);
        };
        q[c] = channel < 0 ? 1.f : p.scale * load(p.q);
        k[c] = channel < 0 ? 1.f : load(p.k);
    }
}

static __global__ void __launch_bounds__(StepTile::kThreads) step_token(StepOperands const p) {
    using C = StepTile;
    auto* const partial = reinterpret_cast<float(*)[C::kColumns + 4]>(dyn_smem());
    float* const q = partial[C::kWarps];
    float* const k = q + p.basis.n;
    i64 const chain = blockIdx.x / static_cast<unsigned>(p.tiles), batch = chain / p.HV;
    int const head = static_cast<int>(chain % p.HV), tid = threadIdx.x;
    int const column = static_cast<int>(blockIdx.x) % p.tiles * C::kColumns + tid % 8 * 4;
    load_factors(p, batch, head, q, k);
    float v[4], out[4] = {}, total = 0.f;
    LSM_UNROLL
    for (int j = 0; j < 4; ++j) {
        i64 const at = batch * p.v.batch + head * p.v.head + column + j;
        v[j] = column + j < p.V ? load_number(p.v.data, at, p.type) : 0.f;
    }
    __syncthreads();
    Strided pair(p.basis, tid / 8);
    LSM_UNROLL_BY(4)
    for (int f = tid / 8; f < p.F; f += C::kRows, pair.next(p.basis)) {
        float const key = pair.of(p.basis, k), query = pair.of(p.basis, q);
        float* const S = p.S + chain * p.F * p.V + f * p.row + column * p.column;
        float x[4];
        if (p.whole_vectors) {
            float4 const old = column < p.V ? load_global(reinterpret_cast<float4 const*>(S))
                                            : float4{0.f, 0.f, 0.f, 0.f};
            x[0] = old.x, x[1] = old.y, x[2] = old.z, x[3] = old.w;
        } else {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j)
                x[j] = column + j < p.V ? load_global(S + j * p.column) : 0.f;
        }
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) x[j] += key * v[j], out[j] += query * x[j];
        if (p.whole_vectors) {
            if (column < p.V)
                store_global(reinterpret_cast<float4*>(S), float4{x[0], x[1], x[2], x[3]});
        } else {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j)
                if (column + j < p.V) store_global(S + j * p.column, x[j]);
        }
        if (tid % 8 != 0) continue;
        float* const z = p.z + chain * p.F + f;
        float const now = load_global(z) + key;
        total += query * now;
        if (p.tiles == 1) store_global(z, now);
    }
    // Over the rows of a warp, then over the warps in their order.
    LSM_UNROLL
    for (int distance = 8; distance < 32; distance *= 2) {
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) out[j] += __shfl_xor_sync(0xffffffffu, out[j], distance);
        total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
    if (tid % 32 < 8) {
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) partial[tid / 32][tid % 8 * 4 + j] = out[j];
        if (tid % 32 == 0) partial[tid / 32][C::kColumns] = total;
    }
    __syncthreads();
    int const own = static_cast<int>(blockIdx.x) % p.tiles * C::kColumns + tid;
    if (tid >= C::kColumns || own >= p.V) return;
    float sum = 0.f, size = 0.f;
    for (int w = 0; w < C::kWarps; ++w) sum += partial[w][tid], size += partial[w][C::kColumns];
    store_number(p.o.data, batch * p.o.batch + head * p.o.head + own, p.type,
                 p.divides ? sum * inverse_of(size, p.eps) : sum);
}

// z of a head.
static __global__ void __launch_bounds__(StepTile::kThreads) step_sums(StepOperands const p) {
    float* const q = reinterpret_cast<float*>(dyn_smem());
    float* const k = q + p.basis.n;
    i64 const chain = blockIdx.x;
    load_factors(p, chain / p.HV, static_cast<int>(chain % p.HV), q, k);
    __syncthreads();
    for (int f = threadIdx.x; f < p.F; f += StepTile::kThreads) {
        float* const z = p.z + chain * p.F + f;
        store_global(z, load_global(z) + Pair(p.basis, f).of(k));
    }
}

inline void run_step(StepOperands const& p, i64 heads, void* stream) {
    using C = StepTile;
    if (heads == 0) return;
    size_t const factors = 2 * static_cast<size_t>(p.basis.n) * sizeof(float);
    launch(step_token, dim3(static_cast<unsigned>(heads * p.tiles)), dim3(C::kThreads),
           sizeof(float) * C::kWarps * (C::kColumns + 4) + factors, stream, p);
    if (p.tiles > 1)
        launch(step_sums, dim3(static_cast<unsigned>(heads)), dim3(C::kThreads), factors, stream,
               p);
}

}  // namespace lsm::polynomial
