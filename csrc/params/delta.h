// The seam between PyTorch-facing code and kernels of the delta engine: plain structs, no torch, no
// CUDA.
#pragma once

#include "params/chunk.h"

namespace lsm {

// How a token changes the state S [K, V] beside the decay A = 1, e^g or Diag(e^g). All sums in fp32
// (fp64 for fp64).
//
//   householder   S <- A S,  then for each of the token's n micro-steps   S <- S + k (beta (v - S^T k))^T
//   comba         S <- A S + k (beta (v - S^T e))^T       the erased value is read before the decay, with a key of its own
//   dplr          S <- A S + b (S^T a)^T + k v^T          likewise; no beta
//
// Then o_t = scale · S^T q_t. n = 1 but for householder.
enum class Transition : int32_t { householder, comba, dplr };

// H heads of q, k, erase and write serve HV value heads (HV % H == 0): value head h reads head h /
// (HV / H). Micro-step j of token t is row t n + j of k, v, beta, erase, write and their gradients.
struct DeltaParams {
    Transition transition;
    Decay decay;            // none, scalar or key
    bool beta_per_channel;  // beta is [B, Tn, HV, V], one per value channel; else [B, Tn, HV]
    Dtype dtype;            // of q, k, v, erase, write, o and their gradients
    Dtype gate_dtype;       // of g and dg: dtype, or f32
    Dtype beta_dtype;       // of beta and dbeta: dtype, or f32
    Dtype state_dtype;      // f64 when dtype is f64 (CPU only), else f32
    int64_t B, T, H, HV, K, V;
    int64_t N;  // sequences: B, or the length of cu_seqlens minus one
    int64_t n;  // micro-steps per token, at least 1
    void const* cu_seqlens =
        nullptr;  // [N + 1], in tokens (not micro-steps), nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    double scale;

    Rows q;      // [B, T, H, K]
    Rows k;      // [B, Tn, H, K]
    Rows v;      // [B, Tn, HV, V]
    Rows g;      // [B, T, HV] at any strides, or [B, T, HV, K]; natural log; null: none
    Rows beta;   // [B, Tn, HV] at any strides, or [B, Tn, HV, V]; null with dplr
    Rows erase;  // [B, Tn, H, K]: e of comba, a of dplr; null with householder
    Rows write;  // [B, Tn, H, K]: b of dplr; else null
    void const* initial_state = nullptr;  // [N, HV, K, V] contiguous, nullable (zeros)

    // Forward.
    Rows o;                       // [B, T, HV, V]
    void* final_state = nullptr;  // [N, HV, K, V], nullable

    // Backward. dq, dk, derase and dwrite are per value head here, [B, T or Tn, HV, K]; the
    // launcher adds each group up.
    Dtype key_grad_dtype;                    // of those four: dtype, or f32 if HV > H (f64 for f64)
    Rows grad_o;                             // [B, T, HV, V]
    void const* grad_final_state = nullptr;  // [N, HV, K, V], nullable (zeros)
    Rows dq, dk, dv, dbeta, derase, dwrite;  // like what they belong to, contiguous
    Rows dg;                                 // like g, contiguous; null: not wanted
    void* grad_initial_state = nullptr;      // [N, HV, K, V], nullable
};

// One token: the state is read and written once.
struct DeltaStepParams {
    Transition transition;
    Decay decay;
    bool beta_per_channel;
    Dtype dtype, gate_dtype, beta_dtype, state_dtype;
    int64_t B, H, HV, K, V, n;
    double scale;
    Rows q, o;                // [B, 1, H, K], [B, 1, HV, V]
    Rows k, v, erase, write;  // [B, n, H, K], [B, n, HV, V]; time is the stride of micro-steps
    Rows g, beta;             // [B, 1, HV(, K)], [B, n, HV(, V)]
    void* state;              // [B, HV, K, V] contiguous, updated in place
};

// What a backend (cpu/, kernels/) provides to ops/delta.cpp. Workspaces are uninitialised bytes,
// 256-byte aligned.
int64_t delta_fwd_workspace(DeltaParams const& p);
int64_t delta_bwd_workspace(DeltaParams const& p);
void delta_fwd(DeltaParams const& p, void* workspace, void* stream);
void delta_bwd(DeltaParams const& p, void* workspace, void* stream);
void delta_step(DeltaStepParams const& p, void* stream);

}  // namespace lsm
