// Numbering of the chunks of kChunk tokens on which the gate's gradient is anchored. A segment's chunks start at its
// first token; neighbouring segments may share a stretch of kChunk tokens but never a number.
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"

namespace lsm {

LSM_DEVICE i64 first_chunk(Segment const& segment, i64 record, i64 tokens_per_row) {
    return (segment.batch * tokens_per_row + segment.t0) / kChunk + record;
}

inline i64 count_chunks(ChunkParams const& p, Segments const& segments) {
    return p.B * p.T / kChunk + segments.count + 1;
}

}  // namespace lsm
