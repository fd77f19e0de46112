// Every operator of lsm_cuda, grouped by engine: the table of contents of the C++ side.
// The same schemas serve torch.ops.lsm (CPU and CUDA kernels) and, in test builds, torch.ops.lsm_emu (the CUDA
// kernels on CPU tensors, through the SIMT emulator). Fake kernels and autograd formulas are registered in Python.
#include <torch/csrc/stable/library.h>

#ifndef LSM_NAMESPACE
#define LSM_NAMESPACE lsm
#endif

#define LSM_GATED_FWD                                                                            \
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, float " \
    "scale, bool output_final_state) -> (Tensor o, Tensor final_state)"
#define LSM_GATED_BWD                                                                            \
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, float " \
    "scale, Tensor grad_o, Tensor? grad_final_state, bool need_dg=True) -> (Tensor dq, Tensor "  \
    "dk, Tensor dv, Tensor dg, Tensor dh0)"
#define LSM_GATED_STEP \
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, float scale) -> Tensor"

STABLE_TORCH_LIBRARY(LSM_NAMESPACE, m) {
    // Chunk engine: S_t = decay(S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t. q, k [B,T,H,K]; v [B,T,HV,V]; states
    // [N,HV,K,V]; gates natural log. An absent result is an empty tensor. *_step takes one token per sequence, without
    // the T dimension; state [B,HV,K,V] is updated in place.

    // No decay (linear attention, Based, ...).
    m.def(
        "linear_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, "
        "float scale, bool output_final_state) -> (Tensor o, Tensor final_state)");
    m.def(
        "linear_attn_bwd(Tensor q, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, "
        "float scale, Tensor grad_o, Tensor? grad_final_state) -> (Tensor dq, Tensor dk, Tensor "
        "dv, Tensor dh0)");
    m.def(
        "linear_attn_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, float scale) -> Tensor");

    // One decay per head: g [B,T,HV], strides 0 where it is constant (RetNet, lightning attention, Mamba-2, mLSTM).
    m.def("simple_gla_fwd" LSM_GATED_FWD);
    m.def("simple_gla_bwd" LSM_GATED_BWD);
    m.def("simple_gla_step" LSM_GATED_STEP);

    // One decay per channel of the key: g [B,T,HV,K] (GLA, HGRN2, ...).
    m.def("gla_fwd" LSM_GATED_FWD);
    m.def("gla_bwd" LSM_GATED_BWD);
    m.def("gla_step" LSM_GATED_STEP);

    // One decay per channel of the value: g [B,T,HV,V] (first pass of ABC and GSA, gv of LAvv).
    m.def("gla_value_fwd" LSM_GATED_FWD);
    m.def("gla_value_bwd" LSM_GATED_BWD);
    m.def("gla_value_step" LSM_GATED_STEP);

    // As gla, but o_t = scale S_{t-1}^T q_t: tokens read before their own decay and write (RWKV-5, RWKV-6).
    m.def("rwkv6_fwd" LSM_GATED_FWD);
    m.def("rwkv6_bwd" LSM_GATED_BWD);
    m.def("rwkv6_step" LSM_GATED_STEP);
}
