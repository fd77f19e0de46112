// The walk of kernels whose gradients belong to a row of the state, and so need a sum over all of V
// and one row only. Walking backwards needs every state again, and dividing by the decay would not
// give it back. So a block owns a few rows [row tile, V] of one value head and one segment and walks
// it forwards first, leaving the state before every short run of steps in shared memory; then each
// run, from the last to the first, is walked forwards once more with all its states kept in
// registers, and backwards. Runs arrive in two stages, one while the other is computed with.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/recurrence/common.cuh"

namespace lsm::recurrence {

// V: smallest supported number of columns that holds the actual one. Run: steps whose states are
// held in registers. Segment: most steps of a block.
template <int V, int Run, int Segment>
struct RowTile {
    static constexpr int kThreads = 128;
    static constexpr int kLanes = V / 4 < 32 ? V / 4 : 32;  // threads along V
    static constexpr int kColumns = V / kLanes;             // per thread, in pieces of 4
    static constexpr int kRows = 8 / kColumns;              // per thread
    static constexpr int kTileRows = kThreads / kLanes * kRows;
    static constexpr int kRun = Run;
    // Starts kept in shared memory: not the first, which is the segment's, nor the last, which is
    // at hand when the walk turns.
    static constexpr int kStarts = Segment / Run - 2;
    static constexpr int kPitch = Run + 4;  // floats; spreads the rows over the banks
    // Dot products over V, as each thread has a share of them, and as it ends with whole ones.
    static constexpr int kSums = kRows * Run;
    static constexpr int kOwnSums = kSums > kLanes ? kSums / kLanes : 1;
    static constexpr int kLanesPerSum = kLanes > kSums ? kLanes / kSums : 1;
    static_assert(V % 64 == 0 && V <= 256);
    static_assert(kTileRows * Run % 32 == 0, "whole warps add up a step's rows");

    using State = float[kRows][kColumns];  // of a thread
    using Row = float[kColumns];
    using Sums = float[kSums];
    using Scalars = float[kTileRows][kPitch];                   // one per row and step of a run
    using Starts = float[kStarts][kRows * kColumns][kThreads];  // every thread reads its own
};

inline i64 row_tiles(i64 K, i64 V) {
    i64 tile = 0;
    dispatch(Buckets<64, 128, 256>{}, V,
             [&](auto bucket) { tile = RowTile<bucket, 8, 128>::kTileRows; });
    return (K + tile - 1) / tile;
}

// Of Kernel, which derives from it: load_start() (S before the segment), start_run(stage, run, back)
// (loads on their way; `back`: what only the way back needs too), finish_run(stage, run, back)
// (waits for this thread's), walk_forwards(stage), differentiate(stage), store_run(stage, run).
// Storage has `start` and two of `stage`.
template <class Kernel, class Tile, class Storage>
struct RowWalk {
    using C = Tile;
    using Stage = typename Storage::Stage;
    using Row = typename C::Row;

    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % C::kLanes;  // lane: along V
    int const row = tid / C::kLanes * C::kRows;           // first of this thread in the tile
    typename C::State S, G;

    LSM_DEVICE static constexpr int runs(int steps) { return (steps + C::kRun - 1) / C::kRun; }
    LSM_DEVICE int column(int j) const { return (j / 4 * C::kLanes + lane) * 4 + j % 4; }

    template <class E, int V>
    LSM_DEVICE void load_row(E const (&tile)[V], Row& x) const {
        LSM_UNROLL
        for (int j = 0; j < C::kColumns; j += 4) {
            float piece[4];
            load4(&tile[column(j)], piece);
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) x[j + i] = piece[i];
        }
    }

    // Whole sums over V, from the lanes' shares.
    LSM_DEVICE void put(typename C::Scalars& to, typename C::Sums& sums) {
        scatter_sums<C::kLanes / 2, 1, C::kSums>(sums, lane);
        if (lane % C::kLanesPerSum != 0) return;
        LSM_UNROLL
        for (int i = 0; i < C::kOwnSums; ++i) {
            int const own = lane * C::kSums / C::kLanes + i;
            to[row + own / C::kRun][own % C::kRun] = sums[i];
        }
    }

    // Over the rows of the tile, by all threads of a warp, neighbours having neighbouring rows.
    LSM_DEVICE static float sum_rows(float x) {
        LSM_UNROLL
        for (int distance = C::kTileRows / 2; distance > 0; distance /= 2)
            x += __shfl_xor_sync(0xffffffffu, x, distance);
        return x;
    }

    // Runs 0 .. runs - 2 forwards, then all of them backwards: 2 · runs - 1 visits of one pipeline.
    LSM_DEVICE void walk(int runs) {
        auto& kernel = static_cast<Kernel&>(*this);
        auto run_of = [&](int visit) { return visit < runs ? visit : 2 * (runs - 1) - visit; };
        int const visits = 2 * runs - 1;
        if (visits > 0) kernel.start_run(shared.stage[0], 0, runs == 1);
        LSM_UNROLL_BY(1)
        for (int visit = 0; visit < visits; ++visit) {
            Stage& stage = shared.stage[visit % 2];
            Stage& other = shared.stage[1 - visit % 2];
            int const run = run_of(visit);
            kernel.finish_run(stage, run, visit >= runs - 1);
            __syncthreads();  // this run has arrived, and nobody computes with the other any more
            if (visit >= runs) kernel.store_run(other, run_of(visit - 1));
            if (visit + 1 < visits)
                kernel.start_run(other, run_of(visit + 1), visit + 1 >= runs - 1);
            if (visit < runs - 1) {
                keep_start(run);
                kernel.walk_forwards(stage);
            } else {
                if (visit >= runs) recall_start(run);
                kernel.differentiate(stage);
            }
        }
        __syncthreads();
        if (visits > 0) kernel.store_run(shared.stage[(visits - 1) % 2], 0);
    }

  private:
    LSM_DEVICE void keep_start(int run) {
        if (run == 0) return;
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e)
            shared.start[run - 1][e][tid] = S[e / C::kColumns][e % C::kColumns];
    }

    LSM_DEVICE void recall_start(int run) {
        if (run == 0) return static_cast<Kernel&>(*this).load_start();
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e)
            S[e / C::kColumns][e % C::kColumns] = shared.start[run - 1][e][tid];
    }
};

}  // namespace lsm::recurrence
