// Joins the segments of a sequence exactly: what each leaves from a zero state becomes what each starts from.
//
//     S = initial;  for every segment in order:  (local, S) <- (S, S 2^gate_sum + local)
//
// gate_sum being of the element's row, of its column, of both, or of the whole state.
//
// One thread per state element, in a fixed order: the same bits every time. Grid: (record, head) x pieces of K V.
#pragma once

#include "kernels/platform.cuh"
#include "kernels/segments.cuh"

namespace lsm {

struct JoinParams {
    float* local;  // [records, heads, K, V]; the last segment of a walk left none
    float const*
        gate_sum;  // log2; [records, heads, gates per token], those of keys first; none: not read
    float const* initial;    // [N, heads, K, V], nullable (zeros)
    int heads, K, V, gates;  // gates: per token and head
    Decay decay;
    bool reverse;  // walk segments from the last to the first
};

namespace join {
constexpr int kThreads = 256;
}

// The sum that decays an element, among the sums of one head.
LSM_DEVICE float gate_sum_of(JoinParams const& p, float const* sums, i64 element) {
    i64 const row = element / p.V, column = element % p.V;
    switch (p.decay) {
        case Decay::none:
            return 0.f;
        case Decay::scalar:
            return load_global(sums);
        case Decay::key:
            return load_global(sums + row);
        case Decay::value:
            return load_global(sums + column);
        default:
            return load_global(sums + row) + load_global(sums + p.K + column);
    }
}

static __global__ void __launch_bounds__(join::kThreads)
    join_segments(JoinParams const p, Segments const segments, int pieces) {
    i64 const unit = blockIdx.x / pieces;
    int const head = static_cast<int>(unit % p.heads);
    i64 record = unit / p.heads;
    Segment segment = segments[record];
    bool const starts_here = p.reverse ? segment.is_last : segment.index == 0;
    if (segment.unused() || segment.poison || !starts_here) return;
    i64 const size = static_cast<i64>(p.K) * p.V;
    i64 const element = static_cast<i64>(blockIdx.x % pieces) * join::kThreads + threadIdx.x;
    if (element >= size) return;
    float S = p.initial == nullptr
                  ? 0.f
                  : load_global(p.initial + (segment.sequence * p.heads + head) * size + element);
    while (true) {
        float* const at = p.local + (record * p.heads + head) * size + element;
        bool const ends_here = p.reverse ? segment.index == 0 : segment.is_last;
        if (ends_here) {
            store_global(at, S);
            return;
        }
        float const* const sums = p.gate_sum + (record * p.heads + head) * p.gates;
        float const sum = gate_sum_of(p, sums, element);
        float const local = load_global(at);
        store_global(at, S);
        S = S * exp2_approx(sum) + local;
        record += p.reverse ? -1 : 1;
        segment = segments[record];
    }
}

inline void run_join(JoinParams const& p, Segments const& segments, void* stream) {
    i64 const pieces = (static_cast<i64>(p.K) * p.V + join::kThreads - 1) / join::kThreads;
    i64 const blocks = segments.count * p.heads * pieces;
    if (blocks == 0) return;
    launch(join_segments, dim3(static_cast<unsigned>(blocks)), dim3(join::kThreads), 0, stream, p,
           segments, static_cast<int>(pieces));
}

}  // namespace lsm
