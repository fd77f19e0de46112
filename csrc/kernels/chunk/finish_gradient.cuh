// Backwards through y = u silu(z), u = o + skip x, in one pass before the sweeps:
//
//     dO = dy silu(z)        dz = dy u silu'(z)        dskip = sum over tokens of dO x
//
// A block owns kFinishTokens tokens of one value head, a thread 8 of its columns and every so-manieth token. Sums are over
// a thread's tokens, then over threads in their order; those of blocks are left to be added up. Grid: (piece, head).
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm {

inline constexpr int kFinishTokens = 256, kFinishThreads = 128;

struct FinishGradientParams {
    Rows dy, z, ungated;  // [B, T, HV, V]; without z dO is dy, and nothing but sums is made
    Rows x;               // [B, T, HV, V]
    Rows grad_o, dz;      // [B, T, HV, V]
    float* dskip;         // [pieces, HV, V], nullable
    int heads, columns;   // columns: pieces of 8
    int64_t tokens, tokens_per_row;
};

struct FinishGradientStorage {
    float sums[kFinishThreads][8];
};

LSM_DEVICE void load_8(Rows const& x, i64 at, float (&to)[8]) {
    uint4 const piece =
        load_global(reinterpret_cast<uint4 const*>(static_cast<bf16*>(x.data) + at));
    u32 const words[4] = {piece.x, piece.y, piece.z, piece.w};
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack(words[i]);
        to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
}

LSM_DEVICE void store_8(Rows const& x, i64 at, float const (&from)[8]) {
    store_global(reinterpret_cast<uint4*>(static_cast<bf16*>(x.data) + at),
                 uint4{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                       pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7])});
}

static __global__ void __launch_bounds__(kFinishThreads)
    finish_gradient(FinishGradientParams const p) {
    auto& s = *reinterpret_cast<FinishGradientStorage*>(dyn_smem());
    int const head = static_cast<int>(blockIdx.x % p.heads), tid = threadIdx.x;
    i64 const piece = blockIdx.x / p.heads;
    int const groups = kFinishThreads / p.columns, group = tid / p.columns;
    i64 const begin = piece * kFinishTokens,
              end = begin + kFinishTokens < p.tokens ? begin + kFinishTokens : p.tokens;
    float sums[8] = {};
    for (i64 token = begin + group; group < groups && token < end; token += groups) {
        i64 const batch = token / p.tokens_per_row, t = token - batch * p.tokens_per_row;
        auto const at = [&](Rows const& x) {
            return batch * x.batch + t * x.time + head * x.head + tid % p.columns * 8;
        };
        float dy[8], x[8];
        load_8(p.dy, at(p.dy), dy);
        if (p.z.data != nullptr) {
            float z[8], u[8], dz[8];
            load_8(p.z, at(p.z), z);
            load_8(p.ungated, at(p.ungated), u);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) {
                float const open = 1.f / (1.f + exp2_approx(-1.44269504f * z[i]));
                dz[i] = dy[i] * u[i] * (open * (1.f + z[i] * (1.f - open)));
                dy[i] *= z[i] * open;
            }
            store_8(p.dz, at(p.dz), dz);
            store_8(p.grad_o, at(p.grad_o), dy);
        }
        if (p.dskip != nullptr) {
            load_8(p.x, at(p.x), x);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) sums[i] += dy[i] * x[i];
        }
    }
    if (p.dskip == nullptr) return;
    LSM_UNROLL
    for (int i = 0; i < 8; ++i) s.sums[tid][i] = sums[i];
    __syncthreads();
    for (int v = tid; v < p.columns * 8; v += kFinishThreads) {
        float sum = 0.f;
        for (int g = 0; g < groups; ++g) sum += s.sums[g * p.columns + v / 8][v % 8];
        store_global(p.dskip + (piece * p.heads + head) * p.columns * 8 + v, sum);
    }
}

// The gradient of what sweeps read, in `scratch` where z gates it.
inline Rows run_finish_gradient(ChunkParams const& p, Rows const& scratch, void* stream) {
    bool const gated = p.finish.z.data != nullptr;
    i64 const blocks = finish_gradient_pieces(p) * p.HV;
    Rows const grad_o = gated ? scratch : p.grad_o;
    if (blocks == 0 || !(gated || p.finish.dskip != nullptr)) return grad_o;
    FinishGradientParams const fp{p.grad_o,
                                  p.finish.z,
                                  p.finish.ungated,
                                  p.v,
                                  grad_o,
                                  p.finish.dz,
                                  p.finish.dskip,
                                  static_cast<int>(p.HV),
                                  static_cast<int>(p.V / 8),
                                  p.B * p.T,
                                  p.T};
    launch(finish_gradient, dim3(static_cast<unsigned>(blocks)), dim3(kFinishThreads),
           sizeof(FinishGradientStorage), stream, fp);
    return grad_o;
}

}  // namespace lsm
