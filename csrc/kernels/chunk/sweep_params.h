// What one sweep reads and writes; plain numbers, shared by host and device code.
#pragma once

#include <cstdint>

#include "params/chunk.h"

namespace lsm {

// output: o, dq, dk or dv. state: the same walk without reading, for segment boundaries. query_gradient, key_gradient:
// the forward and the reverse output on the gated side, and what the gate's gradient needs of each.
enum class SweepKind { output, state, query_gradient, key_gradient };

// What a decay multiplies: channels of the contraction, rows of the state, or all of it.
enum class DecayOn { contraction, rows, whole };

// What tokens have of their own: nothing; weights, and outputs that are finished; weights, and sums that outputs are
// divided by.
enum class Tokens { plain, weighted, normalised };

// An activation and how value heads find their head in it: head = value_head / heads_per_group.
struct Operand {
    Rows rows;
    int heads_per_group;
    int next = 0;  // 1: beside token t stands the row of the token after it
};

// The state of a value head as the sweep sees it: element (contraction c, row r) at c * contraction + r * row.
struct StateView {
    float* data;  // nullable
    int contraction, row;
};

struct SweepParams {
    Operand query, key;  // [.., contraction], not read by a state-only sweep: query
    Operand value;       // [.., rows]
    Operand gate;        // [.., contraction], [.., rows] or [..], natural log; null: no decay
    Operand out;         // [.., rows]; null: not wanted
    float read_scale, write_scale;  // of what is read from the state, of what is written to it

    // For the gate's gradient, the output without its own token's term. Decay on the rows: [.., rows], dq's in the dtype
    // of the gate, dk's as two bf16 per element, from the state and from the block's other tokens. Decay of the whole
    // state: [.., parts] fp32 (a part is what one warp has), dots with `probe` (q or k) of what comes from the state; dq's
    // as two, the second being what pairs inside the block give to the gradient of the gate between them; dk's with weights
    // as two, the second being the gradient of the weight, or beside sums of its logarithm.
    Operand strict;
    Operand probe;           // [.., rows]; of weighted outputs z, nullable
    int contraction, rows;   // actual sizes, multiples of 8
    int heads;               // value heads
    int64_t tokens_per_row;  // T
    bool reverse, gate_is_fp32;

    // Sweeps with weights (sweep_weighted.cu): fp32 numbers of tokens, [..], times what a token writes, or walking in reverse
    // what it reads. Beside an output stands skip value, skip being [heads] or [heads, rows]; all of that is multiplied by
    // silu(z), and left as it was before in `ungated`.
    Operand weight;
    Operand skip;     // nullable
    Operand ungated;  // [.., rows], nullable
    bool skip_is_fp32, skip_by_row;

    // Sweeps with sums (sweep_normalised.cu): beside the state, n is the same sum with ones in the place of v. Outputs are
    // multiplied by 1 / (max(|size|, least) + eps), size = read_scale query . n: o makes that of `reader`, which is least
    // then, and leaves the sizes; of the others it is `reader`, fp32 [..]: times what dq reads, and what dk and dv write.
    // `below` [..] is the gradient of size over that of outputs, and stands beside dO where ones stand beside v.
    Operand reader, below;
    Operand size;  // null: nothing is divided
    float eps;
    // n with `start` and `end`, with chunk_states and end_states: [.., heads, contraction], where v is [.., heads, rows].
    float const* sums_start;
    float *sums_end, *chunk_sums, *end_sums;

    // A sweep starts from start[record] where segments were joined, else from start[sequence], else from zeros, and
    // leaves its state in end[sequence] (state-only: in end[record], with the summed log2 gates in gate_sum[record]).
    StateView start, end;
    bool start_per_record;
    float* gate_sum;  // [records, heads, contraction] or [records, heads], state-only sweeps

    // Anchors of the gate's gradient (docs/math.md, section 4). dq's sweep leaves its state at the end of every chunk of
    // kChunk tokens, as bf16 in fragment order; dk's sweep, passing the same places backwards, contracts its own with it.
    uint32_t* chunk_states;
    float* chunk_flux;  // [chunks, heads, rows], or [.., parts] where the whole state decays
    uint8_t*
        tokenwise;  // [chunks, kChunk / 16, heads, row tiles]: dk's blocks walked token by token
    // Where the final state has a gradient, the same at the end of every sequence, for what was written before the last
    // block (before the last token, where dq's sweep walks that block token by token): a product that is exact however
    // strong the decay.
    uint32_t* end_states;    // nullable: no gradient
    float* end_flux;         // [N, heads, rows or parts]
    uint8_t* end_tokenwise;  // [N, heads, row tiles]
};

inline constexpr int kChunk = 256;  // tokens between exact anchors of the gate's gradient

}  // namespace lsm
