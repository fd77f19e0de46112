// What the scheduler (slstm.cpp) asks of one instruction set's sLSTM cell (slstm_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/slstm.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [begin, end) of one row and head: a sequence, whose states are those of `index`.
struct SlstmTask {
    int64_t batch, index, head, begin, end;
};

struct SlstmKernels {
    int64_t (*scratch_bytes)(SlstmParams const& p);
    void (*forward)(SlstmParams const& p, SlstmTask const& task, void* scratch);
    void (*backward)(SlstmParams const& p, SlstmTask const& task, void* scratch);
};

LSM_CPU_TABLES(SlstmKernels, slstm_kernels)

}  // namespace lsm::cpu
