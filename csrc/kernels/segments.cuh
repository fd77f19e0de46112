// Time segments: the work items of kernels that walk sequences.
//
// Every sequence is cut into segments of at most L tokens that never cross into the next sequence;
// an empty sequence has one empty segment, so that somebody owns its final state. The number of
// records is known on the host without reading cu_seqlens (plan.count; for packed sequences an
// upper bound, ceil(T / L) + N), one group of blocks per record. A dense batch needs no table:
// records are computed in closed form. For packed sequences one small kernel checks cu_seqlens and
// writes the table, so nothing is read back to the host.
//
//     Segments const plan = plan_segments(p, L, workspace);   // of segments_bytes(p, L) bytes
//     build_segments(p, plan, stream);                        // launches for packed sequences only
//     launch(kernel, dim3(plan.count * heads * tiles), ...);  // on x: y and z end at 65535
//     ...
//     Segment const segment = plan[record];
//     if (segment.unused()) return;
//     if (segment.poison) { /* NaN to tokens [t0, t1), and to the state of `sequence` if >= 0 */ }
//
// cu_seqlens that does not start at 0, decreases, or does not end at T poisons the whole call:
// records then partition the T tokens (record y covers [yL, yL + L)) and the N sequences (record y
// is `sequence` y), so that writing NaN everywhere takes no further care and no address outside the
// tensors is formed.
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"

namespace lsm {

struct alignas(16) Segment {
    i64 t0, t1;        // tokens [t0, t1) of row `batch`
    i64 first;         // record of segment 0 of this sequence; the others follow it in order
    i64 end;           // of the sequence
    int32_t batch;     // row of q, k, v, ...: the sequence in a dense batch, 0 when packed
    int32_t sequence;  // owner of initial_state[sequence] and final_state[sequence]; -1: none
    int32_t index;     // of this segment in its sequence
    bool is_last;      // of its sequence
    bool poison;       // write NaN, read nothing

    LSM_DEVICE bool unused() const { return sequence < 0 && t0 == t1; }
};

struct Segments {
    i64 T = 0, L = 1;      // tokens per row; tokens per segment, at least 1
    i64 unit = 1;          // what cu_seqlens counts, in tokens of the above
    bool on_grid = false;  // cut where the row's time is a multiple of L, not the sequence's own
    i64 per_sequence = 1;  // dense only
    i64 count = 0;         // records, used or not
    Segment* table = nullptr;  // packed only

    // Tokens between the last cut that a sequence may have and its beginning.
    LSM_DEVICE i64 past_cut(i64 begin) const { return on_grid ? begin % L : 0; }

    LSM_DEVICE Segment operator[](i64 record) const {
        if (table != nullptr) return table[record];
        int32_t const sequence = static_cast<int32_t>(record / per_sequence);
        int32_t const index = static_cast<int32_t>(record - sequence * per_sequence);
        i64 const t0 = index * L;
        return {t0,    t0 + L < T ? t0 + L : T,   record - index, T, sequence, sequence,
                index, index == per_sequence - 1, false};
    }
};

namespace segments {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct SharedStorage {
    int offset[kThreads +
               1];  // first record of each sequence of a tile, relative to the tile's first
    int warp_total[kWarps];
};

template <class Int>
LSM_DEVICE bool out_of_order(Int const* cu_seqlens, i64 N, Segments const& plan) {
    bool bad = threadIdx.x == 0 && (cu_seqlens[0] != 0 || cu_seqlens[N] != plan.T / plan.unit);
    for (i64 n = threadIdx.x; n < N; n += kThreads) bad |= cu_seqlens[n] > cu_seqlens[n + 1];
    return __syncthreads_or(bad) != 0;
}

// shared.offset[i] = sum of the counts of threads before i; shared.offset[kThreads] = sum of all.
LSM_DEVICE void scan_counts(SharedStorage& shared, int count) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = count;
    for (int d = 1; d < 32; d *= 2) {
        int const below = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += below;
    }
    if (lane == 31) shared.warp_total[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += shared.warp_total[w];
    shared.offset[threadIdx.x + 1] = sum;
    if (threadIdx.x == 0) shared.offset[0] = 0;
    __syncthreads();
}

// One block. Sequences go by in tiles of kThreads; the records of a tile are spread over all
// threads, so that one long sequence is as quick as many short ones.
template <class Int>
__global__ void __launch_bounds__(kThreads)
    write_table(Int const* cu_seqlens, i64 N, Segments plan) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dyn_smem());
    i64 const T = plan.T, L = plan.L;

    if (out_of_order(cu_seqlens, N, plan)) {
        for (i64 y = threadIdx.x; y < plan.count; y += kThreads) {
            i64 const t0 = y * L < T ? y * L : T, t1 = t0 + L < T ? t0 + L : T;
            int32_t const sequence = y < N ? static_cast<int32_t>(y) : -1;
            plan.table[y] = {t0, t1, y, t1, 0, sequence, 0, true, true};
        }
        return;
    }

    i64 first = 0;  // record of the tile
    for (i64 tile = 0; tile < N; tile += kThreads) {
        i64 const n = tile + threadIdx.x;
        i64 const start = n < N ? cu_seqlens[n] * plan.unit : 0;
        i64 const length = n < N ? cu_seqlens[n + 1] * plan.unit - start : 0;
        i64 const whole = (plan.past_cut(start) + length + L - 1) / L;
        scan_counts(shared, n >= N ? 0 : whole > 1 ? static_cast<int>(whole) : 1);
        int const records = shared.offset[kThreads];
        for (int y = threadIdx.x; y < records; y += kThreads) {
            int low = 0, high = kThreads;  // offset[low] <= y < offset[high]
            while (high - low > 1) {
                int const middle = (low + high) / 2;
                (shared.offset[middle] <= y ? low : high) = middle;
            }
            i64 const begin = cu_seqlens[tile + low] * plan.unit,
                      end = cu_seqlens[tile + low + 1] * plan.unit;
            int const index = y - shared.offset[low];
            i64 const cut = begin - plan.past_cut(begin) + index * L,
                      t0 = cut > begin ? cut : begin;
            plan.table[first + y] = {t0,
                                     cut + L < end ? cut + L : end,
                                     first + shared.offset[low],
                                     end,
                                     0,
                                     static_cast<int32_t>(tile + low),
                                     index,
                                     y + 1 == shared.offset[low + 1],
                                     false};
        }
        first += records;
        __syncthreads();  // offsets are read until here, and rewritten by the next tile
    }
    for (i64 y = first + threadIdx.x; y < plan.count; y += kThreads)
        plan.table[y] = {0, 0, y, 0, 0, -1, 0, false, false};
}

}  // namespace segments

// Of ChunkParams or DeltaParams. With `unit`, times and lengths are in micro-steps, `unit` per token.
template <class Params>
Segments plan_segments(Params const& p, i64 L, void* workspace, i64 unit = 1) {
    Segments plan;
    plan.T = p.T * unit;
    plan.L = L > 1 ? L : 1;
    plan.unit = unit;
    i64 const pieces = (plan.T + plan.L - 1) / plan.L;
    if (p.cu_seqlens != nullptr) {
        plan.count = pieces + p.N;
        plan.table = static_cast<Segment*>(workspace);
    } else {
        plan.per_sequence = pieces > 1 ? pieces : 1;
        plan.count = p.N * plan.per_sequence;
    }
    return plan;
}

template <class Params>
i64 segments_bytes(Params const& p, i64 L, i64 unit = 1) {
    return p.cu_seqlens != nullptr
               ? plan_segments(p, L, nullptr, unit).count * static_cast<i64>(sizeof(Segment))
               : 0;
}

template <class Params>
void build_segments(Params const& p, Segments const& plan, void* stream) {
    if (p.cu_seqlens == nullptr || plan.count == 0) return;
    auto run = [&](auto const* cu_seqlens) {
        launch(segments::write_table<std::remove_cv_t<std::remove_pointer_t<decltype(cu_seqlens)>>>,
               dim3(1), dim3(segments::kThreads), sizeof(segments::SharedStorage), stream,
               cu_seqlens, p.N, plan);
    };
    if (p.cu_seqlens_is_64bit) {
        run(static_cast<int64_t const*>(p.cu_seqlens));
    } else {
        run(static_cast<int32_t const*>(p.cu_seqlens));
    }
}

// Tokens per segment: whole sequences when `chains` (independent blocks without cutting) fill
// `slots` (blocks the card holds at once) anyway, else as many cuts as fill them, of at least
// `least` tokens and a multiple of it.
inline i64 segment_length(i64 T, i64 chains, i64 slots, i64 least) {
    if (T <= least || chains == 0 || chains * 10 >= slots * 9) return T > 1 ? T : 1;
    i64 const pieces = slots / chains > 1 ? slots / chains : 1;
    i64 const length = ((T + pieces - 1) / pieces + least - 1) / least * least;
    return length < T ? length : T;
}

}  // namespace lsm
