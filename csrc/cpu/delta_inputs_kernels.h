// What the scheduler (delta_inputs.cpp) asks of one instruction set's kernels (delta_inputs_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/delta_inputs.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [begin, end) of one argument, counted over all rows of the batch. Decays: their rates e^A_log, and in the
// backward room for the sums of this task, [biases + rates], both in the accumulation type.
struct DeltaInputsTask {
    enum Kind { unit, decay, strength } kind;
    DeltaInput const* of;
    int64_t begin, end;
    void const* rates = nullptr;
    void* sums = nullptr;
};

struct DeltaInputsKernels {
    void (*forward)(DeltaInputsParams const& p, DeltaInputsTask const& task);
    void (*backward)(DeltaInputsParams const& p, DeltaInputsTask const& task);
};

LSM_CPU_TABLES(DeltaInputsKernels, delta_inputs_kernels)

}  // namespace lsm::cpu
