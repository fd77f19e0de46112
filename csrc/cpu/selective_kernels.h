// What the scheduler (selective.cpp) asks of one instruction set's kernels (selective_tier.h). Plain
// C++, no vectors.
#pragma once

#include "params/selective_scan.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Sequences [n_begin, n_end), one after the other, channels [c_begin, c_end) of one group.
struct SelectiveTask {
    int64_t n_begin, n_end, group, c_begin, c_end;

    // Backward: shares of gradients that other tasks have shares of too, in the accumulation type.
    void* db = nullptr;             // [B, T, S], of tokens
    void* dc = nullptr;             // [B, T, S], of tokens
    void* channel_grads = nullptr;  // [3 S + 2, D]: dA, dB and dC of channels by state, dD, d bias
};

// Rows of SelectiveTask::channel_grads.
inline int64_t selective_channel_rows(SelectiveParams const& p) {
    return 3 * p.S + 2;
}

struct SelectiveKernels {
    int64_t (*scratch_bytes)(SelectiveParams const& p, int64_t tokens, bool backward);
    void (*forward)(SelectiveParams const& p, SelectiveTask const& task, void* scratch);
    void (*backward)(SelectiveParams const& p, SelectiveTask const& task, void* scratch);
};

LSM_CPU_TABLES(SelectiveKernels, selective_kernels)

}  // namespace lsm::cpu
