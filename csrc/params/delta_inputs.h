// The seam between PyTorch-facing code and kernels of what comes before the delta rules: queries and keys of unit
// length, decays and strengths from their logits. Plain structs, no torch, no CUDA.
#pragma once

#include "params/chunk.h"

namespace lsm {

// Rows x and y of one argument, before and after; [B, T, H, D], D alone contiguous. Without tokens: absent.
struct DeltaInput {
    Rows x, y;
    Rows grad_y, dx;  // backward
    int64_t B = 0, T = 0, H = 1, D = 1;
    Dtype dtype = Dtype::
        f32;  // of x and dx; of y and grad_y too where they have a length, else f32 (f64 for f64)

    constexpr int64_t tokens() const { return B * T; }
};

// Accumulated in fp32; lengths of fp32 rows in fp64, for what a length is off by is common to a whole row.
struct DeltaInputsParams {
    DeltaInput q, k;  // x / sqrt(|x|^2 + eps)
    double eps;

    // The log decay of z = x + dt_bias, with the rate r = exp(A_log): -r softplus(z), or lower_bound sigmoid(r z).
    DeltaInput g;     // B = 1
    bool by_channel;  // A_log [H] and dt_bias [H D]; else both [D], and H = 1
    bool bounded;
    double lower_bound;
    void const *A_log = nullptr,
               *dt_bias = nullptr;  // f32 (f64 for f64), contiguous; nullable (zeros)

    DeltaInput beta;  // strength sigmoid(x); B = 1
    double strength;

    // Backward: sums over all tokens, in A_log's type, nullable.
    void *dA_log = nullptr, *ddt_bias = nullptr;

    constexpr int64_t rates() const { return by_channel ? g.H : g.D; }
    constexpr int64_t biases() const { return g.H * g.D; }
};

// What a backend (cpu/, kernels/) provides to ops/delta_inputs.cpp, as in params/delta.h.
int64_t delta_inputs_bwd_workspace(DeltaInputsParams const& p);
void delta_inputs_fwd(DeltaInputsParams const& p, void* stream);
void delta_inputs_bwd(DeltaInputsParams const& p, void* workspace, void* stream);

}  // namespace lsm
