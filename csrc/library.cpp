// Every operator of lsm_cuda, grouped by engine: the table of contents of the C++ side.
// The same schemas serve torch.ops.lsm (CPU and CUDA kernels) and, in test builds, torch.ops.lsm_emu (the CUDA
// kernels on CPU tensors, through the SIMT emulator). Fake kernels and autograd formulas are registered in Python.
#include <torch/csrc/stable/library.h>

#include <string>

#include "params/operators.h"

#ifndef LSM_NAMESPACE
#define LSM_NAMESPACE lsm
#endif

namespace {

// The chunk engine (params/operators.h): S_t = decay(S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t. q, k [B,T,H,K];
// v [B,T,HV,V]; states [N,HV,K,V]. Gates, natural log unless the operator's policy says otherwise: none, one per head
// [B,T,HV] (strides 0 where it is constant), per channel of the key [B,T,HV,K], of the value [B,T,HV,V], or both. An
// absent result is an empty tensor. *_step takes one token per sequence, without the T dimension; state [B,HV,K,V], or
// a tensor of [B,HV,V,K] with the last two transposed, is updated in place; where tokens read before they write, u
// [HV,K] or [B,HV,K] says how much of their own write they read too.
template <class Library>
void define(Library& m, lsm::ChunkOperator const& op) {
    bool const gated = op.decay != lsm::Decay::none, two = op.decay == lsm::Decay::both;
    std::string const gates = two ? "Tensor g, Tensor gv, " : gated ? "Tensor g, " : "";
    std::string const tokens = "Tensor q, Tensor k, Tensor v, " + gates;
    std::string const rest = "Tensor? initial_state, Tensor? cu_seqlens, float scale, ";
    std::string const d_gates = two ? "Tensor dg, Tensor dgv, " : gated ? "Tensor dg, " : "";
    auto const add = [&](char const* kind, std::string const& signature) {
        m.def((op.name + std::string(kind) + signature).c_str());
    };
    add("_fwd", "(" + tokens + rest + "bool output_final_state) -> (Tensor o, Tensor final_state)");
    add("_bwd", "(" + tokens + rest + "Tensor grad_o, Tensor? grad_final_state" +
                    (gated ? ", bool need_dg=True" : "") +
                    ") -> (Tensor dq, Tensor dk, Tensor dv, " + d_gates + "Tensor dh0)");
    add("_step", "(" + tokens + "Tensor(a!) state, float scale" +
                     (op.exclusive ? ", Tensor? u=None" : "") + ") -> Tensor");
}

}  // namespace

// Delta engine: what comes after v (`given`), its gradients, the micro-steps (`n`).
#define LSM_DELTA_FWD(given, n)                           \
    "(Tensor q, Tensor k, Tensor v, " given               \
    ", Tensor? initial_state, Tensor? cu_seqlens, float " \
    "scale, bool output_final_state" n ") -> (Tensor o, Tensor final_state)"
#define LSM_DELTA_BWD(given, n, grads)                    \
    "(Tensor q, Tensor k, Tensor v, " given               \
    ", Tensor? initial_state, Tensor? cu_seqlens, float " \
    "scale, Tensor grad_o, Tensor? grad_final_state" n    \
    ") -> (Tensor dq, Tensor dk, Tensor dv, " grads ", Tensor dh0)"
#define LSM_DELTA_STEP(given, n) \
    "(Tensor q, Tensor k, Tensor v, " given ", Tensor(a!) state, float scale" n ") -> Tensor"

#define LSM_DELTA_INPUTS                                                                   \
    "Tensor? q, Tensor? k, Tensor? g, Tensor? beta, Tensor? A_log, Tensor? dt_bias, bool " \
    "by_channel, float? lower_bound, float strength, float eps"

// Sparse attention: what comes after queries, keys and values. `scores`: scale, softcap, the ramp's length, pv_threshold; `mask` and
// `blocks`: numbers of params/sparse_attn.h, in the order of lsm_cuda/ops/_sparse_attn.py.
#define LSM_SPARSE_ATTN                                                                     \
    "Tensor? block_index, Tensor? block_ptr, Tensor? block_bias, Tensor? head_left, "       \
    "Tensor? sink_logits, Tensor? alibi_slopes, Tensor? ramp, float[] scores, int[] mask, " \
    "int[] blocks"

// Block selection: what is scored, and how.
#define LSM_BLOCK_SCORES                                                            \
    "Tensor q, Tensor k, Tensor? lse, Tensor? taps, Tensor? cu_seqlens_q, Tensor? " \
    "cu_seqlens_k, Tensor? cu_rows, Tensor? lengths, float scale, int[] rule"

STABLE_TORCH_LIBRARY(LSM_NAMESPACE, m) {
    for (auto const& op : lsm::kChunkOperators) define(m, op);

    // simple_gla with mLSTM's gates i, f [B,T,HV] before their activation: values are weighted by the input gate,
    // outputs divided; states C [N,HV,K,V], n [N,HV,K], m [N,HV]. tokens [4,B,HV,T] holds what the backward needs of
    // the gates: log decay, weight, scale q·n, exp(-m). The backward gives gradients of the first and, by its logarithm,
    // of the second, [B,T,HV]; an empty tensor stands where a state is absent. CUDA tensors are in bf16; other dtypes are
    // composed there.
    m.def(
        "mlstm_fwd(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? C, Tensor? n, Tensor? "
        "m, Tensor? cu_seqlens, float scale, float eps, bool exponential, bool normalize, bool "
        "output_final_state) -> (Tensor h, Tensor C_last, Tensor n_last, Tensor m_last, Tensor "
        "tokens)");
    m.def(
        "mlstm_bwd(Tensor q, Tensor k, Tensor v, Tensor? C, Tensor? n, Tensor? cu_seqlens, float "
        "scale, float eps, bool normalize, Tensor h, Tensor tokens, Tensor grad_h, Tensor? grad_C, "
        "Tensor? grad_n) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor "
        "dlog_weight, Tensor dC, Tensor dn)");
    m.def(
        "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!) n, "
        "Tensor(c!) m, float scale, float eps, bool exponential, bool normalize) -> Tensor");

    // simple_gla of values that w [B,T,HV] weighs: S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T; w and g in the dtype of states.
    // For CPU tensors.
    m.def(
        "weighted_gla_fwd(Tensor q, Tensor k, Tensor v, Tensor w, Tensor g, Tensor? initial_state, "
        "Tensor? cu_seqlens, float scale, bool output_final_state) -> (Tensor o, Tensor "
        "final_state)");
    m.def(
        "weighted_gla_bwd(Tensor q, Tensor k, Tensor v, Tensor w, Tensor g, Tensor? initial_state, "
        "Tensor? cu_seqlens, float scale, Tensor grad_o, Tensor? grad_final_state, bool "
        "need_dg=True) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dw, Tensor dg, Tensor dh0)");

    // The same for CUDA tensors in bf16, with all that Mamba-2 has around it: (o + D v) silu(z), D [HV] or [HV,V], z
    // [B,T,HV,V]. ungated, o + D v, is left for the backward where there is z and keep_ungated. Absent results are empty.
    m.def(
        "ssd_fwd(Tensor q, Tensor k, Tensor v, Tensor w, Tensor g, Tensor? D, Tensor? z, Tensor? "
        "initial_state, Tensor? cu_seqlens, float scale, bool output_final_state, bool "
        "keep_ungated) -> (Tensor o, Tensor final_state, Tensor ungated)");
    m.def(
        "ssd_bwd(Tensor q, Tensor k, Tensor v, Tensor w, Tensor g, Tensor? D, Tensor? z, Tensor? "
        "ungated, Tensor? initial_state, Tensor? cu_seqlens, float scale, Tensor grad_o, Tensor? "
        "grad_final_state) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dw, Tensor dg, Tensor dD, "
        "Tensor dz, Tensor dh0)");

    // A step of simple_gla as Mamba-2 has it: x [B,H,P]; dt [B,H], softplus(dt + dt_bias) if dt_softplus, weighs what is
    // written; exp(dt A) decays; B, C [B,G,N]; y + D x, gated by silu(z). state [B,H,P,N], or a tensor of [B,H,N,P] with
    // the last two transposed.
    m.def(
        "ssd_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, "
        "Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor");

    // linear_attn of products of two channels of q and of two of k, so that weights are 1 + s + s^2 / 2 of s = scale q·k
    // if taylor, else s^2; divided by their sums plus eps. States S [N,HV,F,V] and z [N,HV,F], F from policy/features.h,
    // which are always computed. tokens as above.
    m.def(
        "polynomial_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, Tensor? "
        "cu_seqlens, float scale, float eps, bool taylor, bool normalize, bool output_final_state) "
        "-> (Tensor o, Tensor S_last, Tensor z_last, Tensor tokens)");
    m.def(
        "polynomial_attn_bwd(Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, Tensor? "
        "cu_seqlens, float scale, float eps, bool taylor, bool normalize, Tensor o, Tensor tokens, "
        "Tensor grad_o, Tensor? grad_S, Tensor? grad_z) -> (Tensor dq, Tensor dk, Tensor dv, "
        "Tensor dS, Tensor dz)");
    m.def(
        "polynomial_attn_step(Tensor q, Tensor k, Tensor v, Tensor(a!) S, Tensor(b!) z, float "
        "scale, float eps, bool taylor, bool normalize) -> Tensor");

    // Delta engine (params/delta.h has the recurrences): q [B,T,H,K]; k [B,Tn,H,K], v [B,Tn,HV,V], beta [B,Tn,HV] or
    // [B,Tn,HV,V] with n = num_householder micro-steps per token; states [N,HV,K,V]; gates natural log. Steps as above;
    // with n > 1 their k, v, beta have a dimension of n after B.

    // S <- (I - beta k k^T) S + beta k v^T (DeltaNet, DeltaProduct, FWP; exact Longhorn with a beta per value channel).
    m.def("delta_rule_fwd" LSM_DELTA_FWD("Tensor beta", ", int num_householder=1"));
    m.def("delta_rule_bwd" LSM_DELTA_BWD("Tensor beta", ", int num_householder=1", "Tensor dbeta"));
    m.def("delta_rule_step" LSM_DELTA_STEP("Tensor beta", ", int num_householder=1"));

    // The same of the state decayed by e^g, g [B,T,HV] (gated DeltaNet, gated DeltaProduct).
    m.def("gated_delta_rule_fwd" LSM_DELTA_FWD("Tensor g, Tensor beta", ", int num_householder=1"));
    m.def("gated_delta_rule_bwd" LSM_DELTA_BWD("Tensor g, Tensor beta",
                                               ", bool need_dg=True, int num_householder=1",
                                               "Tensor dg, Tensor dbeta"));
    m.def(
        "gated_delta_rule_step" LSM_DELTA_STEP("Tensor g, Tensor beta", ", int num_householder=1"));

    // The same with one decay per key channel, g [B,T,HV,K] (Kimi Delta Attention).
    m.def("kda_fwd" LSM_DELTA_FWD("Tensor g, Tensor beta", ", int num_householder=1"));
    m.def("kda_bwd" LSM_DELTA_BWD("Tensor g, Tensor beta",
                                  ", bool need_dg=True, int num_householder=1",
                                  "Tensor dg, Tensor dbeta"));
    m.def("kda_step" LSM_DELTA_STEP("Tensor g, Tensor beta", ", int num_householder=1"));

    // S <- e^g S + beta k (v - S^T p)^T: an erase key p [B,T,H,K] of its own, reading before the decay (Comba).
    m.def("comba_fwd" LSM_DELTA_FWD("Tensor p, Tensor g, Tensor beta", ""));
    m.def("comba_bwd" LSM_DELTA_BWD("Tensor p, Tensor g, Tensor beta", ", bool need_dg=True",
                                    "Tensor dp, Tensor dg, Tensor dbeta"));
    m.def("comba_step" LSM_DELTA_STEP("Tensor p, Tensor g, Tensor beta", ""));

    // S <- (Diag(e^g) + b a^T) S + k v^T, a and b [B,T,H,K], g [B,T,HV,K] or none (RWKV-7, IPLR without g).
    m.def("dplr_fwd" LSM_DELTA_FWD("Tensor a, Tensor b, Tensor? g", ""));
    m.def("dplr_bwd" LSM_DELTA_BWD("Tensor a, Tensor b, Tensor? g", ", bool need_dg=True",
                                   "Tensor da, Tensor db, Tensor dg"));
    m.def("dplr_step" LSM_DELTA_STEP("Tensor a, Tensor b, Tensor? g", ""));
    // Scan engine: h_t = a_t * h_{t-1} + x_t, element by element. x, h [B,T,D]; states [N,D]. Positions are walked in
    // order or in reverse, each at token order[position].

    // a [B,T,D] or [D], or its logarithm; real or complex.
    m.def(
        "scan_fwd(Tensor x, Tensor a, Tensor? initial_state, Tensor? cu_seqlens, Tensor? order, "
        "bool log, bool reverse, bool output_final_state) -> (Tensor h, Tensor final_state)");
    m.def(
        "scan_bwd(Tensor x, Tensor a, Tensor? initial_state, Tensor? cu_seqlens, Tensor? order, "
        "bool log, bool reverse, Tensor h, Tensor grad_h, Tensor? grad_final_state, bool "
        "need_da=True) -> (Tensor dx, Tensor da, Tensor dh0)");
    m.def("scan_step(Tensor x, Tensor a, Tensor(a!) state, bool log) -> Tensor");

    // RG-LRU: a = exp(c sigmoid(r)), x scaled by sqrt(1 - a^2) sigmoid(i). i, r [B,T,D], c [D].
    m.def(
        "rg_lru_fwd(Tensor x, Tensor i, Tensor r, Tensor c, Tensor? initial_state, Tensor? "
        "cu_seqlens, Tensor? order, bool reverse, bool output_final_state) -> (Tensor h, Tensor "
        "final_state)");
    m.def(
        "rg_lru_bwd(Tensor x, Tensor i, Tensor r, Tensor c, Tensor? initial_state, Tensor? "
        "cu_seqlens, Tensor? order, bool reverse, Tensor h, Tensor grad_h, Tensor? "
        "grad_final_state) -> (Tensor dx, Tensor di, Tensor dr, Tensor dc, Tensor dh0)");
    m.def("rg_lru_step(Tensor x, Tensor i, Tensor r, Tensor c, Tensor(a!) state) -> Tensor");

    // RWKV-4 (params/wkv4.h): averages whose weights fade by a constant rate. k, v [B,T,D]; r, u [D]; a state is a
    // numerator, a denominator and the logarithm of their scale, [N,D] each. `states` is for the backward alone, whose
    // channels are the gradients of r and u. There is none of a scale.
    m.def(
        "wkv4_fwd(Tensor r, Tensor u, Tensor k, Tensor v, Tensor? numerator, Tensor? denominator, "
        "Tensor? scale, Tensor? cu_seqlens, bool save_states, bool output_final_state) -> (Tensor "
        "o, Tensor final_numerator, Tensor final_denominator, Tensor final_scale, Tensor states)");
    m.def(
        "wkv4_bwd(Tensor r, Tensor u, Tensor k, Tensor v, Tensor? numerator, Tensor? denominator, "
        "Tensor? scale, Tensor? cu_seqlens, Tensor states, Tensor? final_scale, Tensor grad_o, "
        "Tensor? grad_numerator, Tensor? grad_denominator) -> (Tensor dchannels, Tensor dk, Tensor "
        "dv, Tensor dnumerator, Tensor ddenominator)");
    m.def(
        "wkv4_step(Tensor r, Tensor u, Tensor k, Tensor v, Tensor(a!) numerator, Tensor(b!) "
        "denominator, Tensor(c!) scale) -> Tensor");
    m.def("bi_wkv_fwd(Tensor r, Tensor u, Tensor k, Tensor v) -> Tensor");  // both directions
    m.def(
        "bi_wkv_bwd(Tensor r, Tensor u, Tensor k, Tensor v, Tensor grad_o) -> (Tensor dchannels, "
        "Tensor dk, Tensor dv)");

    // What comes before the delta rules (params/delta_inputs.h), any of it: rows of unit length of q and k, [B,T,H,K] or
    // [B,H,K]; log decays of logits g [..,HV], or [..,HV,K] by_channel; strengths of logits beta [..]. A_log [HV] and
    // dt_bias [HV] or [HV K] in fp32 (fp64 for fp64), like the decays and strengths. Absent results are empty tensors.
    m.def("delta_inputs_fwd(" LSM_DELTA_INPUTS ") -> (Tensor q, Tensor k, Tensor g, Tensor beta)");
    m.def("delta_inputs_bwd(" LSM_DELTA_INPUTS
          ", Tensor? grad_q, Tensor? grad_k, Tensor? grad_g, Tensor? grad_beta) -> (Tensor dq, "
          "Tensor dk, Tensor dg, Tensor dbeta, Tensor dA_log, Tensor ddt_bias)");

    // Short convolution over time, one filter per channel: x, y [B,T,D]; weight [D,W], its last tap for the current
    // token; states [N,D,S], the last inputs of each sequence. seq_idx [B,T] int32 marks sequences by a change. *_step
    // takes T tokens per row; with cache_seqlens the state is a ring.
    m.def(
        "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? "
        "cu_seqlens, Tensor? seq_idx, bool silu, int state_size, int norm=0, float norm_eps=1e-6, "
        "int? "
        "norm_channels=None) -> (Tensor y, Tensor final_state)");
    m.def(
        "causal_conv1d_bwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? "
        "cu_seqlens, Tensor? seq_idx, bool silu, Tensor grad_y, Tensor? grad_final_state, bool "
        "need_dweight=True, int norm=0, float norm_eps=1e-6, int? norm_channels=None) -> (Tensor "
        "dx, "
        "Tensor dweight, Tensor dbias, Tensor dinitial_state)");
    m.def(
        "causal_conv1d_step(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? "
        "cache_seqlens, Tensor? conv_state_indices, bool silu) -> Tensor");

    // sLSTM cell (params/slstm.h): x [B,T,4,H,D] pre-activations of i, f, z, o; R [H,D,4,D], fp32 (fp64 for fp64) as
    // everything else; cells [B,T,4,H,D] and states [N,4,H,D] hold h, c, n, m. The backward takes raw = x + h R and
    // R transposed, [H,4,D,D], and leaves the gradients of x and R, which are matrix products, to its caller.
    m.def(
        "slstm_fwd(Tensor x, Tensor R, Tensor? initial_state, Tensor? cu_seqlens, bool save_cells, "
        "bool output_final_state) -> (Tensor y, Tensor cells, Tensor final_state)");
    m.def(
        "slstm_bwd(Tensor raw, Tensor R_transposed, Tensor cells, Tensor? initial_state, Tensor? "
        "cu_seqlens, Tensor grad_y, Tensor? grad_final_state) -> (Tensor draw, Tensor "
        "dinitial_state)");
    m.def("slstm_step(Tensor x, Tensor R, Tensor(a!) state) -> Tensor");
    // Selective scan (Mamba-1): h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = (C_t h_t + skip u_t) silu(z_t). u, dt, z
    // [B,T,D]; A [D,S]; B, C [B,T,G,S] or [D,S]; skip, dt_bias [D]; states [N,D,S]. A, B, C and states may be complex.
    // `states` is what a forward that saves leaves to the backward: on the CPU nothing.
    m.def(
        "selective_scan_fwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? skip, "
        "Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? order, "
        "bool softplus, bool save_states, bool output_final_state) -> (Tensor y, Tensor "
        "final_state, Tensor states)");
    m.def(
        "selective_scan_bwd(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? skip, "
        "Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? order, "
        "bool softplus, Tensor states, Tensor grad_y, Tensor? grad_final_state) -> (Tensor du, "
        "Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dskip, Tensor dz, Tensor ddt_bias, "
        "Tensor dh0)");
    m.def(
        "selective_scan_step(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? skip, "
        "Tensor? z, Tensor? dt_bias, Tensor(a!) state, bool softplus) -> Tensor");

    // Softmax attention over lists of key blocks (params/sparse_attn.h has the rules): q [B,Tq,Hq,K], k [B,Tk,Hkv,K],
    // v [B,Tk,Hkv,V], o [B,Tq,Hq,V], lse [B,Hq,Tq]. Lists are block_index [B,heads,rows,capacity], or [entries] with
    // block_ptr [B heads rows + 1], or none: every block. Decode reads a cache: k, v [B,Tk,Hkv,..] filled up to
    // cache_seqlens [B], or pages [pages,page_size,Hkv,..] under block_table [B,max_pages].
    m.def(
        "block_sparse_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? "
        "cu_seqlens_k, " LSM_SPARSE_ATTN ") -> (Tensor o, Tensor lse)");
    m.def(
        "block_sparse_attn_bwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? "
        "cu_seqlens_k, " LSM_SPARSE_ATTN
        ", Tensor o, Tensor lse, Tensor grad_o, Tensor? grad_lse) -> (Tensor dq, Tensor dk, Tensor "
        "dv, Tensor dblock_bias, Tensor dsink_logits, Tensor dramp)");
    // Of codes, uint8 [..,K] or of 4 bits [..,K/2], with step and least of each of their rows [..,2].
    m.def(
        "sparse_attn_decode_codes(Tensor q, Tensor k, Tensor v, Tensor k_affine, Tensor v_affine, "
        "Tensor? cache_seqlens, Tensor? block_table, " LSM_SPARSE_ATTN
        ") -> (Tensor o, Tensor lse)");
    m.def(
        "sparse_attn_decode(Tensor q, Tensor k, Tensor v, Tensor? cache_seqlens, Tensor? "
        "block_table, " LSM_SPARSE_ATTN ") -> (Tensor o, Tensor lse)");

    // Parts of one softmax over separate sets of keys: o [parts,B,T,H,V], lse [parts,B,H,T].
    m.def("merge_attn_states(Tensor o, Tensor lse) -> (Tensor, Tensor)");
    m.def(
        "merge_attn_states_bwd(Tensor o_parts, Tensor lse_parts, Tensor o, Tensor lse, Tensor "
        "grad_o, Tensor? grad_lse) -> (Tensor do_parts, Tensor dlse_parts)");

    // k [B,T,H,K] and v [B,T,H,V] to places cache_seqlens [B] and on of a cache [B,capacity,H,..], or of pages
    // [pages,page_size,H,..] under block_table [B,max_pages]; with ring_sinks >= 0 a ring behind so many first places.
    m.def(
        "kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor "
        "cache_seqlens, Tensor? block_table, int ring_sinks=-1) -> ()");

    // Which blocks of keys a row of queries should read (params/block_select.h): windows of x [B,T,H,K] pooled, y
    // [B,blocks,H,K]; scores [B,heads,rows,blocks] of keys k [B,Tk,Hk,K] for queries q [B,Tq,Hq,K]; the best blocks,
    // index [B,heads,rows,capacity]. `rule`, `choice` and `cuts` are the numbers of params/block_select.h, in the order
    // of ops/block_select.cpp. Packed sequences say where each one's rows begin (cu_blocks, cu_rows, [N + 1]).
    m.def(
        "block_pool(Tensor x, Tensor? cu_seqlens, Tensor? cu_blocks, Tensor? lengths, int length, "
        "int stride, int pool, bool partial) -> Tensor");
    m.def(
        "block_pool_bwd(Tensor x, Tensor? cu_seqlens, Tensor? cu_blocks, Tensor? lengths, int "
        "length, int stride, int pool, bool partial, Tensor y, Tensor grad_y) -> Tensor");
    m.def("block_scores(" LSM_BLOCK_SCORES ") -> Tensor");
    m.def("block_select(" LSM_BLOCK_SCORES ", int[] choice, float[] cuts) -> Tensor");
    m.def(
        "block_topk(Tensor scores, Tensor? cu_seqlens_q, Tensor? cu_rows, Tensor? lengths, int Tq, "
        "int[] rule, int[] choice, float[] cuts) -> Tensor");
}
