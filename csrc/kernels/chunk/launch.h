// One sweep of the chunk engine, on bf16 activations; the instances live in one device file per kind (sweep_*.cu), compiled in parallel.
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"

namespace lsm {

void sweep_output(SweepParams const& p, Segments const& segments, void* stream);
void sweep_state(SweepParams const& p, Segments const& segments, void* stream);
void sweep_query_gradient(SweepParams const& p, Segments const& segments, void* stream);
void sweep_key_gradient(SweepParams const& p, Segments const& segments, void* stream);

// Rows of the state that one block of a sweep owns, and the contraction size it is compiled for.
inline int sweep_row_tile(int contraction, int rows) {
    return contraction > 128 || rows <= 64 ? 64 : 128;
}
inline int sweep_contraction_bucket(int contraction) {
    return contraction <= 64 ? 64 : contraction <= 128 ? 128 : 256;
}

}  // namespace lsm
