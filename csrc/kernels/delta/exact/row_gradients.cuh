// Gradients that belong to a row of the state: those of q, of the keys and of the gate. Once the
// sweeps have left what every micro-step wrote, u, and its gradient, rows have nothing more to do
// with one another, and the walk of row_walk.cuh is theirs: with G the gradient that reaches
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
// for a gate of -80 or -inf as for 0.
#pragma once

#include "kernels/delta/exact/common.cuh"
#include "kernels/delta/exact/plan.h"
#include "kernels/dispatch.h"
#include "kernels/recurrence/row_walk.cuh"

namespace lsm::delta::exact {

using recurrence::row_tiles;

template <int V>
struct RowConfig : recurrence::RowTile<V, 8, kSegment> {
    using C = RowConfig;
    static constexpr int kPieces = C::kRun * V / 4 / C::kThreads;  // of 4 columns, per thread, run
    static_assert(C::kTileRows * C::kRun <= C::kThreads);
};

template <class T, int V>
struct RowStorage {
    using C = RowConfig<V>;
    using Scalars = typename C::Scalars;
    typename C::Starts start;
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
struct RowGradients
    : recurrence::RowWalk<RowGradients<T, V, Plain>, RowConfig<V>, RowStorage<T, V>> {
    using Raw = typename GateLoader<T>::Raw;
    using C = RowConfig<V>;
    using Stage = typename RowStorage<T, V>::Stage;
    using Base = recurrence::RowWalk<RowGradients, C, RowStorage<T, V>>;
    using Base::column, Base::load_row, Base::put, Base::row, Base::tid, Base::S, Base::G;
    using typename Base::Row;
    static constexpr bool kPlain = Plain;

    RowParams<T> const& p;
    Segment const segment;
    Work const work;
    Steps const steps;
    // The row and the micro-step of a run whose scalars this thread loads and stores.
    int const scalar_row = tid % C::kTileRows, scalar_step = tid / C::kTileRows;
    T raw_query, raw_key, raw_erase, raw_write;
    Raw raw_gate, raw_beta[C::kPieces][4];

    LSM_DEVICE RowGradients(RowParams<T> const& p, Segment const& segment, Work const& work)
        : p(p), segment(segment), work(work), steps(segment.t0, segment.t1, p.per_token, false) {}

    LSM_DEVICE int first_row() const { return work.tile * C::kTileRows; }

    LSM_DEVICE void load_start() { load_state(S, p.starts); }
    LSM_DEVICE void load_end() { load_state(G, p.ends); }

    LSM_DEVICE void load_state(typename C::State& state, float const* boundaries) const {
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

    LSM_DEVICE void finish_run(Stage& stage, int, bool to_differentiate) {
        store_scalars(stage);
        cp_async_wait<0>();
        multiply_betas(stage, to_differentiate);
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

    // Forwards through a run, keeping the state before every micro-step, and back.
    LSM_DEVICE void differentiate(Stage& stage) {
        typename C::State before[C::kRun];
        {
            typename C::Sums query, erase;
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
        typename C::Sums add, plain, decays;
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
            float const sum = Base::sum_rows(inside ? dg : 0.f);
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

    LSM_DEVICE void poison() {
        float const nan = nan_value();
        for (int run = 0; scalar_step < C::kRun && run < Base::runs(steps.count); ++run)
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
    s.load_start();
    s.load_end();
    s.walk(s.runs(s.steps.count));
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
