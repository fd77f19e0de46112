// Numbering of the chunks of kChunk tokens on which the gate's gradient is anchored. A segment's chunks start at its
// first token; neighbouring segments may share a stretch of kChunk tokens but never a number.
#pragma once

#include "kernels/chunk/sweep_params.h"
#include "kernels/segments.cuh"

namespace lsm {

LSM_DEVICE i64 first_chunk(Segment const& segment, i64 record, i64 tokens_per_row) {
    return (segment.batch * tokens_per_row + segment.t0) / kChunk + record;
}

// The last record whose first chunk is not past `index`; unused records, all at the end, are past everything.
LSM_DEVICE i64 record_of_chunk(Segments const& segments, i64 index, i64 tokens_per_row) {
    i64 low = 0, high = segments.count;
    while (high - low > 1) {
        i64 const middle = (low + high) / 2;
        Segment const segment = segments[middle];
        bool const past = segment.unused() || first_chunk(segment, middle, tokens_per_row) > index;
        (past ? high : low) = middle;
    }
    return low;
}

inline i64 count_chunks(ChunkParams const& p, Segments const& segments) {
    return p.B * p.T / kChunk + segments.count + 1;
}

}  // namespace lsm
