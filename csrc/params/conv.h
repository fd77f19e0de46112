// The seam between PyTorch-facing code and kernels of the short convolution: plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "params/chunk.h"

namespace lsm {

// A [B, T, D] tensor; strides in elements. Of time and channel, one is 1.
struct Strided {
    void* data = nullptr;
    int64_t batch = 0, time = 0, channel = 0;

    bool channel_last() const { return channel == 1; }
};

// y_t[d] = act(bias[d] + sum_j weight[d, W - 1 - j] x_{t-j}[d]),  j < W, of the inputs of t's own sequence;
// before its first token come the columns of the initial state, the latest last. With `norm`, every head of so many
// channels, as far as the first `normed` go, is divided by sqrt(sum of its squares + norm_eps).
struct ConvParams {
    bool silu;           // act; else the identity
    Dtype dtype;         // of x, y, the states and their gradients
    Dtype weight_dtype;  // of weight, bias and their gradients: dtype, or f32
    int64_t B, T, D, W;
    int64_t S;           // inputs in a state; at least W - 1 in an initial one
    int64_t norm = 0;    // channels of a head; 0: no norm
    int64_t normed = 0;  // channels of all that have one, the first ones: a multiple of norm
    double norm_eps = 0;
    int64_t N;                         // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens = nullptr;  // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    int32_t const* seq_idx =
        nullptr;  // [B, T], nullable: a change begins a sequence; then no states

    Strided x;                            // [B, T, D]
    void const* weight;                   // [D, W] contiguous
    void const* bias = nullptr;           // [D], nullable
    void const* initial_state = nullptr;  // [N, D, S] contiguous, nullable (zeros)

    // Forward.
    Strided y;                    // [B, T, D], channel last as x or not as x
    void* final_state = nullptr;  // [N, D, S], nullable

    // Backward.
    Strided grad_y, dx;                      // likewise
    void const* grad_final_state = nullptr;  // [N, D, S], nullable (zeros)
    void* grad_initial_state = nullptr;      // [N, D, S], nullable
    void* dweight = nullptr;                 // [D, W], nullable: not wanted
    void* dbias = nullptr;                   // [D], nullable
};

// A few tokens after a state that holds the last S inputs of every sequence; it takes them in, in place. With
// `seen`, the state is a ring: the input at position i lies in column i mod S, and the first new one is at seen[b].
struct ConvStepParams {
    bool silu;
    Dtype dtype, weight_dtype;
    int64_t B, T, D, W, S;
    Strided x, y;  // [B, T, D], at any strides
    void const* weight;
    void const* bias = nullptr;
    void* state;                                               // [M, D, S]
    int64_t state_row = 0, state_channel = 0, state_time = 0;  // its strides
    int32_t const* seen = nullptr;                             // [B], nullable: no ring
    int32_t const* rows = nullptr;  // [B], nullable: row b; negative: nothing is read, y = 0
};

// What a backend (cpu/, kernels/) provides to ops/conv.cpp. Workspaces are uninitialised bytes, 256-byte aligned.
int64_t conv_fwd_workspace(ConvParams const& p);
int64_t conv_bwd_workspace(ConvParams const& p);
void conv_fwd(ConvParams const& p, void* workspace, void* stream);
void conv_bwd(ConvParams const& p, void* workspace, void* stream);
void conv_step(ConvStepParams const& p, void* stream);

}  // namespace lsm
