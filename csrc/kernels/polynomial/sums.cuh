// What stands around the walks of polynomial attention, per token: the numbers a backward starts from, and sums of the
// shares that blocks have in one result.
#pragma once

#include "kernels/polynomial/common.cuh"
#include "kernels/polynomial/walk.cuh"

namespace lsm::polynomial {

constexpr int kThreads = 128;

struct DivisorParams {
    Rows o, grad_o;
    Dtype type;
    float const* size;       // the row of tokens that has totals, [B, HV, T]
    float *inverse, *below;  // [B, HV, T]: 1 / (|size| + eps); the gradient of size
    i64 B, T;
    int HV, V;
    float eps;
};

// A warp per token and head.
static __global__ void __launch_bounds__(kThreads) divisors(DivisorParams const p) {
    i64 const row = i64(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= p.B * p.T * p.HV) return;
    int const lane = threadIdx.x % 32, head = static_cast<int>(row % p.HV);
    i64 const batch = row / p.HV / p.T, t = row / p.HV % p.T;
    auto const first = [&](Rows const& x) { return batch * x.batch + t * x.time + head * x.head; };
    float dot = 0.f;
    for (int c = lane; c < p.V; c += 32)
        dot += load_number(p.o.data, first(p.o) + c, p.type) *
               load_number(p.grad_o.data, first(p.grad_o) + c, p.type);
    LSM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2)
        dot += __shfl_xor_sync(0xffffffffu, dot, distance);
    if (lane != 0) return;
    i64 const at = (batch * p.HV + head) * p.T + t;
    float const size = load_global(p.size + at), inverse = inverse_of(size, p.eps);
    store_global(p.inverse + at, inverse);
    float const below = size > 0.f ? -dot * inverse : dot * inverse;
    store_global(p.below + at, size == 0.f ? 0.f : below);
}

inline void run_divisors(DivisorParams const& p, void* stream) {
    i64 const warps = p.B * p.T * p.HV, per_block = kThreads / 32;
    if (warps > 0)
        launch(divisors, dim3(static_cast<unsigned>((warps + per_block - 1) / per_block)),
               dim3(kThreads), 0, stream, p);
}

struct SumParams {
    Result to;
    int shares, width;
    i64 B, T;
    int HV;
    // Of o, which is divided by the sum of the totals.
    float const* totals;  // [slices, B T HV], nullable
    float* tokens;
    int slices;
    bool divides;
    float eps;
};

static __global__ void __launch_bounds__(kThreads) sum_shares(SumParams const p) {
    i64 const i = i64(blockIdx.x) * kThreads + threadIdx.x, rows = p.B * p.T * p.HV;
    if (i >= rows * p.width) return;
    i64 const row = i / p.width, batch = row / p.HV / p.T, t = row / p.HV % p.T;
    int const c = static_cast<int>(i % p.width), head = static_cast<int>(row % p.HV);
    float sum = 0.f;
    for (int share = 0; share < p.shares; ++share)
        sum += load_global(p.to.shares + share * rows * p.width + i);
    if (p.totals != nullptr) {
        float total = 0.f;
        for (int slice = 0; slice < p.slices; ++slice)
            total += load_global(p.totals + slice * rows + row);
        if (c == 0) store_token(p.tokens, (batch * p.HV + head) * p.T + t, rows, total);
        if (p.divides) sum *= inverse_of(total, p.eps);
    }
    Rows const& to = p.to.rows;
    store_number(to.data, batch * to.batch + t * to.time + head * to.head + c, p.to.type, sum);
}

inline void run_sum(SumParams const& p, void* stream) {
    i64 const numbers = p.B * p.T * p.HV * p.width;
    if (p.to.shares == nullptr || numbers == 0) return;
    launch(sum_shares, dim3(static_cast<unsigned>((numbers + kThreads - 1) / kThreads)),
           dim3(kThreads), 0, stream, p);
}

}  // namespace lsm::polynomial
