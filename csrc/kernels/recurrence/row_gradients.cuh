// Gradients that belong to a row of the state: dq, dk and the gate's. They need a sum over all of V
// and one row only, so a block owns a few rows [row tile, V] of one value head and one segment.
//
//     dq_t = scale · S_t dO_t,   dk_t = dS_t v_t,   dg_t = a_t (S_{t-1} · dS_t)   (dots by row)
//     with dS_t = a_{t+1} dS_{t+1} + scale · q_t dO_t^T
//
// dg is taken from S_{t-1} and dS_t of the same token, never from differences of long sums: it is
// as accurate for a gate of -80 or -inf as for 0. Walking backwards therefore needs every S again,
// and dividing by the decay would not give it back. Instead the segment is walked forwards first,
// leaving the state before every short run of tokens in shared memory; then each run, from the last
// to the first, is walked forwards once more with all its states kept in registers, and backwards.
// What a segment starts from, on either side, comes from joined boundary states.
#pragma once

#include "kernels/recurrence/common.cuh"
#include "kernels/recurrence/plan.h"

namespace lsm::recurrence {

// V: smallest supported number of columns that holds the actual one.
template <int V>
struct RowConfig {
    static constexpr int kThreads = 128;
    static constexpr int kLanes = V / 4 < 32 ? V / 4 : 32;  // threads along V
    static constexpr int kColumns = V / kLanes;             // per thread, in pieces of 4
    static constexpr int kRows = 8 / kColumns;              // per thread
    static constexpr int kTileRows = kThreads / kLanes * kRows;

    static constexpr int kRun = V > 128 ? 8 : 16;  // tokens whose states are held in registers
    // Starts kept in shared memory: not the first, which is the segment's, nor the last, which is
    // at hand when the walk turns.
    static constexpr int kStarts = kRowSegment / kRun - 2;
    static constexpr int kPitch = kRun + 4;  // floats; spreads the rows over the banks

    // Numbers per row and token: q, k, the gate, as each thread loads them;
    static constexpr int kScalars = (kTileRows * kRun + kThreads - 1) / kThreads;
    // dot products over V, as each thread has a share of them, and as it ends with whole ones.
    static constexpr int kSums = kRows * kRun;
    static constexpr int kOwnSums = kSums > kLanes ? kSums / kLanes : 1;
    static constexpr int kLanesPerSum = kLanes > kSums ? kLanes / kSums : 1;
    static_assert(V % 64 == 0 && V <= 256);
};

template <class T, int V>
struct RowStorage {
    using C = RowConfig<V>;
    using Scalars = float[C::kTileRows][C::kPitch];
    float start[C::kStarts][C::kRows * C::kColumns][C::kThreads];  // every thread reads its own
    struct Stage {
        alignas(16) T value[C::kRun][V], grad_out[C::kRun][V];
        alignas(16) Scalars q, k, decay, dq, dk, dg;
    } stage[2];
};

struct RowParams {
    Rows q, k, v, grad_o, dq, dk, dg;
    States start, end;  // the state before the segment; its gradient after the segment
    int HV, heads_per_group, K, V;
    float scale;
};

template <class T, int V, class Decay>
struct RowGradients {
    using C = RowConfig<V>;
    using Storage = RowStorage<T, V>;
    using Stage = typename Storage::Stage;
    using State = float[C::kRows][C::kColumns];
    using Row = float[C::kColumns];

    RowParams const& p;
    Decay const& gate;
    Segment const segment;
    Work const work;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % C::kLanes;  // lane: along V
    int const row = tid / C::kLanes * C::kRows;           // first of this thread in the tile
    i64 const steps = segment.t1 - segment.t0;
    int const runs = static_cast<int>((steps + C::kRun - 1) / C::kRun);
    State S, dS;
    T raw_q[C::kScalars], raw_k[C::kScalars];
    typename Decay::Raw raw_gate[C::kScalars];

    LSM_DEVICE RowGradients(RowParams const& p, Decay const& gate, Segment const& segment,
                            Work const& work)
        : p(p), gate(gate), segment(segment), work(work) {}

    LSM_DEVICE int first_row() const { return work.tile * C::kTileRows; }
    LSM_DEVICE int column(int j) const { return (j / 4 * C::kLanes + lane) * 4 + j % 4; }

    // States from outside are contiguous, but may start on any float.
    LSM_DEVICE void load_state(State& state, States const& from) {
        bool const zero = from.data == nullptr;
        i64 const size = i64(p.K) * p.V;
        float const* const data =
            zero ? nullptr : from.of(segment, work.record, work.head, p.HV, size);
        LSM_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j) {
                int const c = first_row() + row + r, v = column(j);
                bool const inside = !zero && c < p.K && v < p.V;
                state[r][j] = inside ? load_global(data + i64(c) * p.V + v) : 0.f;
            }
        }
    }

    // The i-th of this thread's scalars: neighbouring threads take neighbouring rows of one token.
    LSM_DEVICE int scalar_row(int i) const { return (tid + i * C::kThreads) % C::kTileRows; }
    LSM_DEVICE int scalar_token(int i) const { return (tid + i * C::kThreads) / C::kTileRows; }

    LSM_DEVICE void start_run(Stage& stage, int run, bool with_queries) {
        i64 const step = i64(run) * C::kRun;
        auto copy = [&](auto& tile, Rows const& x) {
            copy_rows<false, C::kThreads>(tile, x, segment, work.head, step, steps, 0, p.V);
        };
        copy(stage.value, p.v);
        if (with_queries) copy(stage.grad_out, p.grad_o);
        cp_async_commit();
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const c = first_row() + scalar_row(i);
            i64 const t = segment.t0 + step + scalar_token(i);
            bool const inside = scalar_token(i) < C::kRun && c < p.K && t < segment.t1;
            auto load = [&](Rows const& x, bool wanted) {
                if (!wanted) return static_cast<T>(0.f);
                return load_global(row_at<T const>(x, segment.batch, t, work.group_head) + c);
            };
            raw_q[i] = load(p.q, inside && with_queries);
            raw_k[i] = load(p.k, inside);
            raw_gate[i] = inside ? gate.load(segment.batch, t, work.head, c) : Decay::identity();
        }
    }

    LSM_DEVICE void store_scalars(Stage& stage) {
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const r = scalar_row(i), t = scalar_token(i);
            if (t >= C::kRun) continue;
            stage.q[r][t] = p.scale * static_cast<float>(raw_q[i]);
            stage.k[r][t] = static_cast<float>(raw_k[i]);
            stage.decay[r][t] = Decay::factor(raw_gate[i]);
        }
    }

    LSM_DEVICE void load_row(T const (&tile)[V], Row& x) const {
        LSM_UNROLL
        for (int j = 0; j < C::kColumns; j += 4) {
            float piece[4];
            load4(&tile[column(j)], piece);
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) x[j + i] = piece[i];
        }
    }

    LSM_DEVICE void advance(Stage& stage, int t, Row const& value) {
        LSM_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
            float const decay = stage.decay[row + r][t], key = stage.k[row + r][t];
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j) S[r][j] = decay * S[r][j] + key * value[j];
        }
    }

    LSM_DEVICE void walk_forwards(Stage& stage) {
        LSM_UNROLL_BY(4)
        for (int t = 0; t < C::kRun; ++t) {
            Row value;
            load_row(stage.value[t], value);
            advance(stage, t, value);
        }
    }

    LSM_DEVICE void keep_start(int run) {
        if (run == 0) return;
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e) {
            shared.start[run - 1][e][tid] = S[e / C::kColumns][e % C::kColumns];
        }
    }

    LSM_DEVICE void recall_start(int run) {
        if (run == 0) return load_state(S, p.start);
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e) {
            S[e / C::kColumns][e % C::kColumns] = shared.start[run - 1][e][tid];
        }
    }

    LSM_DEVICE void put(typename Storage::Scalars& to, float (&sums)[C::kSums]) {
        scatter_sums<C::kLanes / 2, 1, C::kSums>(sums, lane);
        if (lane % C::kLanesPerSum != 0) return;
        LSM_UNROLL
        for (int i = 0; i < C::kOwnSums; ++i) {
            int const own = lane * C::kSums / C::kLanes + i;
            to[row + own / C::kRun][own % C::kRun] = sums[i];
        }
    }

    // Forwards through a run, keeping the state before every token, and back.
    LSM_DEVICE void differentiate(Stage& stage) {
        State before[C::kRun];
        float dq[C::kSums];
        LSM_UNROLL
        for (int t = 0; t < C::kRun; ++t) {
            Row value, grad_out;
            load_row(stage.value[t], value);
            load_row(stage.grad_out[t], grad_out);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) before[t][r][j] = S[r][j];
            }
            advance(stage, t, value);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                float dot = 0.f;
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) dot += S[r][j] * grad_out[j];
                dq[r * C::kRun + t] = p.scale * dot;
            }
        }
        put(stage.dq, dq);

        float dk[C::kSums], dg[C::kSums];
        LSM_UNROLL
        for (int t = C::kRun - 1; t >= 0; --t) {
            Row value, grad_out;
            load_row(stage.value[t], value);
            load_row(stage.grad_out[t], grad_out);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                float const query = stage.q[row + r][t], decay = stage.decay[row + r][t];
                float with_value = 0.f, with_state = 0.f;
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) {
                    dS[r][j] += query * grad_out[j];
                    with_value += dS[r][j] * value[j];
                    with_state += dS[r][j] * before[t][r][j];
                    dS[r][j] *= decay;
                }
                dk[r * C::kRun + t] = with_value;
                dg[r * C::kRun + t] = decay * with_state;
            }
        }
        put(stage.dk, dk);
        put(stage.dg, dg);
    }

    LSM_DEVICE void store_run(Stage& stage, int run) {
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const r = scalar_row(i), n = scalar_token(i);
            i64 const t = segment.t0 + i64(run) * C::kRun + n;
            if (n >= C::kRun || first_row() + r >= p.K || t >= segment.t1) continue;
            store(t, first_row() + r, stage.dq[r][n], stage.dk[r][n], stage.dg[r][n]);
        }
    }

    LSM_DEVICE void store(i64 t, int c, float dq, float dk, float dg) {
        using Gate = typename Decay::Raw;
        store_global(row_at<T>(p.dq, segment.batch, t, work.head) + c, static_cast<T>(dq));
        store_global(row_at<T>(p.dk, segment.batch, t, work.head) + c, static_cast<T>(dk));
        store_global(row_at<Gate>(p.dg, segment.batch, t, work.head) + c, static_cast<Gate>(dg));
    }

    // Runs 0 .. runs - 2 forwards, then all of them backwards: 2 · runs - 1 visits of one pipeline.
    LSM_DEVICE void walk_segment() {
        auto run_of = [&](int visit) { return visit < runs ? visit : 2 * (runs - 1) - visit; };
        int const visits = 2 * runs - 1;
        if (visits > 0) start_run(shared.stage[0], 0, runs == 1);
        for (int visit = 0; visit < visits; ++visit) {
            Stage& stage = shared.stage[visit % 2];
            Stage& other = shared.stage[1 - visit % 2];
            int const run = run_of(visit);
            store_scalars(stage);
            cp_async_wait<0>();
            __syncthreads();  // this run has arrived, and nobody computes with the other any more
            if (visit >= runs) store_run(other, run_of(visit - 1));
            if (visit + 1 < visits) start_run(other, run_of(visit + 1), visit + 1 >= runs - 1);
            if (visit < runs - 1) {
                keep_start(run);
                walk_forwards(stage);
            } else {
                if (visit >= runs) recall_start(run);
                differentiate(stage);
            }
        }
        __syncthreads();
        if (visits > 0) store_run(shared.stage[(visits - 1) % 2], 0);
    }

    LSM_DEVICE void poison() {
        for (i64 i = tid; i < steps * C::kTileRows; i += C::kThreads) {
            int const c = first_row() + static_cast<int>(i % C::kTileRows);
            i64 const t = segment.t0 + i / C::kTileRows;
            if (c < p.K) store(t, c, nan_value(), nan_value(), nan_value());
        }
    }
};

template <class T, int V, class Decay>
__global__ void __launch_bounds__(RowConfig<V>::kThreads, 2)
    row_gradients(RowParams const p, Decay const gate, Segments const segments, int tiles) {
    Work const work(p.HV, p.heads_per_group, tiles);
    Segment const segment = segments[work.record];
    if (segment.t0 == segment.t1) return;
    RowGradients<T, V, Decay> s(p, gate, segment, work);
    if (segment.poison) return s.poison();
    s.load_state(s.S, p.start);
    s.load_state(s.dS, p.end);
    s.walk_segment();
}

template <class T, int V, class Decay>
void run_row_gradients(RowParams const& p, Decay const& gate, Segments const& segments,
                       void* stream) {
    i64 const tiles = (p.K + RowConfig<V>::kTileRows - 1) / RowConfig<V>::kTileRows;
    launch(row_gradients<T, V, Decay>, dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
           dim3(RowConfig<V>::kThreads), sizeof(RowStorage<T, V>), stream, p, gate, segments,
           static_cast<int>(tiles));
}

}  // namespace lsm::recurrence
