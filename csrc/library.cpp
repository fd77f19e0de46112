// Every operator of lsm_cuda, grouped by engine: the table of contents of the C++ side.
// The same schemas serve torch.ops.lsm (CPU and CUDA kernels) and, in test builds, torch.ops.lsm_emu (the CUDA
// kernels on CPU tensors, through the SIMT emulator). Fake kernels and autograd formulas are registered in Python.
#include <torch/csrc/stable/library.h>

#ifndef LSM_NAMESPACE
#define LSM_NAMESPACE lsm
#endif

STABLE_TORCH_LIBRARY(LSM_NAMESPACE, m) {
    // Chunk engine, vector decay (GLA, HGRN2, ...). q, k [B,T,H,K]; v [B,T,HV,V]; g [B,T,HV,K] natural log; states
    // [N,HV,K,V]. An absent result is an empty tensor.
    m.def(
        "gla_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? "
        "cu_seqlens, float scale, "
        "bool output_final_state) -> (Tensor o, Tensor final_state)");
    m.def(
        "gla_bwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? "
        "cu_seqlens, float scale, "
        "Tensor grad_o, Tensor? grad_final_state) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, "
        "Tensor dh0)");
    // One token per sequence: q, k [B,H,K]; v [B,HV,V]; g [B,HV,K]; state [B,HV,K,V], updated in place.
    m.def(
        "gla_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, float scale) -> "
        "Tensor");
}
