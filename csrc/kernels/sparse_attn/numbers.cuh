// Rows of numbers of any type.
#pragma once

#include "kernels/sparse_attn/geometry.cuh"
#include "kernels/warp.cuh"

namespace lsm::sparse_attn {

LSM_DEVICE int bytes_of(Dtype type) {
    return type == Dtype::f32 ? 4 : 2;
}

LSM_DEVICE float2 halves(u32 pair, Dtype type) {
    if (type == Dtype::bf16)
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    __half2 const h = reinterpret_cast<__half2 const&>(pair);
    return {__low2float(h), __high2float(h)};
}

// Four numbers from element `at` of a tensor; 8 or 16 bytes, aligned.
LSM_DEVICE float4 load4(void const* data, i64 at, Dtype type) {
    char const* const from = static_cast<char const*>(data) + at * bytes_of(type);
    if (type == Dtype::f32) return load_global(reinterpret_cast<float4 const*>(from));
    uint2 const raw = load_global(reinterpret_cast<uint2 const*>(from));
    float2 const low = halves(raw.x, type), high = halves(raw.y, type);
    return {low.x, low.y, high.x, high.y};
}

LSM_DEVICE void store4(void* data, i64 at, Dtype type, float4 x) {
    char* const to = static_cast<char*>(data) + at * bytes_of(type);
    if (type == Dtype::f32) return store_global(reinterpret_cast<float4*>(to), x);
    uint2 raw;
    if (type == Dtype::bf16) {
        bf16* const tag = nullptr;
        raw = {pack(x.x, x.y, tag), pack(x.z, x.w, tag)};
    } else {
        half* const tag = nullptr;
        raw = {pack(x.x, x.y, tag), pack(x.z, x.w, tag)};
    }
    store_global(reinterpret_cast<uint2*>(to), raw);
}

// A warp's row of up to 32 n columns: of a lane 4 lane + {0..3}, and 128 on.
constexpr int lane_columns(int columns) {
    return columns > 256 ? 20 : 8;
}

template <int kCount>
LSM_DEVICE void load_row(Rows const& x, i64 at, Dtype type, int columns, float (&row)[kCount]) {
    LSM_UNROLL
    for (int i = 0; i < kCount; i += 4) {
        int const c = 4 * static_cast<int>(threadIdx.x % 32) + 32 * i;
        float4 const four = c < columns ? load4(x.data, at + c, type) : float4{0.f, 0.f, 0.f, 0.f};
        row[i] = four.x, row[i + 1] = four.y, row[i + 2] = four.z, row[i + 3] = four.w;
    }
}

template <int kCount>
LSM_DEVICE void store_row(Rows const& x, i64 at, Dtype type, int columns,
                          float const (&sums)[kCount], float by) {
    LSM_UNROLL
    for (int i = 0; i < kCount; i += 4) {
        int const c = 4 * static_cast<int>(threadIdx.x % 32) + 32 * i;
        if (c < columns)
            store4(x.data, at + c, type,
                   {sums[i] * by, sums[i + 1] * by, sums[i + 2] * by, sums[i + 3] * by});
    }
}

LSM_DEVICE i64 row_offset(Rows const& x, i64 batch, i64 time, i64 head) {
    return batch * x.batch + time * x.time + head * x.head;
}

// [B, H, T] from [B, T, H].
LSM_DEVICE i64 per_head(Work const& work, i64 batch, i64 time, i64 head) {
    return (batch * work.p.Hq + head) * work.p.Tq + time;
}

}  // namespace lsm::sparse_attn
