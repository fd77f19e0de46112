// The seam of block selection: which blocks of keys a row of queries should attend to. Plain structs, no torch, no CUDA.
#pragma once

#include "params/chunk.h"

namespace lsm {

enum class Pool : int32_t {
    mean,
    max,
    min,
    bounds
};  // bounds: the maximum's K columns, then the minimum's

// y_i of a sequence pools its tokens [i stride, i stride + length).
struct PoolParams {
    Dtype dtype;
    Pool pool;
    int64_t B, T, H, K;
    int64_t N;                         // sequences: B, or the length of cu_seqlens minus one
    void const* cu_seqlens = nullptr;  // [N + 1], nullable; then B == 1
    bool cu_seqlens_is_64bit = false;
    int32_t const* lengths = nullptr;  // [B], nullable: tokens that count, of a dense batch
    int64_t length, stride;
    bool partial;    // windows that end behind the sequence are cut; else they do not exist
    int64_t blocks;  // rows of y, zero where there is no window
    int32_t const* cu_blocks = nullptr;  // [N + 1], with cu_seqlens: first row of each sequence
    Rows x;                              // [B, T, H, K]
    Rows y;                              // [B, blocks, H, K or 2 K]

    // Backward; x and y are inputs. A mean's gradient is shared among the window's tokens, an extremum's among those that
    // reach it.
    Rows grad_y;  // like y
    Rows dx;      // like x
};

// A map of scores [B, heads, rows, blocks]. Row r of a sequence stands for its queries [r block_q, (r + 1) block_q), and
// for one query head, or (group) all that read one key head; its members are the pairs of a query and a head. Keys are
// tokens or pooled ones. Query t stands at t q_stride + q_length - 1 + offset, plus lengths[b] - Tq q_stride if there are
// lengths, which also say how many tokens there are; key i at i key_stride + key_length - 1, and a query sees the keys up
// to its own position if causal, else all.
//
//   weight of key i     sum over members of scale q . k_i, -inf where one does not see it; or (softmax) the sum of the
//                       probabilities softmax_i(scale q . k_i) over the keys a member sees
//   score of block j    sum, or (tap_max) maximum, over taps n of taps[n] weight[j tap_step + tap_first + n]; keys that
//                       are not there do not count; without any: 0 (softmax), -inf
struct ScoreParams {
    Dtype dtype, acc_dtype;  // of q and k; of lse and scores
    int64_t B, Tq, Tk, Hq, Hk, K;
    int64_t N;
    void const *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // [N + 1] both or neither
    bool cu_seqlens_is_64bit = false;
    int32_t const* cu_rows = nullptr;  // [N + 1], with cu_seqlens: first row of each sequence
    int32_t const* lengths = nullptr;  // [B], nullable
    double scale;
    Rows q, k;                  // [B, Tq, Hq, K], [B, Tk, Hk, K]
    void const* lse = nullptr;  // [B, Hq, Tq] of the softmax; null: computed here

    bool softmax, group, causal;
    int64_t offset, q_stride, q_length, key_stride, key_length;
    int64_t block_q, block_k;  // queries of a row, tokens of a block
    int64_t tap_step, tap_first, tap_count;
    bool tap_max;
    void const* taps = nullptr;  // [tap_count] acc_dtype, nullable (ones)

    int64_t heads, rows, blocks;
    void* scores = nullptr;  // [B, heads, rows, blocks]: an output, or (choose_blocks) the input
    int32_t* index =
        nullptr;  // [B, heads, rows, capacity], ascending, then -1; one of the two is an output
};

// Of the blocks that a row may have (those up to its last query's own if causal), the `first` ones and the `local` ones
// up to its own are chosen; then the best of the others, ties to the lowest index, while
//   there are fewer than top_k in all (0: any number),
//   the chosen ones' share of all scores, each at least 0, is below top_p (0: always),
//   and the score is at least `threshold` and above -inf.
struct BlockChoice {
    int64_t top_k = 0, first = 0, local = 0, capacity = 0;
    double top_p = 0, threshold;
};

// What a backend (cpu/, kernels/) provides to ops/block_select.cpp. Workspaces are uninitialised bytes, 256-byte aligned.
void block_pool(PoolParams const& p, void* stream);
int64_t block_pool_bwd_workspace(PoolParams const& p);
void block_pool_bwd(PoolParams const& p, void* workspace, void* stream);
int64_t block_scores_workspace(ScoreParams const& p);
// Keys and blocks that select_blocks takes in one row.
int64_t most_scores();
void block_scores(ScoreParams const& p, void* workspace, void* stream);
void select_blocks(ScoreParams const& p, BlockChoice const& choice, void* workspace, void* stream);
void choose_blocks(ScoreParams const& p, BlockChoice const& choice, void* stream);

}  // namespace lsm
