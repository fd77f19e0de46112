// Gradients that belong to a row of the state: those of q, of the keys and of the gate. They need a
// sum over all of V and one row only, and once the sweeps have left what every micro-step wrote, u,
// and its gradient, rows have nothing more to do with one another: with G the gradient that reaches
// S_t from itself on, u = beta d and r' = -beta d' (dplr: d and d') of the two sweeps,
//
//     S_t = A S_{t-1} + add u^T + plain v^T            G_{t-1} = A (G_t + ...) as in the sweep
//     dq = scale S_t dO    dadd = G_t u    dplain = G_t v    ddot = S_{t-1} r'    da = S_{t-1} · G_t
//
//                    dot      add     plain   dk                 dg                   derase   dwrite
//     householder    A k      k       -       dadd + A ddot      A da + A k ddot
//     comba          erase    k       -       dadd               A da                 ddot
//     dplr           erase    write   k       dplain             A da                 ddot     dadd
//
// dg is taken from S and G of the same token, never from differences of long sums: it is as accurate
// for a gate of -80 or -inf as for 0. Walking backwards therefore needs every S again, and dividing
// by the decay would not give it back. A block owns a few rows [row tile, V] of one value head and
// one segment: it walks forwards first, leaving the state before every short run of micro-steps in
// shared memory; then each run, from the last to the first, is walked forwards once more with all its
// states kept in registers, and backwards.
#pragma once

#include "kernels/delta/exact/common.cuh"
#include "kernels/delta/exact/plan.h"
#include "kernels/dispatch.h"

namespace lsm::delta::exact {

// V: smallest supported number of columns that holds the actual one.
template <int V>
struct RowConfig {
    static constexpr int kThreads = 128;
    static constexpr int kLanes = V / 4 < 32 ? V / 4 : 32;  // threads along V
    static constexpr int kColumns = V / kLanes;             // per thread, in pieces of 4
    static constexpr int kRows = 8 / kColumns;              // per thread
    static constexpr int kTileRows = kThreads / kLanes * kRows;

    static constexpr int kRun = 8;  // micro-steps whose states are held in registers
    // Starts kept in shared memory: not the first, which is the segment's, nor the last, which is
    // at hand when the walk turns.
    static constexpr int kStarts = kSegment / kRun - 2;
    static constexpr int kPitch = kRun + 4;  // floats; spreads the rows over the banks
    static constexpr int kPieces = kRun * V / 4 / kThreads;  // of 4 columns, per thread and run

    // Dot products over V, as each thread has a share of them, and as it ends with whole ones.
    static constexpr int kSums = kRows * kRun;
    static constexpr int kOwnSums = kSums > kLanes ? kSums / kLanes : 1;
    static constexpr int kLanesPerSum = kLanes > kSums ? kLanes / kSums : 1;
    static_assert(V % 64 == 0 && V <= 256 && kTileRows * kRun <= kThreads);
};

template <class T, int V>
struct RowStorage {
    using C = RowConfig<V>;
    using Scalars = float[C::kTileRows][C::kPitch];
    float start[C::kStarts][8][C::kThreads];  // every thread reads its own
    struct Stage {
        alignas(16) float u[C::kRun][V], r[C::kRun][V];
        alignas(16) T value[C::kRun][V], grad_out[C::kRun][V];
        alignas(16) Scalars query, dot, add, plain, decay;
        Scalars grad_query, grad_dot, grad_add, grad_plain, grad_decay;
    } stage[2];
};

template <class T>
struct RowParams {
    Transition transition;
    Rows q, k, v, erase, write, grad_o;
    Rows written, grad_written;  // d of the sweeps, fp32
    Rows dq, dk, derase, dwrite, dg;
    bool fp32_key_grads;  // dq to dwrite are fp32, else T
    GateLoader<T> gates, betas;
    bool beta_per_channel;
    // Where all rows share a gate: what each tile of rows has in its gradient, [tiles, B, T, HV].
    float* gate_shares;
    i64 gate_share_size;         // B T HV, of all windows
    float const *starts, *ends;  // of segments, [records, HV, K, V]: S before, G after
    int heads_per_group, HV, K, V, per_token;
    float scale;
};

template <class T, int V, bool Plain>
struct RowGradients {
    using Raw = typename GateLoader<T>::Raw;
    using C = RowConfig<V>;
    using Storage = RowStorage<T, V>;
    using Stage = typename Storage::Stage;
    using State = float[C::kRows][C::kColumns];
    using Row = float[C::kColumns];
    static constexpr bool kPlain = Plain;

    RowParams<T> const& p;
    Segment const segment;
    Work const work;
    Steps const steps;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % C::kLanes;  // lane: along V
    int const row = tid / C::kLanes * C::kRows;           // first of this thread in the tile
    // The row and the micro-step of a run whose scalars this thread loads and stores.
    int const scalar_row = tid % C::kTileRows, scalar_step = tid / C::kTileRows;
    int const runs = (steps.count + C::kRun - 1) / C::kRun;
    State S, G;
    T raw_query, raw_key, raw_erase, raw_write;
    Raw raw_gate, raw_beta[C::kPieces][4];

    LSM_DEVICE RowGradients(RowParams<T> const& p, Segment const& segment, Work const& work)
        : p(p), segment(segment), work(work), steps(segment.t0, segment.t1, p.per_token, false) {}

    LSM_DEVICE int first_row() const { return work.tile * C::kTileRows; }
    LSM_DEVICE int column(int j) const { return (j / 4 * C::kLanes + lane) * 4 + j % 4; }

    LSM_DEVICE void load_state(State& state, float const* boundaries) const {
        float const* const from = boundaries + (work.record * p.HV + work.head) * p.K * p.V;
        LSM_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
            int const c = first_row() + row + r;
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; j += 4) {
                bool const inside = c < p.K && column(j) < p.V;
                float4 const x =
                    inside
                        ? load_global(reinterpret_cast<float4 const*>(from + c * p.V + column(j)))
                        : float4{0.f, 0.f, 0.f, 0.f};
                state[r][j] = x.x, state[r][j + 1] = x.y;
                state[r][j + 2] = x.z, state[r][j + 3] = x.w;
            }
        }
    }

    LSM_DEVICE bool inside(int run) const {
        return scalar_step < C::kRun && first_row() + scalar_row < p.K &&
               run * C::kRun + scalar_step < steps.count;
    }

    LSM_DEVICE void start_run(Stage& stage, int run, bool to_differentiate) {
        int const step = run * C::kRun;
        auto copy = [&]<class E>(E(&tile)[C::kRun][V], Rows const& x, bool of_token) {
            copy_rows<C::kThreads>(tile, p.V, [&](int i) -> E const* {
                int const s = step + i;
                if (s >= steps.count || (of_token && !steps.reads(s))) return nullptr;
                i64 const time = of_token ? steps.token(s) : steps.at(s);
                return row_at<E const>(x, segment.batch, time, work.head);
            });
        };
        copy(stage.u, p.written, false);
        if (kPlain) copy(stage.value, p.v, false);
        if (to_differentiate) {
            copy(stage.r, p.grad_written, false);
            copy(stage.grad_out, p.grad_o, true);
        }
        cp_async_commit();

        bool const inside = this->inside(run);
        i64 const m = steps.at(step + scalar_step), t = steps.token(step + scalar_step);
        auto load = [&](Rows const& x, i64 time, bool wanted) {
            if (!inside || !wanted || x.data == nullptr) return static_cast<T>(0.f);
            T const* const from = row_at<T const>(x, segment.batch, time, work.row_head);
            return load_global(from + first_row() + scalar_row);
        };
        raw_query = load(p.q, t, to_differentiate && steps.reads(step + scalar_step));
        raw_key = load(p.k, m, true);
        raw_erase = load(p.erase, m, to_differentiate);
        raw_write = load(p.write, m, true);
        raw_gate =
            inside && steps.decays(step + scalar_step)
                ? p.gates.load(p.gates.at(segment.batch, t, work.head, first_row() + scalar_row))
                : GateLoader<T>::kIdentity;
        LSM_UNROLL
        for (int i = 0; i < C::kPieces; ++i) {
            int const s = step + piece_step(i);
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                bool const wanted =
                    (j == 0 || p.beta_per_channel) && s < steps.count && piece_column(i) < p.V;
                raw_beta[i][j] = wanted ? p.betas.load(p.betas.at(segment.batch, steps.at(s),
                                                                  work.head, piece_column(i) + j))
                                        : GateLoader<T>::kIdentity;
            }
        }
    }

    // The pieces of u and r that this thread copies.
    LSM_DEVICE int piece_step(int i) const { return (tid + i * C::kThreads) / (V / 4); }
    LSM_DEVICE int piece_column(int i) const { return (tid + i * C::kThreads) % (V / 4) * 4; }

    LSM_DEVICE void store_scalars(Stage& stage) {
        if (scalar_step >= C::kRun) return;
        auto const put = [&](auto& to, float x) { to[scalar_row][scalar_step] = x; };
        float const key = static_cast<float>(raw_key), decay = p.gates.factor(raw_gate);
        bool const householder = p.transition == Transition::householder;
        put(stage.query, p.scale * static_cast<float>(raw_query));
        put(stage.dot, householder ? decay * key : static_cast<float>(raw_erase));
        put(stage.add, kPlain ? static_cast<float>(raw_write) : key);
        if (kPlain) put(stage.plain, key);
        put(stage.decay, decay);
    }

    // Of the sweeps' d, by the thread that copied it.
    LSM_DEVICE void multiply_betas(Stage& stage, bool to_differentiate) {
        if (p.betas.g.data == nullptr) return;
        LSM_UNROLL
        for (int i = 0; i < C::kPieces; ++i) {
            auto multiply = [&](float* at, float sign) {
                float x[4];
                load4(at, x);
                LSM_UNROLL
                for (int j = 0; j < 4; ++j)
                    x[j] *= sign * p.betas.value(raw_beta[i][p.beta_per_channel ? j : 0]);
                *reinterpret_cast<float4*>(at) = float4{x[0], x[1], x[2], x[3]};
            };
            multiply(&stage.u[piece_step(i)][piece_column(i)], 1.f);
            if (to_differentiate) multiply(&stage.r[piece_step(i)][piece_column(i)], -1.f);
        }
    }

    template <class E>
    LSM_DEVICE void load_row(E const (&tile)[V], Row& x) const {
        LSM_UNROLL
        for (int j = 0; j < C::kColumns; j += 4) {
            float piece[4];
            load4(&tile[column(j)], piece);
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) x[j + i] = piece[i];
        }
    }

    LSM_DEVICE static float dot(Row const& x, Row const& y) {
        float sum = 0.f;
        LSM_UNROLL
        for (int j = 0; j < C::kColumns; ++j) sum += x[j] * y[j];
        return sum;
    }

    LSM_DEVICE void advance(Stage& stage, int t, Row const& u, Row const& value) {
        LSM_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
            float const decay = stage.decay[row + r][t], add = stage.add[row + r][t];
            float const plain = kPlain ? stage.plain[row + r][t] : 0.f;
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j) {
                S[r][j] = decay * S[r][j] + add * u[j];
                if (kPlain) S[r][j] += plain * value[j];
            }
        }
    }

    LSM_DEVICE void walk_forwards(Stage& stage) {
        LSM_UNROLL_BY(4)
        for (int t = 0; t < C::kRun; ++t) {
            Row u, value;
            load_row(stage.u[t], u);
            if (kPlain) load_row(stage.value[t], value);
            advance(stage, t, u, value);
        }
    }

    LSM_DEVICE void keep_start(int run) {
        if (run == 0) return;
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e)
            shared.start[run - 1][e][tid] = S[e / C::kColumns][e % C::kColumns];
    }

    LSM_DEVICE void recall_start(int run) {
        if (run == 0) return load_state(S, p.starts);
        LSM_UNROLL
        for (int e = 0; e < C::kRows * C::kColumns; ++e)
            S[e / C::kColumns][e % C::kColumns] = shared.start[run - 1][e][tid];
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

    // Forwards through a run, keeping the state before every micro-step, and back.
    LSM_DEVICE void differentiate(Stage& stage) {
        State before[C::kRun];
        {
            float query[C::kSums], erase[C::kSums];
            LSM_UNROLL
            for (int t = 0; t < C::kRun; ++t) {
                Row u, value, other;
                load_row(stage.u[t], u);
                if (kPlain) load_row(stage.value[t], value);
                load_row(stage.r[t], other);
                LSM_UNROLL
                for (int r = 0; r < C::kRows; ++r) {
                    erase[r * C::kRun + t] = dot(S[r], other);
                    LSM_UNROLL
                    for (int j = 0; j < C::kColumns; ++j) before[t][r][j] = S[r][j];
                }
                advance(stage, t, u, value);
                load_row(stage.grad_out[t], other);
                LSM_UNROLL
                for (int r = 0; r < C::kRows; ++r) query[r * C::kRun + t] = dot(S[r], other);
            }
            put(stage.grad_query, query);
            put(stage.grad_dot, erase);
        }
        float add[C::kSums], plain[C::kSums], decays[C::kSums];
        LSM_UNROLL
        for (int t = C::kRun - 1; t >= 0; --t) {
            Row grad_out, u, value, other;
            load_row(stage.grad_out[t], grad_out);
            load_row(stage.u[t], u);
            if (kPlain) load_row(stage.value[t], value);
            load_row(stage.r[t], other);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                int const at = r * C::kRun + t;
                float const query = stage.query[row + r][t], decay = stage.decay[row + r][t],
                            key = stage.dot[row + r][t];
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) G[r][j] += query * grad_out[j];
                add[at] = dot(G[r], u);
                if (kPlain) plain[at] = dot(G[r], value);
                decays[at] = dot(G[r], before[t][r]);
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) G[r][j] = decay * G[r][j] + key * other[j];
            }
        }
        put(stage.grad_add, add);
        if (kPlain) put(stage.grad_plain, plain);
        put(stage.grad_decay, decays);
    }

    LSM_DEVICE void store_run(Stage& stage, int run) {
        static_assert(C::kTileRows * C::kRun % 32 == 0, "whole warps add up a token's rows");
        if (scalar_step >= C::kRun) return;
        auto const get = [&](auto& from) { return from[scalar_row][scalar_step]; };
        float const decay = get(stage.decay), dot = get(stage.grad_dot), add = get(stage.grad_add);
        float dk = add, dg = decay * get(stage.grad_decay);
        if (kPlain) dk = get(stage.grad_plain);
        if (p.transition == Transition::householder) {
            dk += decay * dot;
            dg += get(stage.dot) * dot;
        }
        store(run * C::kRun + scalar_step, inside(run), p.scale * get(stage.grad_query), dk, dot,
              add, dg);
    }

    LSM_DEVICE void store_key_grad(Rows const& x, i64 time, float value) const {
        if (x.data == nullptr) return;
        int const c = first_row() + scalar_row;
        if (p.fp32_key_grads) {
            store_global(row_at<float>(x, segment.batch, time, work.head) + c, value);
        } else {
            store_global(row_at<T>(x, segment.batch, time, work.head) + c, static_cast<T>(value));
        }
    }

    // By all threads of a warp.
    LSM_DEVICE void store(int step, bool inside, float dq, float dk, float derase, float dwrite,
                          float dg) {
        i64 const m = steps.at(step), t = steps.token(step);
        i64 const gate = segment.batch * p.dg.batch + t * p.dg.time + work.head * p.dg.head;
        if (p.gate_shares != nullptr) {
            float sum = inside ? dg : 0.f;
            LSM_UNROLL
            for (int distance = C::kTileRows / 2; distance > 0; distance /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            if (inside && scalar_row == 0 && steps.decays(step))
                store_global(p.gate_shares + work.tile * p.gate_share_size + gate, sum);
        }
        if (!inside) return;
        if (steps.reads(step)) store_key_grad(p.dq, t, dq);
        store_key_grad(p.dk, m, dk);
        store_key_grad(p.derase, m, derase);
        store_key_grad(p.dwrite, m, dwrite);
        if (p.dg.data != nullptr && p.gate_shares == nullptr && steps.decays(step))
            p.gates.store(p.dg.data, gate + first_row() + scalar_row, dg);
    }

    // Runs 0 .. runs - 2 forwards, then all of them backwards: 2 · runs - 1 visits of one pipeline.
    LSM_DEVICE void walk() {
        auto run_of = [&](int visit) { return visit < runs ? visit : 2 * (runs - 1) - visit; };
        int const visits = 2 * runs - 1;
        if (visits > 0) start_run(shared.stage[0], 0, runs == 1);
        LSM_UNROLL_BY(1)
        for (int visit = 0; visit < visits; ++visit) {
            Stage& stage = shared.stage[visit % 2];
            Stage& other = shared.stage[1 - visit % 2];
            int const run = run_of(visit);
            store_scalars(stage);
            cp_async_wait<0>();
            multiply_betas(stage, visit >= runs - 1);
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
        float const nan = nan_value();
        for (int run = 0; scalar_step < C::kRun && run < runs; ++run)
            store(run * C::kRun + scalar_step, inside(run), nan, nan, nan, nan, nan);
    }
};

template <class T, int V, bool Plain>
__global__ void __launch_bounds__(RowConfig<V>::kThreads, 2)
    row_gradients(RowParams<T> const p, Segments const segments, int tiles) {
    Work const work(p.HV, {p.heads_per_group, 1}, tiles);
    Segment const segment = segments[work.record];
    if (segment.t0 == segment.t1) return;
    RowGradients<T, V, Plain> s(p, segment, work);
    if (segment.poison) return s.poison();
    s.load_state(s.S, p.starts);
    s.load_state(s.G, p.ends);
    s.walk();
}

inline i64 row_tiles(i64 K, i64 V) {
    i64 tile = 0;
    dispatch(Buckets<64, 128, 256>{}, V, [&](auto bucket) { tile = RowConfig<bucket>::kTileRows; });
    return (K + tile - 1) / tile;
}

template <class T>
void run_row_gradients(RowParams<T> const& p, Segments const& segments, void* stream) {
    i64 const tiles = row_tiles(p.K, p.V);
    dispatch(Buckets<64, 128, 256>{}, p.V, [&](auto V) {
        auto const run = [&](auto* kernel) {
            launch(kernel, dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
                   dim3(RowConfig<V>::kThreads), sizeof(RowStorage<T, V>), stream, p, segments,
                   static_cast<int>(tiles));
        };
        p.transition == Transition::dplr ? run(row_gradients<T, V, true>)
                                         : run(row_gradients<T, V, false>);
    });
}

// dbeta = d · d', a sum over V or, with a beta per channel, the products. A warp per micro-step and
// value head.
template <class T>
struct BetaParams {
    float const *written, *grad_written;  // [rows, V]
    GateLoader<T> betas;
    Rows dbeta;
    i64 rows, batch;  // rows of one row of the batch
    int HV, V;
    bool per_channel;
};

template <class T>
__global__ void __launch_bounds__(256) beta_gradient(BetaParams<T> const p) {
    i64 const row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    int const lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    i64 const m = row % p.batch / p.HV;
    i64 const to = row / p.batch * p.dbeta.batch + m * p.dbeta.time + row % p.HV * p.dbeta.head;
    float sum = 0.f;
    for (int v = lane * 4; v < p.V; v += 128) {
        i64 const at = row * p.V + v;
        float4 const x = load_global(reinterpret_cast<float4 const*>(p.written + at));
        float4 const y = load_global(reinterpret_cast<float4 const*>(p.grad_written + at));
        float const products[4] = {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) {
            sum += products[j];
            if (p.per_channel) p.betas.store(p.dbeta.data, to + v + j, products[j]);
        }
    }
    if (p.per_channel) return;
    LSM_UNROLL
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) p.betas.store(p.dbeta.data, to, sum);
}

template <class T>
void run_beta_gradient(BetaParams<T> const& p, void* stream) {
    if (p.dbeta.data == nullptr || p.rows == 0) return;
    launch(beta_gradient<T>, dim3(static_cast<unsigned>((p.rows + 7) / 8)), dim3(256), 0, stream,
           p);
}

}  // namespace lsm::delta::exact
