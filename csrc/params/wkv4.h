// The seam between PyTorch-facing code and kernels of RWKV-4's running average: plain structs, no torch, no CUDA.
#pragma once

#include "params/scan.h"

namespace lsm {

// Per channel, with the rate r and the bonus u,
//
//     o_t = (A_{t-1} + e^{u + k_t} v_t) / (B_{t-1} + e^{u + k_t})
//     A_t = e^{-r} A_{t-1} + e^{k_t} v_t                           B_t the same with v = 1
//
// A state is a numerator and a denominator, A and B over e^m, and m, the logarithm of the largest weight in them.
//
// Of ScanParams: x, dx are v's; a, da k's; h, grad_h o's; channel is r, [D]; initial_state, final_state and their
// gradients are the numerators. kind, log, is_complex, reverse and order mean nothing.
struct Wkv4Params : ScanParams {
    void const* bonus = nullptr;                                          // u, [D]
    void const *initial_denominator = nullptr, *initial_scale = nullptr;  // [N, D], with the first
    void *final_denominator = nullptr, *final_scale = nullptr;            // [N, D], likewise

    // [wkv4_tiles(p), 3, D]: numerator, denominator and m before every kWkv4Tile-th token of a sequence, as the
    // backend has them. Written by the forward if not null, read by the backward.
    void* states = nullptr;

    // Backward; channel_grad is [2, D], of r and u. final_scale is read where grad_final_state is not null.
    void const* grad_final_denominator = nullptr;
    void* grad_initial_denominator = nullptr;
};

constexpr int64_t kWkv4Tile = 32;

// Of all sequences; packed ones have room for one more each.
inline int64_t wkv4_tiles(ScanParams const& p) {
    int64_t const whole = (p.T + kWkv4Tile - 1) / kWkv4Tile;
    return p.cu_seqlens != nullptr ? whole + p.N : p.N * whole;
}

// What a backend (cpu/, kernels/) provides to ops/wkv4.cpp, as in params/scan.h.
int64_t wkv4_fwd_workspace(Wkv4Params const& p);
int64_t wkv4_bwd_workspace(Wkv4Params const& p);
void wkv4_fwd(Wkv4Params const& p, void* workspace, void* stream);
void wkv4_bwd(Wkv4Params const& p, void* workspace, void* stream);

// Both directions (bi_wkv): A'_t is the same sum of what follows a token,
//
//     o_t = (A_{t-1} + e^{u + k_t} v_t + A'_{t+1}) / (B_{t-1} + e^{u + k_t} + B'_{t+1})
//
// without states at the ends.
int64_t bi_wkv_fwd_workspace(Wkv4Params const& p);
int64_t bi_wkv_bwd_workspace(Wkv4Params const& p);
void bi_wkv_fwd(Wkv4Params const& p, void* workspace, void* stream);
void bi_wkv_bwd(Wkv4Params const& p, void* workspace, void* stream);

}  // namespace lsm
