// How a call of the delta engine's recurrence uses scratch memory, and the passes it runs.
//
// Forward: one sweep of whole sequences. Backward: a sweep forwards that leaves the state before
// every segment and what each micro-step wrote, a sweep in reverse that leaves the same of the
// gradient, and then, segments side by side, the gradients that belong to rows of the state.
#pragma once

#include "kernels/segments.cuh"
#include "params/delta.h"

namespace lsm::delta::exact {

constexpr int kSegment = 128;  // most micro-steps per segment of a backward

struct Plan {
    Segments segments;  // in micro-steps
    // The state before each segment and its gradient after it, [records, HV, K, V].
    float *starts = nullptr, *ends = nullptr;
    // Of every micro-step, before beta: what is written to the state, and its gradient, [B, Tn, HV, V].
    float *written = nullptr, *grad_written = nullptr;
    float* gate_shares =
        nullptr;  // of a scalar gate's gradient, by tiles of rows, [tiles, B, T, HV]
    i64 bytes = 0;

    Plan(DeltaParams const& p, bool backward, void* workspace);
};

// Instances: one device file per type (passes_*.cu), compiled in parallel.
template <class T>
void run_forward(DeltaParams const& p, Plan const& plan, void* stream);
template <class T>
void run_backward(DeltaParams const& p, Plan const& plan, void* stream);

}  // namespace lsm::delta::exact
