// What the scheduler (block_select.cpp) asks of one instruction set's scores (block_select_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/block_select.h"
#include "policy/block_rows.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Rows [first, last) of one sequence and one head of the map.
struct BlockTask {
    int64_t sequence, head, first, last;
};

struct BlockSelectKernels {
    // Tokens [first, first + count) of a batch row to row `row` of y, for all heads.
    void (*pool)(PoolParams const& p, int64_t batch, int64_t first, int64_t count, int64_t row);
    // Of such a window's gradient what one token gets, to row `row` of `shares` [B, blocks, H, columns of y] in fp32 or
    // fp64; and a token's gradient from the windows that hold it, rows [first, last) of y.
    void (*share)(PoolParams const& p, void* shares, int64_t batch, int64_t first, int64_t count,
                  int64_t row);
    void (*collect)(PoolParams const& p, void const* shares, int64_t batch, int64_t time,
                    int64_t first, int64_t last);
    int64_t (*scratch_bytes)(ScoreParams const& p);
    // Scores [rows][blocks] of a task, in acc_dtype.
    void (*scores)(ScoreParams const& p, BlockTask const& task, void* scores, void* scratch);
};

LSM_CPU_TABLES(BlockSelectKernels, block_select_kernels)

}  // namespace lsm::cpu
