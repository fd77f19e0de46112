// How a call of the delta engine's recurrence uses scratch memory, and the passes it runs.
//
// Forward: one sweep of whole sequences. Backward: a sweep forwards that leaves the state before
// every segment and what each micro-step wrote, a sweep in reverse that leaves the same of the
// gradient, and then, segments side by side, the gradients that belong to rows of the state. Where
// all of time would take too much memory, windows of it come one after another, last to first;
// before that a sweep of all but the last leaves the states they begin with. Packed rows have one
// window.
#pragma once

#include "kernels/segments.cuh"
#include "params/delta.h"

namespace lsm::delta::exact {

constexpr int kSegment = 128;  // most micro-steps per segment of a backward

struct Plan {
    Segments segments;  // in micro-steps, of the first window
    i64 window = 1;     // tokens, but for a shorter last one
    i64 windows = 1;
    // At the beginning of every window but the first, S [windows - 1, B, HV, K, V]; of this and the
    // next, its gradient [2, B, HV, K, V].
    float *carried = nullptr, *grad_carried = nullptr;
    // The state before each segment and its gradient after it, [records, HV, K, V].
    float *starts = nullptr, *ends = nullptr;
    // Of a window's micro-steps, before beta: what is written to the state, and its gradient,
    // [B, Tn, HV, V].
    float *written = nullptr, *grad_written = nullptr;
    float* gate_shares =
        nullptr;  // of a scalar gate's gradient, by tiles of rows, [tiles, B, T, HV]
    i64 bytes = 0;

    Plan(DeltaParams const& p, bool backward, void* workspace);
};

// Tokens [begin, end) of a dense call; states are as they were.
inline DeltaParams tokens(DeltaParams p, i64 begin, i64 end) {
    auto const from = [](Rows& rows, Dtype dtype, i64 time) {
        if (rows.data == nullptr) return;
        rows.data =
            static_cast<char*>(rows.data) + time * rows.time * (dtype == Dtype::f32 ? 4 : 2);
    };
    i64 const step = begin * p.n;
    from(p.q, p.dtype, begin), from(p.grad_o, p.dtype, begin);
    for (Rows* const x : {&p.k, &p.v, &p.erase, &p.write, &p.dv}) from(*x, p.dtype, step);
    from(p.dq, p.key_grad_dtype, begin);
    for (Rows* const x : {&p.dk, &p.derase, &p.dwrite}) from(*x, p.key_grad_dtype, step);
    from(p.g, p.gate_dtype, begin), from(p.dg, p.gate_dtype, begin);
    from(p.beta, p.beta_dtype, step), from(p.dbeta, p.beta_dtype, step);
    p.T = end - begin;
    return p;
}

// Instances: one device file per type (passes_*.cu), compiled in parallel.
template <class T>
void run_forward(DeltaParams const& p, Plan const& plan, void* stream);
template <class T>
void run_backward(DeltaParams const& p, Plan const& plan, void* stream);

}  // namespace lsm::delta::exact
