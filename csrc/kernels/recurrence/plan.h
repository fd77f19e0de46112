// How a call of the recurrence cuts time, its scratch memory, and the passes it runs.
//
// Forward: one sweep where whole sequences fill the card; else what each segment leaves from zero,
// the join of segments, and the sweep of all segments at once. Backward: segments of at most
// kRowSegment tokens always, joined in both directions, then dv and the gradient of the initial
// state by columns, dq, dk and dg by rows. A decay of the state's columns is one of the rows of the
// transposed state, where dq and dk are by columns, dv and dg by rows.
#pragma once

#include "kernels/segments.cuh"
#include "params/chunk.h"

namespace lsm::recurrence {

constexpr int kSweepColumns = 32;  // of the state, per block of a sweep
constexpr int kRowSegment = 256;   // most tokens per segment of a backward

// Boundary states of all segments in one direction; null where sequences are not cut.
struct Boundary {
    float* states = nullptr;     // [records, HV, K, V]
    float* gate_sums = nullptr;  // [records, HV, gates_per_token], log2
};

// In one head.
inline i64 gates_per_token(ChunkParams const& p) {
    if (p.decay == Decay::none) return 0;
    if (p.decay == Decay::scalar) return 1;
    return p.decay == Decay::key ? p.K : p.V;
}

struct Plan {
    Segments segments;
    Boundary forward, reverse;
    float* gate_shares = nullptr;  // of a scalar gate's gradient, by tiles of rows
    i64 bytes = 0;

    Plan(ChunkParams const& p, bool backward, void* workspace);
};

// Instances: one device file per type (passes_*.cu), compiled in parallel.
template <class T>
void run_forward(ChunkParams const& p, Plan const& plan, void* stream);
template <class T>
void run_backward(ChunkParams const& p, Plan const& plan, void* stream);

}  // namespace lsm::recurrence
