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

// Channels of a tile. Where they lie side by side, all of them if a few rows of that stay in a cache next to the core:
// memory is fastest along whole rows. A norm wants whole heads.
inline int64_t conv_tile_channels(ConvParams const& p) {
    int64_t const D = p.D < 1 ? 1 : p.D;
    if (!p.x.channel_last()) return D < 32 ? D : 32;
    int64_t const unit = p.norm > 0 ? p.norm : 64, tiles = (D + 2047) / 2048;
    int64_t const even = (D + tiles - 1) / tiles;
    return (even + unit - 1) / unit * unit;
}

// Tokens of a segment, at most; more than any number of taps. A few segments of a short call, too, for threads to share.
inline int64_t conv_segment_tokens(ConvParams const& p) {
    if (!p.x.channel_last()) return 2048;
    int64_t const share = (p.B * p.T / 8 + 31) / 32 * 32, least = p.W <= 32 ? 32 : 128;
    return share < least ? least : share > 256 ? 256 : share;
}

// `first` is a channel, the first of a tile, whose weights a forward leaves in scratch; `ready`: they are there. Sums are
// of the accumulation type, float64 for float64.
struct ConvKernels {
    int64_t (*scratch_bytes)(ConvParams const& p);
    void (*forward)(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                    bool ready, void* scratch);
    // record: [W + 1][D], of the weight's and below them the bias's gradient; written if they are wanted.
    void (*backward)(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                     void* record, void* scratch);
    void (*add)(ConvParams const& p, void* records, int64_t count);
    void (*step)(ConvStepParams const& p, int64_t batch);
};

LSM_CPU_TABLES(ConvKernels, conv_kernels)

}  // namespace lsm::cpu
