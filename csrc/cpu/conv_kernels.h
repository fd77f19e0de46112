// What the scheduler (conv.cpp) asks of one instruction set's convolution (conv_tier.h). Plain C++, no
// vectors.
#pragma once

#include "params/conv.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [t0, t1) of a sequence, which is [begin, end) of one row. `index` names its states.
struct ConvSegment {
    int64_t batch, index, begin, end, t0, t1;
};

// Channels of a tile: where they lie side by side a page of float32, and whole heads if they have a norm.
inline int64_t conv_tile_channels(ConvParams const& p) {
    int64_t const most = p.D < 1 ? 1 : p.D;
    if (!p.x.channel_last()) return most < 32 ? most : 32;
    if (p.norm > 0) return p.norm > 1024 ? p.norm : 1024 / p.norm * p.norm;
    return most < 1024 ? most : 1024;
}

// Tokens of a segment, at most; more than any number of taps.
inline int64_t conv_segment_tokens(ConvParams const& p) {
    return p.x.channel_last() ? 256 : 2048;
}

// `first` is a channel, the first of a tile. Sums are of the accumulation type, float64 for float64.
struct ConvKernels {
    int64_t (*scratch_bytes)(ConvParams const& p);
    void (*forward)(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                    void* scratch);
    // record: [W + 1][D], of the weight's and below them the bias's gradient; written if they are wanted.
    void (*backward)(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                     void* record, void* scratch);
    void (*add)(ConvParams const& p, void* records, int64_t count);
    void (*step)(ConvStepParams const& p, int64_t batch);
};

LSM_CPU_TABLES(ConvKernels, conv_kernels)

}  // namespace lsm::cpu
