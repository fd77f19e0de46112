// The seam between PyTorch-facing code and kernels of the sLSTM cell: plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "params/chunk.h"

namespace lsm {

// Four gates' pre-activations i, f, z, o [D] of a head see the head's last output, raw = x_t + h_{t-1} R:
//
//     m_t = max(log σ(f) + m_{t-1}, i)      i' = e^{i - m_t},  f' = e^{log σ(f) + m_{t-1} - m_t}
//     c_t = f' c_{t-1} + i' tanh(z)         n_t = f' n_{t-1} + i'         h_t = σ(o) c_t / n_t
//
// m_{t-1} counts as -inf where n_{t-1} = 0, that is before the first token. A state is h, c, n, m.
struct SlstmParams {
    Dtype dtype;        // of x and y
    Dtype state_dtype;  // of everything else: f64 when dtype is f64 (CPU only), else f32
    int64_t B, T, H, D;
    int64_t N;                         // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens = nullptr;  // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    void const* initial_state = nullptr;  // [N, 4, H, D], nullable (zeros)

    // Forward; everything contiguous. A step is one with T = 1 and final_state = initial_state.
    void const* x = nullptr;      // [B, T, 4, H, D]
    void const* R = nullptr;      // [H, D, 4 D]
    void* y = nullptr;            // [B, T, H, D]
    void* cells = nullptr;        // [B, T, 4, H, D]: the state after every token, nullable
    void* final_state = nullptr;  // [N, 4, H, D], nullable

    // Backward.
    void const* raw = nullptr;               // [B, T, 4, H, D]
    void const* R_transposed = nullptr;      // [H, 4 D, D]
    void const* states = nullptr;            // [B, T, 4, H, D]: cells of the forward
    void const* grad_y = nullptr;            // [B, T, H, D]
    void const* grad_final_state = nullptr;  // [N, 4, H, D], nullable (zeros)
    void* draw = nullptr;                    // [B, T, 4, H, D]
    void* grad_initial_state = nullptr;      // [N, 4, H, D], nullable
};

// What a backend (cpu/, kernels/) provides to ops/slstm.cpp. Workspaces are uninitialised bytes, 256-byte aligned.
int64_t slstm_workspace(SlstmParams const& p);
void slstm_fwd(SlstmParams const& p, void* workspace, void* stream);
void slstm_bwd(SlstmParams const& p, void* workspace, void* stream);

}  // namespace lsm
