// One sweep of the chunk engine, on bf16 activations; the instances live in one device file per kind (sweep_*.cu), compiled in parallel.
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"

namespace lsm {

// Decay on the contraction side: o and dv.
void sweep_contraction(SweepParams const& p, Segments const& segments, void* stream);
// Decay on the row side: dq and dk.
void sweep_rows(SweepParams const& p, Segments const& segments, void* stream);
// What a segment leaves from a zero state, and its summed gates; decay on the contraction side.
void sweep_state(SweepParams const& p, Segments const& segments, void* stream);

// Rows of the state that one block of a sweep owns, and the contraction size it is compiled for.
inline int sweep_row_tile(int contraction, int rows) {
    return contraction > 128 || rows <= 64 ? 64 : 128;
}
inline int sweep_contraction_bucket(int contraction) {
    return contraction <= 64 ? 64 : contraction <= 128 ? 128 : 256;
}

}  // namespace lsm
