// What the scheduler (delta.cpp) asks of one instruction set's kernels (delta_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/delta.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [begin, end) of one sequence of one value head. States are in the accumulation type,
// [K, V].
struct DeltaTask {
    int64_t batch, head, begin, end;
    void const* state_begin = nullptr;  // S before the tokens; null: zeros
    void* state_end = nullptr;          // S after them, nullable; may be state_begin
    int64_t v_begin = 0, v_end = 0;     // the value columns to work on, out of V; backward: all

    void const* grad_end = nullptr;  // backward: gradient of S after the tokens; null: zeros
    void* grad_begin = nullptr;      // gradient of S before them, nullable
};

struct DeltaKernels {
    int64_t (*scratch_bytes)(DeltaParams const& p, int64_t tokens, int64_t columns, bool backward);
    void (*forward)(DeltaParams const& p, DeltaTask const& task, void* scratch);
    void (*backward)(DeltaParams const& p, DeltaTask const& task, void* scratch);
};

LSM_CPU_TABLES(DeltaKernels, delta_kernels)

}  // namespace lsm::cpu
