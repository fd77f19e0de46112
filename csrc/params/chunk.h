// The seam between PyTorch-facing code and kernels of the chunk engine: plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "policy/features.h"

namespace lsm {

enum class Dtype : int32_t { bf16, f16, f32, f64 };

// A [B, T, H, D] tensor whose last dimension is contiguous. Strides in elements, 64-bit throughout.
struct Rows {
    void* data = nullptr;
    int64_t batch = 0, time = 0, head = 0;
};

// Rows of their own dtype: that of the other tensors, or f32. Parameters of heads, [HV] or [HV, D], have strides 0 along
// batch and time.
struct TypedRows : Rows {
    Dtype dtype = Dtype::f32;
};

// What the state S [K, V] forgets before token t writes to it.
enum class Decay : int32_t {
    none,    // nothing, and no g
    scalar,  // exp(g_t) S               g [B, T, HV]; strides 0 where it is constant in time
    key,     // Diag(exp g_t) S          g [B, T, HV, K]
    value,   // S Diag(exp g_t)          g [B, T, HV, V]
    both,    // Diag(exp g_t) S Diag(exp gv_t), g as by key, gv as by value
};

inline bool decays_keys(Decay decay) {
    return decay == Decay::key || decay == Decay::both;
}
inline bool decays_values(Decay decay) {
    return decay == Decay::value || decay == Decay::both;
}
// Numbers that a token's gates have in one head.
inline int64_t gates_per_token(Decay decay, int64_t K, int64_t V) {
    if (decay == Decay::scalar) return 1;
    return (decays_keys(decay) ? K : 0) + (decays_values(decay) ? V : 0);
}

// Sums n of what is written of keys, of which outputs are divided by max(|scale · q·n|, least) + eps.
// mLSTM: gates before their activation, of which log sigmoid(f) decays a head's state and exp(i) or sigmoid(i) weighs
// what is written to it; least is exp(-m). States are kept scaled down by exp(m) (policy/input_gate.h).
// Without gates nothing decays, every weight is 1 and least is 0. With weights_only i and f are weights and log decays as
// they are, in state_dtype, and there are no sums.
struct Normaliser {
    bool on = false;  // else nothing else here means anything
    bool gated = false, weights_only = false;
    bool sums() const { return on && !weights_only; }
    Rows i, f;                                // [B, T, HV], T = 1 in a step
    Dtype dtype;                              // theirs: that of q, or f32
    void const *n0 = nullptr, *m0 = nullptr;  // [N, HV, K] and [N, HV] contiguous, nullable (zeros)
    void *n = nullptr,
         *m = nullptr;  // after the last token, nullable; those of a step are n0 and m0
    bool exponential;   // the input gate; else a sigmoid, and m stays
    bool divides;       // whether outputs are divided at all
    double eps;
    void* tokens =
        nullptr;  // whole sequences: [kGateRows, B, HV, T] in state_dtype, to be filled; else null

    // Backward, which has the tokens' rows and the outputs (o) but no gates; with weights_only it has those alone, and
    // fills the rows again. Gradients are those of n, of n0 (nullable both), and of the logarithm of each token's weight,
    // or of weights_only of the weight, [B, T, HV] in state_dtype, nullable.
    void const* grad_n = nullptr;
    void* grad_n0 = nullptr;
    Rows dweight;
};
// Rows of Normaliser::tokens: log decay, weight, scale · q·n where outputs are divided, least.
inline constexpr int64_t kGateRows = 4;

// What becomes of an output o: (o + skip v) silu(z), of which either may be absent.
struct Finish {
    TypedRows skip;      // [HV] or [HV, V], nullable
    bool skip_channels;  // which of the two
    Rows z;              // [B, T, HV, V], T = 1 in a step; nullable

    // Whole sequences with z: the outputs before it gates them, which the backward reads. Nullable forward.
    Rows ungated;
    // Backward.
    Rows dz;                 // [B, T, HV, V], with z
    float* dskip = nullptr;  // [finish_gradient_pieces, HV, V], to be added up; nullable
};

// S_t = decay(S_{t-1}) + k_t v_t^T,   o_t = scale · S_t^T q_t,   or o_t = scale · S_{t-1}^T q_t if exclusive.
// H query/key heads serve HV value heads (HV % H == 0): value head h reads query/key head h / (HV / H).
struct ChunkParams {
    Decay decay;
    bool exclusive;     // tokens read the state as it was before their own decay and write
    int32_t gate;       // what the numbers in a gate say: a place in policy/gate.h's list
    Dtype dtype;        // of q, k, v, o and their gradients
    Dtype gate_dtype;   // of gates and their gradients: dtype, or f32
    Dtype state_dtype;  // f64 when dtype is f64 (CPU only), else f32
    int64_t B, T, H, HV, K, V;
    int64_t N;                           // sequences: B, or the length of cu_seqlens minus one
    Features features = Features::none;  // of q and k, with a normaliser
    int64_t channels;                    // of q and k, of which features make K; else K
    void const* cu_seqlens = nullptr;    // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    double scale;

    Rows q, k;   // [B, T, H, channels]
    Rows v;      // [B, T, HV, V]
    Rows g, gv;  // gates, shapes by `decay`; their last dimension is contiguous
    void const* initial_state = nullptr;  // [N, HV, K, V] contiguous, nullable (zeros)
    Normaliser normaliser;                // g is then the first of its rows of tokens

    // Whole sequences on tensor cores, of a scalar decay: what a token writes is multiplied by w [B, T, HV], fp32, null if
    // there is none; then outputs are finished, and the backward leaves the gradients of g and of w.
    Rows w;
    Finish finish;
    Rows dw;

    // Forward; the backward of a normaliser reads o.
    Rows o;                       // [B, T, HV, V]
    void* final_state = nullptr;  // [N, HV, K, V], nullable

    // Backward. dq and dk are per value head here, [B, T, HV, channels]; the launcher adds each group up.
    Dtype key_grad_dtype;                    // of dq and dk: dtype, or on the CPU f32 if HV > H
    Rows grad_o;                             // [B, T, HV, V]
    void const* grad_final_state = nullptr;  // [N, HV, K, V], nullable (zeros)
    Rows dq, dk, dv;
    Rows dg, dgv;                        // like g and gv, contiguous; null: not wanted
    void* grad_initial_state = nullptr;  // [N, HV, K, V], nullable
};

// Mamba-2's step sizes dt, softplus(dt + bias) or that sum: what a token writes is weighed with dt, its head's state is
// decayed by exp(dt A).
struct StepSizes {
    TypedRows dt;       // [B, 1, HV], nullable: then nothing else here means anything
    TypedRows A, bias;  // [HV], bias nullable
    bool softplus;
};

// One token: the state is read once, decayed and written to; the query reads it after that, or before if exclusive.
struct StepParams {
    Decay decay;
    bool exclusive;
    int32_t gate;
    Dtype dtype, gate_dtype, state_dtype;
    int64_t B, H, HV, K, V;
    Features features = Features::none;  // as in ChunkParams
    int64_t channels;
    double scale;
    Rows q, k;          // [B, 1, H, channels]
    Rows v, o;          // [B, 1, HV, V]
    Rows g, gv;         // [B, 1, HV] or [B, 1, HV, K or V], by `decay`
    TypedRows u;        // [B, 1, HV, K], nullable: if exclusive, the query reads Diag(u) k v^T too
    bool values_first;  // how the state lies: [B, HV, V, K] rather than [B, HV, K, V]
    void* state;        // contiguous, updated in place
    Normaliser normaliser;
    StepSizes sizes;
    Finish finish;
};

// What a backend (cpu/, kernels/) provides to ops/chunk.cpp. Workspaces are uninitialised bytes, 256-byte aligned.
int64_t chunk_fwd_workspace(ChunkParams const& p);
int64_t chunk_bwd_workspace(ChunkParams const& p);
void chunk_fwd(ChunkParams const& p, void* workspace, void* stream);
void chunk_bwd(ChunkParams const& p, void* workspace, void* stream);
int64_t finish_gradient_pieces(ChunkParams const& p);
int64_t step_workspace(StepParams const& p);
void step(StepParams const& p, void* workspace, void* stream);

}  // namespace lsm
