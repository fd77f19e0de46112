// What the scheduler (scan.cpp) asks of one instruction set's kernels (scan_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/scan.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Positions [begin, end) of one sequence, channels [c_begin, c_end). Rows of [D] hold one value per
// channel in the accumulation type and are indexed by the channel's number.
struct ScanTask {
    int64_t batch, begin, end, c_begin, c_end;
    bool first;               // the sequence starts here
    void const* state_begin;  // h before the positions; null: zeros
    void* state_end;          // h after them, nullable
    void* decay;              // product of their a, nullable

    void const* grad_end = nullptr;  // backward: gradient of h after the positions; null: zeros
    void* grad_begin = nullptr;      // gradient of h before them, nullable
    void* channel_grad = nullptr;    // share of the gradient of p.channel, nullable
};

struct ScanKernels {
    int64_t (*scratch_bytes)(ScanParams const& p, int64_t channels);
    void (*forward)(ScanParams const& p, ScanTask const& task, void* scratch);
    void (*end_state)(ScanParams const& p, ScanTask const& task, void* scratch);  // h and decay
    void (*backward)(ScanParams const& p, ScanTask const& task, void* scratch);
    void (*begin_grad)(ScanParams const& p, ScanTask const& task, void* scratch);  // dh and decay
};

LSM_CPU_TABLES(ScanKernels, scan_kernels)

}  // namespace lsm::cpu
