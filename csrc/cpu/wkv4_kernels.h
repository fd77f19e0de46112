// What the scheduler (wkv4.cpp) asks of one instruction set's running average (wkv4_tier.h). Plain C++, no vectors.
#pragma once

#include "params/wkv4.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Tokens [begin, end) of one sequence, channels [c_begin, c_end).
struct Wkv4Task {
    int64_t sequence, batch, begin, end, c_begin, c_end;
    int64_t tile;                  // of p.states, the first of the sequence
    void* channel_grad = nullptr;  // [2, D]: the sequence's share of the gradients of r and u
};

struct Wkv4Kernels {
    int64_t (*scratch_bytes)(Wkv4Params const& p, int64_t channels, bool backward);
    void (*forward)(Wkv4Params const& p, Wkv4Task const& task, void* scratch);
    void (*backward)(Wkv4Params const& p, Wkv4Task const& task, void* scratch);
};

LSM_CPU_TABLES(Wkv4Kernels, wkv4_kernels)

}  // namespace lsm::cpu
