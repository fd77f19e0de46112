// The seam between PyTorch-facing code and kernels of the scan engine: plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "params/chunk.h"

namespace lsm {

// What a token does to the state h [D]:   h_t = a_t ⊙ h_{t-1} + x_t.
enum class Scan : int32_t {
    token,     // a [B, T, D], as it is or as its logarithm
    constant,  // a [D], likewise
    rg_lru,    // of x, i, r [B, T, D] and c [D]:   a = exp(c σ(r)),   x ← sqrt(1 − a²) σ(i) x
};

// Positions are walked in order, or from the last to the first if `reverse`; position p of a row is token order[p].
struct ScanParams {
    Scan kind;
    bool log;         // a is given as its logarithm
    bool is_complex;  // tokens and states are pairs (real, imaginary) of dtype
    bool reverse;
    Dtype dtype;       // of x, i, r, h and their gradients
    Dtype gate_dtype;  // of a [B, T, D]: dtype, or f32
    Dtype
        state_dtype;  // of states and of what is per channel: f64 when dtype is f64 (CPU only), else f32
    int64_t B, T, D;
    int64_t N;                         // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens = nullptr;  // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    int32_t const* order = nullptr;  // [T], a permutation; nullable: the identity

    Rows x, i;                      // [B, T, D]; i: rg_lru only
    Rows a;                         // [B, T, D]: a, or r of rg_lru
    void const* channel = nullptr;  // [D]: constant a, or c of rg_lru
    void const* initial_state =
        nullptr;  // [N, D] contiguous, nullable (zeros; rg_lru: first tokens have a = 0)

    Rows h;                       // [B, T, D]: written by the forward, read by the backward
    void* final_state = nullptr;  // [N, D], nullable

    // Backward.
    Rows grad_h;
    void const* grad_final_state = nullptr;  // [N, D], nullable (zeros)
    Rows dx, di, da;                         // da null: not wanted
    void* channel_grad = nullptr;            // [D], of what `channel` holds; null: not wanted
    void* grad_initial_state = nullptr;      // [N, D], nullable
};

// What a backend (cpu/, kernels/) provides to ops/scan.cpp. Workspaces are uninitialised bytes, 256-byte aligned.
int64_t scan_fwd_workspace(ScanParams const& p);
int64_t scan_bwd_workspace(ScanParams const& p);
void scan_fwd(ScanParams const& p, void* workspace, void* stream);
void scan_bwd(ScanParams const& p, void* workspace, void* stream);

}  // namespace lsm
