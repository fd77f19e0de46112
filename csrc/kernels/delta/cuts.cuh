// How time is cut for the chains of the tensor-core path, and what is kept of a state where it is.
//
// Windows, [x X, (x + 1) X) of every row, come one after another and bound scratch memory. In a
// window the pieces between multiples of L walk side by side: each first leaves what it makes of a
// state,
//
//     S -> M S + N,    of gradients, backwards,    dS -> M^T dS + N',
//
// N from a walk that starts from zero, M [K, K] from one of the identity that writes no values;
// then a pass over pieces (join.cuh) makes of every N the state itself, in fp32. Nothing relies on
// decay.
#pragma once

#include "kernels/segments.cuh"

namespace lsm::delta {

struct Cuts {
    i64 L = 1, X = 1;  // tokens; X is a multiple of L
    int pieces = 1;    // X / L
    int windows = 1;   // of a row
    int window = 0;    // the current one
    i64 HV = 1, K = 0, V = 0;
    // At the beginning of every piece but the first of a window, [B, pieces, HV, ...]: S and dS,
    // [K, V]; M of the piece.
    float *states = nullptr, *grads = nullptr, *transfers = nullptr;
    // At the beginning of every window, [B, windows, HV, K, V], and of this and the one after it,
    // [2, B, HV, K, V].
    float *carried = nullptr, *grad_carried = nullptr;
    i64 B = 1;

    constexpr i64 begin() const { return window * X; }  // on the host, too
    // The record of the current window that is `unit` in the order of a launch of records() units;
    // -1: none.
    LSM_DEVICE i64 record_of(Segments const& segments, i64 unit) const {
        if (segments.table != nullptr) return holds(segments[unit]) ? unit : -1;
        i64 const index = window * i64(pieces) + unit % pieces;
        return index < segments.per_sequence ? unit / pieces * segments.per_sequence + index : -1;
    }
    i64 records(Segments const& segments) const {
        return segments.table != nullptr ? segments.count : B * pieces;
    }
    LSM_DEVICE bool ends_window(i64 t) const { return t % X == 0; }
    LSM_DEVICE bool holds(Segment const& segment) const {
        i64 const x = segment.t0 / X;
        return (x < windows ? x : windows - 1) == window;
    }
    // Whether the walk of a piece starts from a state that is known beforehand.
    LSM_DEVICE bool leads(Segment const& segment) const {
        return segment.index == 0 || ends_window(segment.t0);
    }
    LSM_DEVICE bool leads_back(Segment const& segment) const {
        return segment.is_last || ends_window(segment.t1);
    }

    // Where what is kept of a cut at time t is.
    LSM_DEVICE float* state(i64 batch, i64 t, int head) const {
        return ends_window(t) ? carried + ((batch * windows + t / X) * HV + head) * K * V
                              : states + place(batch, t, head) * K * V;
    }
    LSM_DEVICE float* grad(i64 batch, i64 t, int head) const {
        return ends_window(t) ? grad_carried + ((t / X % 2 * B + batch) * HV + head) * K * V
                              : grads + place(batch, t, head) * K * V;
    }
    // M of the piece that begins at t.
    LSM_DEVICE float* transfer(i64 batch, i64 t, int head) const {
        return transfers + place(batch, t, head) * K * K;
    }

  private:
    LSM_DEVICE i64 place(i64 batch, i64 t, int head) const {
        return (batch * pieces + (t - begin()) / L) * HV + head;
    }
};

inline i64 ceil_div(i64 x, i64 y) {
    return (x + y - 1) / y;
}

// The length of a backward's windows, if all of time takes `bytes` of scratch memory: of no less
// than `least`, sixteen where that saves more than a multiprocessor's share.
inline i64 window_of(i64 T, i64 least, i64 bytes) {
    if (bytes <= 512 * 1024 * i64(multiprocessors())) return T;
    i64 const length = ceil_div(T, 16) > least ? ceil_div(T, 16) : least;
    return length < T ? length : T;
}

}  // namespace lsm::delta
