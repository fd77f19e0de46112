// How a call of the recurrence cuts time, its scratch memory, and the passes it runs.
//
// Forward: one sweep where whole sequences fill the card; else what each segment leaves from zero,
// the join of segments, and the sweep of all segments at once. Backward: segments of at most
// kRowSegment tokens always, joined in both directions, then dv and the gradient of the initial
// state by columns, dq, dk and dg by rows. A decay of the state's columns is one of the rows of the
// transposed state, where dq and dk are by columns, dv and dg by rows. Where either side decays,
// the gates of columns get their gradient from a second pass by rows, of the transposed state.
#pragma once

#include "kernels/segments.cuh"
#include "params/chunk.h"

namespace lsm::recurrence {

constexpr int kSweepColumns = 32;       // of the state, per block of a sweep
constexpr int kRowSegment = 256;        // most tokens per segment of a backward;
constexpr int kRowSegmentOfBoth = 128;  // where either side decays

// Which side of the state decays.
enum class DecayOn { rows, columns, both };

// Boundary states of all segments in one direction; null where sequences are not cut.
struct Boundary {
    float* states = nullptr;     // [records, HV, K, V]
    float* gate_sums = nullptr;  // [records, HV, gates_per_token], log2
};

// Whether a call runs on the kernels that let either side of the state decay. They serve any decay,
// for about twice the work of the others; bf16 comes here only with gates that tensor cores do not
// take, and has no others.
inline bool either_side(ChunkParams const& p) {
    return p.decay == Decay::both || p.dtype == Dtype::bf16;
}

struct Plan {
    Segments segments;
    Boundary forward, reverse;
    float* gate_shares = nullptr;  // of a scalar gate's gradient, by tiles of rows
    i64 bytes = 0;

    Plan(ChunkParams const& p, bool backward, void* workspace);
};

// Instances: one device file per type (passes_*.cu, either_side_*.cu), compiled in parallel.
template <class T>
void run_forward(ChunkParams const& p, Plan const& plan, void* stream);
template <class T>
void run_backward(ChunkParams const& p, Plan const& plan, void* stream);
template <class T>
void run_either_side_forward(ChunkParams const& p, Plan const& plan, void* stream);
template <class T>
void run_either_side_backward(ChunkParams const& p, Plan const& plan, void* stream);

}  // namespace lsm::recurrence
