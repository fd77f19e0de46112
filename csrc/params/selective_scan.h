// The seam between PyTorch-facing code and kernels of the selective scan: plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "params/chunk.h"

namespace lsm {

// Tokens of a tile of the CUDA kernels.
constexpr int selective_tile(bool is_complex) {
    return is_complex ? 16 : 32;
}

// Rows with a stride between the numbers of a row.
struct Projection : Rows {
    int64_t state = 1;
};

// Per channel d, with S states:
//     h_t = exp(dt_t A_d) ⊙ h_{t-1} + dt_t u_t B_t        y_t = (C_t · h_t + D_d u_t) silu(z_t)
// dt_t is what came plus its bias, through softplus if asked. Complex: A, B, C and h are, and y has 2 Re(C_t · h_t).
// B and C are a token's, [B, T, G, S] with channel d in group d / (D / G), or a channel's, [D, S].
struct SelectiveParams {
    bool is_complex;  // A, B, C and states are pairs (real, imaginary)
    bool softplus;
    bool channel_B, channel_C;
    Dtype dtype;        // of u, dt, z, y, B and C of tokens, and their gradients (components)
    Dtype state_dtype;  // of everything else: f64 when dtype is f64 (CPU only), else f32
    int64_t B, T, D, S, G;
    int64_t N;                         // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens = nullptr;  // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;

    // [T], a permutation; nullable: the identity. Position t of a row is token order[t].
    int32_t const* order = nullptr;

    // [B, T, D]. Here and below, head: between channels, 1 or (without order, with time = 1) anything; on CUDA 1 in all
    // of them if it is in u, and in results as in u.
    Rows u, dt;
    Rows z;  // [B, T, D], nullable
    Projection b,
        c;  // [B, T, G, S] (head: the group), or data alone: [D, S] contiguous; CPU: state is 1
    void const* A = nullptr;              // [D, S] contiguous
    void const* skip = nullptr;           // D of the equation, [D], nullable
    void const* dt_bias = nullptr;        // [D], nullable
    void const* initial_state = nullptr;  // [N, D, S] contiguous, nullable (zeros)

    // Forward.
    Rows y;                       // [B, T, D]
    void* final_state = nullptr;  // [N, D, S], nullable

    // selective_saved_states(p) numbers that a forward writes for the backward; nullable in a forward.
    void* saved_states = nullptr;

    // Backward; the gradients of nullable inputs are null with them.
    Rows grad_y;
    void const* grad_final_state = nullptr;  // [N, D, S], nullable (zeros)
    Rows du, ddt, dz;
    void *db = nullptr,
         *dc = nullptr;  // [B, T, G, S] in dtype, or [D, S] in state_dtype; contiguous
    void *dA = nullptr, *dskip = nullptr, *ddt_bias = nullptr;
    void* grad_initial_state = nullptr;  // [N, D, S], nullable
};

// What a backend (cpu/, kernels/) provides to ops/selective_scan.cpp.
int64_t selective_saved_states(SelectiveParams const& p);
int64_t selective_fwd_workspace(SelectiveParams const& p);
int64_t selective_bwd_workspace(SelectiveParams const& p);
void selective_fwd(SelectiveParams const& p, void* workspace, void* stream);
void selective_bwd(SelectiveParams const& p, void* workspace, void* stream);

}  // namespace lsm
