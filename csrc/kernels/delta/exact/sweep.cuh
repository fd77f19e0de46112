// The delta engine token by token, with the state in registers, tiled over its columns: the columns
// of S are independent but for what comes in with a micro-step. One warp walks a whole sequence of
// one value head with a [K, 16] tile ([K, 8] for K = 256), so no barrier is between a micro-step
// and the next; the warps of a block share the rows of keys and gates.
//
// All transitions are one pattern, in either direction of time. r is what the state holds under a
// key, u what is written after it:
//
//                                        dot      add   plain, value   read   d        u
//     forward  householder   S = A S +   A k      k     -        -     q      v - r    beta d
//              comba                     erase    k     -        -     q      v - r    beta d
//              dplr                      erase    write k        v     q      r        d
//     reverse  householder   G = A G +   k        A k   q   scale dO   -      r        -beta d
//              comba                     k        erase q   scale dO   -      r        -beta d
//              dplr                      write    erase q   scale dO   k      r        d
//
//     forward:   r = S^T dot;   S = A S + add u^T + plain value^T;   o = S^T read
//     reverse:   G += plain value^T;   r = G^T dot;   dv = G^T read, or -u;   G = A G + add u^T
//
// The forward d is the corrected value before beta, the reverse one its gradient: a backward keeps
// both, and the row gradients need nothing else that is a sum over K.
//
// A thread holds K / 8 (16 for K = 256) rows and 4 columns. Stages of some micro-steps go through
// shared memory, the next one on its way while this one is used.
#pragma once

#include "kernels/delta/exact/common.cuh"
#include "kernels/delta/exact/plan.h"
#include "kernels/dispatch.h"

namespace lsm::delta::exact {

// K: smallest supported number of rows that holds the actual one.
template <int K>
struct SweepConfig {
    static constexpr int kThreads = 128, kWarps = kThreads / 32;
    static constexpr int kRows = K < 128 ? K / 8 : 16;      // of the state, per thread
    static constexpr int kLanes = K / kRows;                // of a warp, along K
    static constexpr int kWarpColumns = 32 / kLanes * 4;    // of the state
    static constexpr int kColumns = kWarps * kWarpColumns;  // of the state, per block
    static constexpr int kSteps = K == 64 ? 8 : 4;          // micro-steps per stage
    static constexpr int kGates = kSteps * K / kThreads;    // per thread and stage
    static constexpr int kBetas = kSteps * kColumns / kThreads;
    static constexpr int kLanesPerSum = kLanes / 4;
    static_assert(kSegment % kSteps == 0);
};

template <class T, int K>
struct SweepStorage {
    using C = SweepConfig<K>;
    using Rows = T[C::kSteps][K];
    struct Stage {
        alignas(16) Rows dot, add, plain, read;
        alignas(16) T value[C::kSteps][C::kColumns];
        alignas(16) float decay[C::kSteps][K];
        float beta[C::kSteps][C::kColumns];
    } stage[2];
};

template <class T>
struct SweepParams {
    Rows dot, add, plain, read;  // add: null if it is dot; plain, read: null if there are none
    // What plain rows write; without them what r is subtracted from; null: nothing.
    Rows value;
    Rows out;      // o, or dv; nullable
    Rows written;  // d, fp32; nullable
    GateLoader<T> gates, betas;
    bool decays_key;     // householder: the key acts on the decayed state
    float const* start;  // [N, HV, K, V], nullable: zeros
    float* end;          // nullable
    float* boundaries;   // [records, HV, K, V]: the state where segments meet; nullable
    int heads_per_group, HV, K, V, per_token;
    float value_scale, out_scale;
};

template <class T, int K, bool Reverse>
struct Sweep {
    using C = SweepConfig<K>;
    using Storage = SweepStorage<T, K>;
    using Stage = typename Storage::Stage;
    using Raw = typename GateLoader<T>::Raw;

    SweepParams<T> const& p;
    Segment const segment;  // the first of its sequence
    Work const work;
    Steps const steps;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % 32;
    // First of this thread's columns in the tile, and the one whose sums end up here.
    int const column = tid / 32 * C::kWarpColumns + lane / C::kLanes * 4;
    int const own = tid / 32 * C::kWarpColumns + lane / C::kLanesPerSum;
    float S[C::kRows][4];
    Raw raw_gate[C::kGates], raw_beta[C::kBetas];  // of the next stage

    LSM_DEVICE Sweep(SweepParams<T> const& p, Segment const& segment, Work const& work)
        : p(p),
          segment(segment),
          work(work),
          steps(segment.t0, segment.end, p.per_token, Reverse) {}

    LSM_DEVICE int first_column() const { return work.tile * C::kColumns; }
    // The i-th of this thread's rows: pieces of 4, neighbouring lanes side by side.
    LSM_DEVICE int row(int i) const { return (i / 4 * C::kLanes + lane % C::kLanes) * 4 + i % 4; }
    LSM_DEVICE bool owns() const {
        return lane % C::kLanesPerSum == 0 && first_column() + own < p.V;
    }

    // States from outside are contiguous, but may start on any float.
    LSM_DEVICE void load_state() {
        float const* const from = p.start + (segment.sequence * i64(p.HV) + work.head) * p.K * p.V;
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                int const v = first_column() + column + j;
                bool const inside = p.start != nullptr && row(i) < p.K && v < p.V;
                S[i][j] = inside ? load_global(from + row(i) * p.V + v) : 0.f;
            }
        }
    }

    // By a moving pointer: offsets of all rows would stay in registers from one boundary to the next.
    LSM_DEVICE void store_state(float* states, i64 index) const {
        if (first_column() + column >= p.V) return;
        i64 const at = ((index * p.HV + work.head) * p.K + row(0)) * p.V;
        float* to = states + at + first_column() + column;
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            if (row(i) >= p.K) break;
            store4_global(to, S[i]);
            to += i % 4 < 3 ? p.V : (4 * C::kLanes - 3) * p.V;
        }
    }

    LSM_DEVICE void start_stage(Stage& stage, int step) {
        auto copy = [&](auto& tile, Rows const& x, bool of_token, int head, int first,
                        int columns) {
            if (x.data == nullptr) return;
            copy_rows<C::kThreads>(tile, columns - first, [&](int i) -> T const* {
                int const s = step + i;
                if (s >= steps.count || (of_token && !steps.reads(s))) return nullptr;
                i64 const time = of_token ? steps.token(s) : steps.at(s);
                return row_at<T const>(x, segment.batch, time, head) + first;
            });
        };
        copy(stage.dot, p.dot, false, work.row_head, 0, p.K);
        copy(stage.add, p.add, false, work.row_head, 0, p.K);
        copy(stage.plain, p.plain, Reverse, work.row_head, 0, p.K);
        copy(stage.read, p.read, !Reverse, work.row_head, 0, p.K);
        copy(stage.value, p.value, Reverse, work.head, first_column(), p.V);
        cp_async_commit();
        LSM_UNROLL
        for (int i = 0; i < C::kGates; ++i) {
            int const s = step + (tid + i * C::kThreads) / K, c = (tid + i * C::kThreads) % K;
            bool const inside = s < steps.count && c < p.K && steps.decays(s);
            raw_gate[i] =
                inside ? p.gates.load(p.gates.at(segment.batch, steps.token(s), work.head, c))
                       : GateLoader<T>::kIdentity;
        }
        LSM_UNROLL
        for (int i = 0; i < C::kBetas; ++i) {
            int const s = step + (tid + i * C::kThreads) / C::kColumns;
            int const v = first_column() + (tid + i * C::kThreads) % C::kColumns;
            bool const inside = s < steps.count && v < p.V;
            raw_beta[i] = inside
                              ? p.betas.load(p.betas.at(segment.batch, steps.at(s), work.head, v))
                              : GateLoader<T>::kIdentity;
        }
    }

    LSM_DEVICE void store_gates(Stage& stage) {
        LSM_UNROLL
        for (int i = 0; i < C::kGates; ++i) {
            int const at = tid + i * C::kThreads;
            stage.decay[at / K][at % K] = p.gates.factor(raw_gate[i]);
        }
        LSM_UNROLL
        for (int i = 0; i < C::kBetas; ++i) {
            int const at = tid + i * C::kThreads;
            float const beta = p.betas.value(raw_beta[i]);
            stage.beta[at / C::kColumns][at % C::kColumns] = p.betas.g.data == nullptr ? 1.f
                                                             : Reverse                 ? -beta
                                                                                       : beta;
        }
    }

    // Calls f(i, x) for every four rows i .. i + 3 of this thread, with a token's elements there.
    template <class F>
    LSM_DEVICE void for_rows(T const (&tile)[K], F const& f) const {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; i += 4) {
            float x[4];
            load4(&tile[row(i)], x);
            f(i, x);
        }
    }

    // S^T x over this thread's rows.
    LSM_DEVICE void multiply(T const (&tile)[K], float const* decay, float (&sums)[4]) const {
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) sums[j] = 0.f;
        for_rows(tile, [&](int i, float(&x)[4]) {
            if (decay != nullptr) {
                float a[4];
                load4(&decay[row(i)], a);
                LSM_UNROLL
                for (int c = 0; c < 4; ++c) x[c] *= a[c];
            }
            LSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) sums[j] += x[c] * S[i + c][j];
            }
        });
    }

    LSM_DEVICE void write(T const (&tile)[K], float const (&value)[4]) {
        for_rows(tile, [&](int i, float(&x)[4]) {
            LSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) S[i + c][j] += x[c] * value[j];
            }
        });
    }

    // S = A S + x value^T, or A (S + x value^T).
    LSM_DEVICE void decay_and_write(T const (&tile)[K], float const (&decay)[K],
                                    float const (&value)[4], bool decayed) {
        for_rows(tile, [&](int i, float(&x)[4]) {
            float a[4];
            load4(&decay[row(i)], a);
            LSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                if (decayed) x[c] *= a[c];
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) S[i + c][j] = a[c] * S[i + c][j] + x[c] * value[j];
            }
        });
    }

    // The sum over the warp's rows for column `own`.
    LSM_DEVICE float reduce(float (&sums)[4]) const {
        scatter_sums<C::kLanes / 2, 1, 4>(sums, lane);
        return sums[0];
    }

    LSM_DEVICE void advance(Stage& stage, int i, int step) {
        bool const reads = steps.reads(step);
        bool const plain = p.plain.data != nullptr && (!Reverse || reads);
        bool const read = p.read.data != nullptr && (Reverse || reads);
        float value[4], sums[4], u[4], out = 0.f;
        if (plain) {
            load4(&stage.value[i][column], value);
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) value[j] *= p.value_scale;
        }
        if (Reverse && plain) write(stage.plain[i], value);

        multiply(stage.dot[i], !Reverse && p.decays_key ? stage.decay[i] : nullptr, sums);
        float d = reduce(sums);
        if (p.value.data != nullptr && p.plain.data == nullptr)
            d = static_cast<float>(stage.value[i][own]) - d;
        float const own_u = stage.beta[i][own] * d;
        LSM_UNROLL
        for (int j = 0; j < 4; ++j)
            u[j] =
                __shfl_sync(0xffffffffu, own_u, lane / C::kLanes * C::kLanes + j * C::kLanesPerSum);

        if (Reverse && read) {
            multiply(stage.read[i], nullptr, sums);
            out = reduce(sums);
        }
        decay_and_write(p.add.data != nullptr ? stage.add[i] : stage.dot[i], stage.decay[i], u,
                        Reverse && p.decays_key);
        if (!Reverse && plain) write(stage.plain[i], value);
        if (!Reverse && read) {
            multiply(stage.read[i], nullptr, sums);
            out = reduce(sums);
        }
        if (Reverse && !read) out = -own_u;

        if (!owns()) return;
        int const c = first_column() + own;
        if (p.out.data != nullptr && (Reverse || read)) {
            i64 const time = Reverse ? steps.at(step) : steps.token(step);
            store_global(row_at<T>(p.out, segment.batch, time, work.head) + c,
                         static_cast<T>(p.out_scale * out));
        }
        if (p.written.data != nullptr)
            store_global(row_at<float>(p.written, segment.batch, steps.at(step), work.head) + c, d);
    }

    // Leaves the state between two segments, if step is the first in one.
    LSM_DEVICE void store_boundary(int step) const {
        if (p.boundaries == nullptr) return;
        int const index = (Reverse ? steps.count - 1 - step : step) / kSegment;
        int const first = Reverse ? steps.count - (index + 1) * kSegment : index * kSegment;
        if (step == (first > 0 ? first : 0)) store_state(p.boundaries, work.record + index);
    }

    LSM_DEVICE void walk() {
        if (steps.count > 0) start_stage(shared.stage[0], 0);
        LSM_UNROLL_BY(1)
        for (int step = 0; step < steps.count; ++step) {
            Stage& stage = shared.stage[step / C::kSteps % 2];
            if (step % C::kSteps == 0) {
                store_gates(stage);
                cp_async_wait<0>();
                __syncthreads();  // this stage has arrived, and nobody is busy with the other
                if (step + C::kSteps < steps.count)
                    start_stage(shared.stage[1 - step / C::kSteps % 2], step + C::kSteps);
            }
            store_boundary(step);
            advance(stage, step % C::kSteps, step);
        }
    }

    LSM_DEVICE void poison() {
        constexpr int kPieces = C::kColumns / 4;
        float const nan[4] = {nan_value(), nan_value(), nan_value(), nan_value()};
        int const c = first_column() + tid % kPieces * 4;
        for (int step = tid / kPieces; c < p.V && step < steps.count;
             step += C::kThreads / kPieces) {
            if (p.out.data != nullptr && (Reverse || steps.reads(step))) {
                i64 const time = Reverse ? steps.at(step) : steps.token(step);
                store4_global(row_at<T>(p.out, segment.batch, time, work.head) + c, nan);
            }
            if (p.written.data != nullptr) {
                store4_global(
                    row_at<float>(p.written, segment.batch, steps.at(step), work.head) + c, nan);
            }
        }
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) S[i][j] = nan_value();
        }
    }
};

template <class T, int K, bool Reverse>
__global__ void __launch_bounds__(SweepConfig<K>::kThreads, K == 64 ? 4 : 3)
    sweep(SweepParams<T> const p, Segments const segments, int tiles) {
    Work const work(p.HV, {p.heads_per_group, 1}, tiles);
    Segment const segment = segments[work.record];
    if (segment.unused() || segment.index > 0) return;  // segments are walked by the first's block

    Sweep<T, K, Reverse> s(p, segment, work);
    if (segment.poison) {
        s.poison();
    } else {
        s.load_state();
        s.walk();
    }
    if (p.end != nullptr && segment.sequence >= 0) s.store_state(p.end, segment.sequence);
}

template <class T, bool Reverse>
void run_sweep(SweepParams<T> const& p, Segments const& segments, void* stream) {
    dispatch(Buckets<64, 128, 256>{}, p.K, [&](auto K) {
        constexpr int kColumns = SweepConfig<K>::kColumns;
        i64 const tiles = (p.V + kColumns - 1) / kColumns;
        launch(sweep<T, K, Reverse>, dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
               dim3(SweepConfig<K>::kThreads), sizeof(SweepStorage<T, K>), stream, p, segments,
               static_cast<int>(tiles));
    });
}

}  // namespace lsm::delta::exact
