// What the scheduler (chunk.cpp) asks of one instruction set's kernels (chunk_tier.h). Plain C++,
// no vectors.
#pragma once

#include "params/chunk.h"
#include "tier_choice.h"

namespace lsm::cpu {

// A stretch [begin, end) of one sequence of one value head. States are in the accumulation type,
// [K, V].
struct ChunkTask {
    int64_t sequence, batch, head, begin, end;
    void const* state_begin = nullptr;  // S before the stretch; null: zeros
    void* state_end = nullptr;          // S after it, nullable
    void* decay = nullptr;              // product of the stretch's decays, nullable; as many as
                                        // a token has gates, those of keys first

    void const* n_begin = nullptr;  // a normaliser's sums [K] likewise
    void* n_end = nullptr;
    void const* n_grad_end = nullptr;  // and their gradients
    void* n_grad_begin = nullptr;

    int64_t v_begin = 0, v_end = 0;  // forward: the value columns to work on, out of V

    void const* grad_end = nullptr;  // backward: gradient of S after the stretch; null: zeros
    void* grad_begin = nullptr;      // gradient of S before it, nullable
};

struct ChunkKernels {
    void (*gates)(ChunkParams const& p, ChunkTask const& task);  // of a normaliser, by sequence
    int64_t (*scratch_bytes)(ChunkParams const& p, int64_t tokens, bool backward);
    void (*forward)(ChunkParams const& p, ChunkTask const& task, void* scratch);
    void (*end_state)(ChunkParams const& p, ChunkTask const& task, void* scratch);  // S only
    void (*backward)(ChunkParams const& p, ChunkTask const& task, void* scratch);
    void (*begin_grad)(ChunkParams const& p, ChunkTask const& task, void* scratch);  // dS only
    void (*step)(StepParams const& p, void* workspace, int64_t first,
                 int64_t last);  // of the B * HV states
};

// Numbers in a step's workspace for each state: features of q and k, and what they are made of, with
// room for whole vectors.
inline int64_t step_features(StepParams const& p) {
    constexpr int64_t kRoom = 16;  // as many as the widest vector has lanes
    return p.features == Features::none ? 0 : 2 * (p.K + kRoom) + p.channels + 1 + kRoom;
}

LSM_CPU_TABLES(ChunkKernels, chunk_kernels)

}  // namespace lsm::cpu
