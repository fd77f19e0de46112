// A sweep of the chunk engine, on bf16 activations; one device file per side that decays (sweep_*.cu), compiled in
// parallel.
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"

namespace lsm {

void sweep_contraction(SweepKind kind, SweepParams const& p, Segments const& segments,
                       void* stream);
void sweep_rows(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream);
void sweep_whole(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream);
void sweep_weighted(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream);
void sweep_normalised(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream);

// Rows of the state that one block of a sweep owns, and the contraction size it is compiled for.
// Warps of a block, each with its own rows; sizes what warps leave for the gate's gradient.
inline constexpr int kSweepWarps = 4;
inline int sweep_row_tile(int contraction, int rows) {
    return contraction > 128 || rows <= 64 ? 64 : 128;
}
inline int sweep_contraction_bucket(int contraction) {
    return contraction <= 64 ? 64 : contraction <= 128 ? 128 : 256;
}

}  // namespace lsm
