// The recurrence, token by token, with the state in registers, tiled over its columns: one block
// walks one segment of one value head with a [K, 32] tile. Every step decays, writes and reads:
//
//     S = Diag(a) S + key value^T   (or S Diag(a), or Diag(a) S Diag(b), by DecayOn);   out = S^T query
//
// A pass is an order of tokens and two lags: the step of token t reads for t, writes for the token
// write_lag steps before it and decays for the token decay_lag steps before it.
//
//     forward                                decay_lag 0, write_lag 0
//     reverse                                          1            0
//     reading before decay and write, both             1            1
//
// With a lag, one step after the last token completes the state that is left. Forward with (q, k,
// v) gives o and the final state, reverse with (k, q, dO) dv and the gradient of the initial state.
// Without output, from a zero state, either leaves what a segment adds to its neighbour, and its
// summed gates.
//
// A thread holds 8 rows and 4 columns; 8 threads lie along V and K / 8 along K, so the block has K
// threads. Stages of 8 tokens go through shared memory, the next one on its way while this one is
// used.
#pragma once

#include "kernels/policy/decay.cuh"
#include "kernels/recurrence/common.cuh"
#include "kernels/recurrence/plan.h"

namespace lsm::recurrence {

template <int K, DecayOn on>
struct SweepConfig {
    static constexpr int kRows = 8,
                         kColumns = kSweepColumns;  // of the state: per thread; per block
    static constexpr int kThreads = K, kWarps = kThreads / 32;
    static constexpr int kTokens = 8;  // per stage
    static constexpr int kPair = 2;    // tokens whose sums over K are taken together
    // Per multiprocessor: leaves 128 registers, 168 for 64 rows, where 128 spill; 168 for either
    // side.
    static constexpr int kBlocks = K == 64 ? 6 : (on == DecayOn::both ? 384 : 512) / K;
    static constexpr bool kByRow = on != DecayOn::columns, kByColumn = on != DecayOn::rows;
    static constexpr int kRowGates = kByRow ? K : 0,
                         kColumnGates = kByColumn ? kColumns : 0;  // of a token
    static_assert(K % 32 == 0 && K / kRows * (kColumns / 4) == kThreads);
};

// Query and key lie along the state's rows, value and out along its columns.
template <class T, int K, DecayOn on>
struct SweepStorage {
    using C = SweepConfig<K, on>;
    struct Stage {
        alignas(16) T query[C::kTokens][K], key[C::kTokens][K], value[C::kTokens][C::kColumns];
        alignas(16) float decay[C::kTokens][C::kRowGates + C::kColumnGates];  // rows', columns'
        // S^T query, a share per warp.
        alignas(16) float partial[C::kTokens][C::kWarps][C::kColumns];
    } stage[2];
};

// The gates of a stage on one side of the state. A thread loads kOwned of them, all of one channel.
template <class T, class C, int Channels>
struct StageGates {
    using Loader = GateLoader<T>;
    static constexpr int kOwned = C::kTokens * Channels / C::kThreads;

    i64 at;  // of the next stage's first
    typename Loader::Raw raw[kOwned];
    float sum = 0.f;  // log2

    LSM_DEVICE static int channel() { return threadIdx.x % Channels; }
    LSM_DEVICE static int token(int i) { return (threadIdx.x + i * C::kThreads) / Channels; }

    LSM_DEVICE void load(Loader const& gates, Walk const& walk, int step, bool exists) {
        LSM_UNROLL
        for (int i = 0; i < kOwned; ++i) {
            bool const inside = exists && walk.has(step + token(i));
            raw[i] = inside ? gates.load(at) : Loader::kIdentity;
            at += C::kTokens / kOwned * gates.g.time;
        }
    }

    template <bool Sum, int N>
    LSM_DEVICE void store(Loader const& gates, float (&decay)[C::kTokens][N], int first) {
        LSM_UNROLL
        for (int i = 0; i < kOwned; ++i) {
            decay[token(i)][first + channel()] = gates.factor(raw[i]);
            if constexpr (Sum) sum += gates.log2(raw[i]);
        }
    }
};

template <class T, class C>
struct StageGates<T, C, 0> {};

template <class T>
struct SweepParams {
    Rows query, key, value, out;  // strides of time are negative in reverse
    States start, end;  // end: of a local sweep per record, else per sequence and nullable
    BySide<GateLoader<T>> gates;
    float* gate_sum;  // [records, HV, gate_sums], log2, those of rows first; local sweeps
    Groups groups;
    int HV, K, V, gate_sums, row_sums;
    bool reverse;
    int decay_lag, write_lag;  // decay_lag >= write_lag
    float value_scale, out_scale;

    LSM_DEVICE bool ends_in(Segment const& segment) const {
        return reverse ? segment.index == 0 : segment.is_last;
    }
};

template <class T, int K, bool Local, DecayOn on>
struct Sweep {
    using C = SweepConfig<K, on>;
    using Storage = SweepStorage<T, K, on>;
    using Stage = typename Storage::Stage;

    SweepParams<T> const& p;
    Segment const segment;
    Work const work;
    Walk const walk;
    // Where the next stage's rows come from and the last one's go to, and its gates.
    T const *query, *key, *value;
    T* out;
    StageGates<T, C, C::kRowGates> row_gates;
    StageGates<T, C, C::kColumnGates> column_gates;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % 32;
    int const row = tid / 8 * C::kRows, column = tid % 8 * 4;  // first of this thread in the tile
    float S[C::kRows][4];

    LSM_DEVICE Sweep(SweepParams<T> const& p, Segment const& segment, Work const& work)
        : p(p), segment(segment), work(work), walk(segment, p.reverse) {
        i64 const batch = segment.batch, write = walk.token(-p.write_lag);
        if constexpr (!Local) {
            query = row_at<T const>(p.query, batch, walk.token(0), work.row_head);
            out = row_at<T>(p.out, batch, walk.token(out_token()), work.head) + first_column() +
                  out_column();
        }
        key = row_at<T const>(p.key, batch, write, work.row_head);
        value = row_at<T const>(p.value, batch, write, work.column_head) + first_column();
        auto const point = [&](auto& gates, GateLoader<T> const& from, int first) {
            i64 const token = walk.token(gates.token(0) - p.decay_lag);
            gates.at = from.at(batch, token, work.head, first + gates.channel());
        };
        if constexpr (C::kByRow) point(row_gates, p.gates.rows, 0);
        if constexpr (C::kByColumn) point(column_gates, p.gates.columns, first_column());
    }

    LSM_DEVICE int first_column() const { return work.tile * C::kColumns; }
    LSM_DEVICE bool leaves_state() const {
        return Local || (p.end.data != nullptr && p.ends_in(segment) && segment.sequence >= 0);
    }

    LSM_DEVICE float* state_of(States const& states) const {
        return states.of(segment, work.record, work.head, p.HV, i64(p.K) * p.V);
    }

    // States from outside are contiguous, but may start on any float.
    LSM_DEVICE void load_state() {
        bool const zero = Local || p.start.data == nullptr;
        float const* const from = zero ? nullptr : state_of(p.start);
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                int const c = row + i, v = first_column() + column + j;
                bool const inside = !zero && c < p.K && v < p.V;
                S[i][j] = inside ? load_global(from + c * p.start.row + v * p.start.column) : 0.f;
            }
        }
    }

    // Four neighbours in memory at a time.
    LSM_DEVICE void store_state() {
        float* const to =
            state_of(p.end) + row * p.end.row + (first_column() + column) * p.end.column;
        if (row >= p.K || first_column() + column >= p.V) return;
        if (p.end.column == 1) {
            LSM_UNROLL
            for (int i = 0; i < C::kRows; ++i) store4_global(to + i * p.end.row, S[i]);
        } else {
            LSM_UNROLL
            for (int i = 0; i < C::kRows * 4; i += 4) {
                int const c = i % C::kRows, j = i / C::kRows;
                float const x[4] = {S[c][j], S[c + 1][j], S[c + 2][j], S[c + 3][j]};
                store4_global(to + c + j * p.end.column, x);
            }
        }
    }

    // Of the piece of a stage's output that this thread adds up, if out_token() < kTokens.
    LSM_DEVICE int out_token() const { return tid / (C::kColumns / 4); }
    LSM_DEVICE int out_column() const { return tid % (C::kColumns / 4) * 4; }

    LSM_DEVICE void start_stage(Stage& stage, int step) {
        int const write = step - p.write_lag, decay = step - p.decay_lag;
        auto copy = [&](auto& tile, T const*& from, Rows const& x, int first, int columns) {
            copy_rows<C::kThreads>(tile, from, x.time, walk, first, columns);
            from += C::kTokens * x.time;
        };
        if constexpr (!Local) copy(stage.query, query, p.query, step, p.K);
        copy(stage.key, key, p.key, write, p.K);
        copy(stage.value, value, p.value, write, p.V - first_column());
        cp_async_commit();
        if constexpr (C::kByRow)
            row_gates.load(p.gates.rows, walk, decay, row_gates.channel() < p.K);
        if constexpr (C::kByColumn) {
            bool const exists = first_column() + column_gates.channel() < p.V;
            column_gates.load(p.gates.columns, walk, decay, exists);
        }
    }

    LSM_DEVICE void store_decays(Stage& stage) {
        if constexpr (C::kByRow) row_gates.template store<Local>(p.gates.rows, stage.decay, 0);
        if constexpr (C::kByColumn)
            column_gates.template store<Local>(p.gates.columns, stage.decay, C::kRowGates);
    }

    LSM_DEVICE void store_gate_sums() {
        float* const sums = p.gate_sum + (work.record * p.HV + work.head) * p.gate_sums;
        if constexpr (C::kByRow) {
            if (work.tile == 0 && tid < p.row_sums) store_global(sums + tid, row_gates.sum);
        }
        if constexpr (C::kByColumn) {  // several threads have some of a column's tokens each
            static_assert(sizeof(Stage::partial) >= C::kThreads * sizeof(float));
            float* const shares = &shared.stage[0].partial[0][0][0];
            __syncthreads();
            shares[tid] = column_gates.sum;
            __syncthreads();
            if (tid >= C::kColumns || p.row_sums + first_column() + tid >= p.gate_sums) return;
            float sum = 0.f;
            for (int i = tid; i < C::kThreads; i += C::kColumns) sum += shares[i];
            store_global(sums + p.row_sums + first_column() + tid, sum);
        }
    }

    LSM_DEVICE void token(Stage& stage, int i, float* out) {
        float value[4], decay[4], column_decay[4];
        load4(&stage.value[i][column], value);
        if constexpr (C::kByColumn) load4(&stage.decay[i][C::kRowGates + column], column_decay);
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) out[j] = 0.f, value[j] *= p.value_scale;
        LSM_UNROLL
        for (int half = 0; half < C::kRows; half += 4) {
            float query[4] = {}, key[4];
            if constexpr (!Local) load4(&stage.query[i][row + half], query);
            load4(&stage.key[i][row + half], key);
            if constexpr (C::kByRow) load4(&stage.decay[i][row + half], decay);
            LSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) {
                    float& s = S[half + c][j];
                    if constexpr (on == DecayOn::both) s *= column_decay[j];
                    s = (C::kByRow ? decay[c] : column_decay[j]) * s + key[c] * value[j];
                    if constexpr (!Local) out[j] += query[c] * s;
                }
            }
        }
    }

    LSM_DEVICE void pair(Stage& stage, int first) {
        float sums[C::kPair * 4];
        LSM_UNROLL
        for (int i = 0; i < C::kPair; ++i) token(stage, first + i, sums + i * 4);
        if constexpr (!Local) {
            // Lanes 8i .. 8i + 7 keep two columns of token i / 2.
            scatter_sums<16, 8, C::kPair * 4>(sums, lane);
            float* const to = stage.partial[first + lane / 16][tid / 32];
            *reinterpret_cast<float2*>(&to[column + lane / 8 % 2 * 2]) = float2{sums[0], sums[1]};
        }
    }

    // Adds the warps' shares, in their order.
    LSM_DEVICE void store_out(Stage& stage, int step) {
        static_assert(C::kTokens * C::kColumns / 4 <= C::kThreads);
        int const n = out_token(), c = out_column();
        if (n < C::kTokens && step + n < walk.steps && first_column() + c < p.V) {
            float sum[4];
            load4(&stage.partial[n][0][c], sum);
            LSM_UNROLL_BY(1)
            for (int w = 1; w < C::kWarps; ++w) {
                float more[4];
                load4(&stage.partial[n][w][c], more);
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) sum[j] += more[j];
            }
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) sum[j] *= p.out_scale;
            store4_global(out, sum);
        }
        out += C::kTokens * p.out.time;
    }

    LSM_DEVICE void walk_segment() {
        int const end = walk.steps + (leaves_state() ? p.decay_lag : 0);
        if (end > 0) start_stage(shared.stage[0], 0);
        LSM_UNROLL_BY(1)
        for (int step = 0; step < end; step += C::kPair) {
            Stage& stage = shared.stage[step / C::kTokens % 2];
            if (step % C::kTokens == 0) {
                Stage& other = shared.stage[1 - step / C::kTokens % 2];
                store_decays(stage);
                cp_async_wait<0>();
                __syncthreads();  // this stage has arrived, and nobody is busy with the other
                if constexpr (!Local) {
                    if (step > 0) store_out(other, step - C::kTokens);
                }
                if (step + C::kTokens < end) start_stage(other, step + C::kTokens);
            }
            pair(stage, step % C::kTokens);
        }
        if constexpr (!Local) {
            int const last = (end - 1) / C::kTokens;
            __syncthreads();
            if (end > 0) store_out(shared.stage[last % 2], last * C::kTokens);
        }
    }

    LSM_DEVICE void poison() {
        float const nan[4] = {nan_value(), nan_value(), nan_value(), nan_value()};
        for (int step = tid / 8; step < walk.steps; step += C::kThreads / 8) {
            i64 const t = walk.token(step);
            int const c = first_column() + tid % 8 * 4;
            if (c < p.V) store4_global(row_at<T>(p.out, segment.batch, t, work.head) + c, nan);
        }
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) S[i][j] = nan_value();
        }
    }
};

template <class T, int K, bool Local, DecayOn on>
__global__ void __launch_bounds__(SweepConfig<K, on>::kThreads, SweepConfig<K, on>::kBlocks)
    sweep(SweepParams<T> const p, Segments const segments, int tiles) {
    Work const work(p.HV, p.groups, tiles);
    Segment const segment = segments[work.record];
    if (segment.unused() || (Local && (p.ends_in(segment) || segment.poison))) return;

    Sweep<T, K, Local, on> s(p, segment, work);
    if (segment.poison) {
        s.poison();
    } else {
        s.load_state();
        s.walk_segment();
    }
    if (s.leaves_state()) s.store_state();
    if constexpr (Local) s.store_gate_sums();
}

template <class T, int K, bool Local, DecayOn on>
void run_sweep(SweepParams<T> const& p, Segments const& segments, void* stream) {
    i64 const tiles = (p.V + kSweepColumns - 1) / kSweepColumns;
    launch(sweep<T, K, Local, on>, dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
           dim3(SweepConfig<K, on>::kThreads), sizeof(SweepStorage<T, K, on>), stream, p, segments,
           static_cast<int>(tiles));
}

}  // namespace lsm::recurrence
