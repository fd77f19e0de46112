// The seam between PyTorch-facing code and kernels of the sparse attention engine: plain structs, no torch, no CUDA.
#pragma once

#include "params/chunk.h"

namespace lsm {

// Which keys a query may see, from positions alone; a list of blocks (below) may take more away. Positions count from
// the start of a sequence: query t of Tq stands at t + offset, or at t + offset + Tk - Tq if it is aligned to the end;
// key j at j * key_stride + key_length - 1 (1 and 1 but for pooled keys, which stand where their window ends).
// A query at p sees a key at x if all of this holds:
//
//   causal      x <= p, in units of `causal_block` tokens: floor(x / causal_block) <= floor(p / causal_block);
//               or x < prefix (prefix-LM)
//   window      p - left <= x <= p + right, where a bound below 0 is none; or x < sinks
//   dilation    (p - x) % dilation == 0; or x < sinks
struct AttnMask {
    bool causal = false;
    bool align_end = true;
    int64_t offset = 0;
    int64_t key_stride = 1, key_length = 1;
    int64_t causal_block = 1;
    int64_t prefix = 0;
    int64_t left = -1, right = -1;
    int32_t const* head_left = nullptr;  // [Hq]: `left` of each query head
    int64_t sinks = 0;
    int64_t dilation = 1;
};

// Blocks of keys that a row of block_q queries attends to: ascending, each once, counted from the start of the
// sequence's keys. Rows of one sequence follow another: query t of sequence n belongs to row
// sum_{m < n} ceil(Tq_m / block_q) + t / block_q. Query head h reads list head h * heads / Hq. Rows beyond those of
// packed sequences, whose number a GPU's caller does not know, are ignored.
struct BlockLists {
    int32_t const* index = nullptr;  // null: every block (the mask alone decides)
    // [B * heads * rows + 1] into index (CSR); null: `capacity` entries a row, -1 after its last block.
    int64_t const* row_ptr = nullptr;
    int64_t capacity = 0;
    int64_t entries = 0;                 // numbers in index
    int64_t heads = 1;                   // 1, Hkv or Hq
    int64_t rows = 0;                    // of one batch row
    int64_t block_q = 64, block_k = 64;  // 1 or 16..128, and 16..128, powers of two
    void const* bias = nullptr;  // like index, acc_dtype: added to every score of that block
};

// o_t = sum_j p_tj v_j over the keys that query t sees, p = softmax of
//   s_tj = cap(scale q_t . k_j) + bias(block) - slope_h |p - x| + log clamp((R + z_h - |p - x|) / R, 0, 1)
// with cap(s) = softcap * tanh(s / softcap), and where there are sink logits one more key of score sink_h and no value.
// lse_t = log of the softmax's denominator; a query that sees nothing gives o = 0, lse = -inf, or sink_h.
// Hkv key/value heads serve Hq query heads (Hq % Hkv == 0): query head h reads h / (Hq / Hkv).
struct SparseAttnParams {
    Dtype dtype;  // of q, k, v, o and their gradients
    // f64 when dtype is f64 (CPU only), else f32: of lse, slopes, and of sink logits, ramp, block bias and their
    // gradients.
    Dtype acc_dtype;
    int64_t B, Tq, Tk, Hq, Hkv, K, V;
    int64_t N;                           // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens_q = nullptr;  // [N + 1] both or neither; then B == 1
    void const* cu_seqlens_k = nullptr;
    bool cu_seqlens_is_64bit = false;
    double scale;
    double softcap = 0;  // 0: none
    // Forward: values may be left out whose weights, for every query of a tile's rows, are at most exp(-pv_threshold) of
    // the largest so far. 0: none are. The softmax's sum is of all weights.
    double pv_threshold = 0;
    AttnMask mask;
    BlockLists lists;
    void const* sink_logits = nullptr;   // [Hq]
    void const* alibi_slopes = nullptr;  // [Hq]
    void const* ramp = nullptr;          // z [Hq], adaptive span
    double ramp_length = 0;              // R

    Rows q;     // [B, Tq, Hq, K]
    Rows k, v;  // [B, Tk, Hkv, K], [B, Tk, Hkv, V]; or pages, below

    // Decode from a cache: rows of k and v by cache length, contiguous (k.batch is a sequence) or in pages (k.batch is a
    // page of page_size tokens, of which the table names those of each sequence in order).
    int32_t const* cache_seqlens = nullptr;  // [B]; null: Tk
    int32_t const* block_table = nullptr;    // [B, max_pages], nullable
    int64_t max_pages = 0, pages = 0, page_size = 0;
    // Codes in place of numbers, in bytes: number c of a row is code c times its step plus its least. A byte of 4 bits has
    // codes c, below, and c + K / 2 (of values V / 2). K and V count numbers.
    int64_t code_bits = 0;    // 8 or 4; 0: numbers
    Rows k_affine, v_affine;  // like k and v, acc_dtype: [step, least] of each row

    // Forward and decode.
    Rows o;               // [B, Tq, Hq, V]; like lse an input of the backward
    void* lse = nullptr;  // [B, Hq, Tq], natural log

    // Backward.
    Rows grad_o;                     // [B, Tq, Hq, V]
    void const* grad_lse = nullptr;  // [B, Hq, Tq], nullable (zeros)
    Rows dq, dk, dv;  // like q, k, v, contiguous: a group's query heads are added up inside
    void* grad_sink_logits = nullptr;  // [Hq], nullable
    void* grad_block_bias = nullptr;   // like lists.bias, nullable
    void* grad_ramp = nullptr;  // [Hq], nullable; a clamped factor of exactly 1 still passes it on
};

// o = sum_i w_i o_i, w = softmax over i of lse_i: parts of one softmax over separate sets of keys, in the order given.
// A part whose lse is -inf has no keys, and its o is not read. Sink logits are one more part without a value.
struct MergeParams {
    Dtype dtype, part_dtype,
        acc_dtype;  // of o; of the parts, dtype or acc_dtype; of lse and logits
    int64_t parts, B, T, H, V;
    void const* o_parts;                // [parts, B, T, H, V] contiguous
    void const* lse_parts;              // [parts, B, H, T] contiguous
    void const* sink_logits = nullptr;  // [H], nullable
    Rows o;                             // [B, T, H, V]
    void* lse;                          // [B, H, T]

    // Backward, without sink logits; o and lse are inputs.
    Rows grad_o;                     // [B, T, H, V]
    void const* grad_lse = nullptr;  // [B, H, T], nullable (zeros)
    void* do_parts = nullptr;        // like o_parts
    void* dlse_parts = nullptr;      // like lse_parts
};

// What a backend (cpu/, kernels/) provides to ops/sparse_attn.cpp. Workspaces are uninitialised bytes, 256-byte
// aligned.
int64_t sparse_attn_fwd_workspace(SparseAttnParams const& p);
int64_t sparse_attn_bwd_workspace(SparseAttnParams const& p);
int64_t sparse_attn_decode_workspace(SparseAttnParams const& p);
void sparse_attn_fwd(SparseAttnParams const& p, void* workspace, void* stream);
void sparse_attn_bwd(SparseAttnParams const& p, void* workspace, void* stream);
void sparse_attn_decode(SparseAttnParams const& p, void* workspace, void* stream);
void merge_attn_states(MergeParams const& p, void* stream);
void merge_attn_states_bwd(MergeParams const& p, void* stream);

}  // namespace lsm
