// What the scheduler (conv.cpp) asks of one instruction set's convolution (conv_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/conv.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [begin, end) of one row: a sequence. `index` names its states.
struct ConvSequence {
    int64_t batch, index, begin, end;
};

// `first` is a channel, the first of a tile.
struct ConvKernels {
    int64_t (*tile_channels)(ConvParams const& p);
    void (*forward)(ConvParams const& p, ConvSequence const& sequence, int64_t first);
    // All sequences, so that the weight's gradient has one sum.
    void (*backward)(ConvParams const& p, ConvSequence const* sequences, int64_t count,
                     int64_t first);
    void (*step)(ConvStepParams const& p, int64_t batch);
};

LSM_CPU_TABLES(ConvKernels, conv_kernels)

}  // namespace lsm::cpu
