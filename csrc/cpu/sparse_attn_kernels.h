// What the scheduler (sparse_attn.cpp) asks of one instruction set's sparse attention (sparse_attn_tier.h). Plain
// C++, no vectors.
#pragma once

#include "policy/attn_keys.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Query heads [head, head + heads) of one key/value head at tokens [begin, end) of a sequence, counted from its start.
struct SparseAttnTask {
    int64_t batch, kv_head, head, heads;
    int64_t first_q, queries, first_k, keys;  // of the sequence in its batch row
    int64_t first_row;                        // of the sequence in the lists
    int64_t begin, end;
};

// What a task of the backward adds to: `dk`, `dv`, [keys][columns] in whole vectors; `block_bias`, like the lists' bias;
// `sink_logits` and `ramp`, one number per query head of the task. Null: not wanted.
struct SparseAttnSums {
    void *dk, *dv, *block_bias, *sink_logits, *ramp;
};

struct SparseAttnKernels {
    int64_t (*scratch_bytes)(SparseAttnParams const& p, bool backward);
    int64_t (*columns)(SparseAttnParams const& p, int64_t channels);  // in whole vectors
    void (*forward)(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch);
    void (*backward)(SparseAttnParams const& p, SparseAttnTask const& task,
                     SparseAttnSums const& sums, void* scratch);
    // Keys [begin, end) of the task's sequence: the sum over parts of dk and dv, which follow each other in memory,
    // goes to the results.
    void (*write_key_gradients)(SparseAttnParams const& p, SparseAttnTask const& task,
                                SparseAttnSums const& sums, int64_t parts, int64_t begin,
                                int64_t end);
};

// Queries of one pass over key blocks: tokens by heads that share lists.
inline constexpr int64_t kQueryLanes = 128;

// Query heads of a pass, all of one key/value head and one list.
inline int64_t heads_of_tile(SparseAttnParams const& p) {
    if (p.lists.index != nullptr && p.lists.heads == p.Hq) return 1;
    int64_t const group = p.Hq / p.Hkv;
    return group < kQueryLanes ? group : kQueryLanes;
}

// Whether every token has a list of its own and scores are plain (sparse_attn_tokens.h); then passes have more queries.
inline constexpr int64_t kTokenLanes = 256, kTokensOfTile = 64;
inline bool lists_by_token(SparseAttnParams const& p) {
    return p.lists.index != nullptr && p.lists.block_q == 1 && p.lists.bias == nullptr &&
           p.softcap == 0 && p.alibi_slopes == nullptr && p.ramp == nullptr &&
           p.mask.dilation == 1 && p.mask.head_left == nullptr;
}

// Tokens of a pass: a power of two, so that no row of the lists is cut but into whole passes.
inline int64_t tokens_of_tile(SparseAttnParams const& p) {
    int64_t tokens = 1;
    if (lists_by_token(p)) {
        while (2 * tokens * heads_of_tile(p) <= kTokenLanes && tokens < kTokensOfTile) tokens *= 2;
        return tokens;
    }
    int64_t const heads = heads_of_tile(p);
    // Half of the lanes are enough for not walking the blocks of another row.
    auto const whole_row = [&] {
        return p.lists.index != nullptr && tokens >= p.lists.block_q &&
               2 * tokens * heads >= kQueryLanes;
    };
    while (2 * tokens * heads <= kQueryLanes && !whole_row()) tokens *= 2;
    return tokens;
}

LSM_CPU_TABLES(SparseAttnKernels, sparse_attn_kernels)

}  // namespace lsm::cpu
