// The short convolution on the CPU: which kernels, which tiles, which threads. The forward is dealt out by
// sequence and tile of channels, the backward by tile alone: a tile's weights have one sum over all tokens.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "conv_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::ConvKernels;
using cpu::ConvSequence;

constexpr int64_t kThreadGrain = int64_t(1) << 15;  // elements worth waking a thread for

ConvKernels const& kernels() {
    return cpu::best_conv_kernels();
}

std::vector<ConvSequence> sequences_of(ConvParams const& p) {
    std::vector<ConvSequence> sequences;
    if (p.cu_seqlens != nullptr) {
        for (int64_t n = 0; n < p.N; ++n)
            sequences.push_back({0, n, cpu::boundary(p, n), cpu::boundary(p, n + 1)});
        return sequences;
    }
    for (int64_t b = 0; b < p.B; ++b) {
        int64_t begin = 0;
        int32_t const* const index = p.seq_idx != nullptr ? p.seq_idx + b * p.T : nullptr;
        for (int64_t t = 1; index != nullptr && t < p.T; ++t) {
            if (index[t] == index[t - 1]) continue;
            sequences.push_back({b, b, begin, t});
            begin = t;
        }
        sequences.push_back({b, b, begin, p.T});
    }
    return sequences;
}

// run(first, last) over [0, tasks), on as many threads as the elements are worth.
template <class Run>
void over(int64_t tasks, int64_t elements, Run const& run) {
    if (tasks == 0) return;
    int64_t const grain =
        std::max<int64_t>(1, tasks * kThreadGrain / std::max<int64_t>(1, elements));
    if (tasks <= grain) {
        run(0, tasks);
    } else {
        torch::stable::parallel_for(0, tasks, grain, run);
    }
}

}  // namespace

int64_t conv_fwd_workspace(ConvParams const&) {
    return 0;
}

int64_t conv_bwd_workspace(ConvParams const&) {
    return 0;
}

void conv_fwd(ConvParams const& p, void*, void*) {
    std::vector<ConvSequence> const sequences = sequences_of(p);
    int64_t const tile = kernels().tile_channels(p), tiles = cpu::ceil_div(p.D, tile);
    over(int64_t(sequences.size()) * tiles, p.B * p.T * p.D, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            kernels().forward(p, sequences[size_t(i / tiles)], i % tiles * tile);
    });
}

void conv_bwd(ConvParams const& p, void*, void*) {
    std::vector<ConvSequence> const sequences = sequences_of(p);
    int64_t const tile = kernels().tile_channels(p), tiles = cpu::ceil_div(p.D, tile);
    over(tiles, p.B * p.T * p.D, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            kernels().backward(p, sequences.data(), int64_t(sequences.size()), i * tile);
    });
}

void conv_step(ConvStepParams const& p, void*) {
    over(p.B, p.B * p.T * p.D, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) kernels().step(p, b);
    });
}

}  // namespace lsm
