// Gradients that belong to a row of the state: dq, dk and the gate's, by the walk of row_walk.cuh.
// With G_t the gradient that reaches S_t from tokens after t, and dots by row,
//
//     x_t = S_{t-1} dO_t     y_t = G_t v_t     z_t = S_{t-1} · G_t     own_t = v_t · dO_t
//
// every one of them is (scale in q; dq times scale besides)
//
//                            dq               dk               dg               G_{t-1}
//     reading after write    a x + k own      y + q own        a (z + q x)      a (G + q dO^T)
//     before decay, write    x                y                a z              a G + q dO^T
//
// dg is taken from S_{t-1} and G_t of the same token, never from differences of long sums: it is
// as accurate for a gate of -80 or -inf as for 0. What a segment starts from, on either side, comes
// from joined boundary states.
//
// Where columns decay too, by b_t, it stands beside the row's a in every product with a state, and
// dO is read through it: S_{t-1} b dO, S_{t-1} b · G, b (G + q dO^T).
#pragma once

#include "kernels/policy/decay.cuh"
#include "kernels/recurrence/plan.h"
#include "kernels/recurrence/row_walk.cuh"

namespace lsm::recurrence {

constexpr int row_segment(DecayOn on) {
    return on == DecayOn::both ? kRowSegmentOfBoth : kRowSegment;
}

constexpr int row_run(int V, DecayOn on) {
    return V > 128 || on == DecayOn::both ? 8 : 16;
}

template <int V, DecayOn on>
struct RowConfig : RowTile<V, row_run(V, on), row_segment(on)> {
    static constexpr bool kByColumn = on == DecayOn::both;
    // Numbers per row and token: q, k, the gate, as each thread loads them.
    static constexpr int kScalars =
        (RowConfig::kTileRows * RowConfig::kRun + RowConfig::kThreads - 1) / RowConfig::kThreads;
};

template <class T, int V, DecayOn on>
struct RowStorage {
    using C = RowConfig<V, on>;
    typename C::Starts start;
    struct Stage {
        alignas(16) T value[C::kRun][V], grad_out[C::kRun][V];
        alignas(16) float column_decay[C::kByColumn ? C::kRun : 1][C::kByColumn ? V : 4];
        alignas(16) typename C::Scalars q, k, decay, x, y, z;
        float own[C::kRun];
    } stage[2];
};

template <class T>
struct RowParams {
    Rows q, k, v, grad_o;
    Rows dq, dk;  // null if not wanted
    Rows dg;      // of gates of rows; null if not wanted
    BySide<GateLoader<T>> gates;
    // Where all rows share a gate: what each tile of rows has in its gradient, [tiles, B, T, HV].
    float* gate_shares;
    i64 gate_share_size;  // B T HV
    States start, end;    // the state before the segment; its gradient after the segment
    Groups groups;
    int HV, K, V;
    bool exclusive;
    float scale;
};

template <class T, int V, DecayOn on>
struct RowGradients : RowWalk<RowGradients<T, V, on>, RowConfig<V, on>, RowStorage<T, V, on>> {
    using Gates = GateLoader<T>;
    using C = RowConfig<V, on>;
    using Stage = typename RowStorage<T, V, on>::Stage;
    using Base = RowWalk<RowGradients, C, RowStorage<T, V, on>>;
    using Base::column, Base::load_row, Base::put, Base::row, Base::tid, Base::S, Base::G;
    using typename Base::Row;

    RowParams<T> const& p;
    Segment const segment;
    Work const work;
    Walk const tokens;
    T raw_q[C::kScalars], raw_k[C::kScalars];
    typename Gates::Raw raw_gate[C::kScalars];

    LSM_DEVICE RowGradients(RowParams<T> const& p, Segment const& segment, Work const& work)
        : p(p), segment(segment), work(work), tokens(segment, false) {}

    LSM_DEVICE int first_row() const { return work.tile * C::kTileRows; }

    LSM_DEVICE void load_start() { load_state(S, p.start); }
    LSM_DEVICE void load_end() { load_state(G, p.end); }

    // States from outside are contiguous, but may start on any float.
    LSM_DEVICE void load_state(typename C::State& state, States const& from) {
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
                state[r][j] = inside ? load_global(data + c * from.row + v * from.column) : 0.f;
            }
        }
    }

    // The i-th of this thread's scalars: neighbouring threads take neighbouring rows of one token.
    LSM_DEVICE int scalar_row(int i) const { return (tid + i * C::kThreads) % C::kTileRows; }
    LSM_DEVICE int scalar_token(int i) const { return (tid + i * C::kThreads) / C::kTileRows; }

    LSM_DEVICE void start_run(Stage& stage, int run, bool with_queries) {
        int const step = run * C::kRun;
        auto copy = [&](auto& tile, Rows const& x) {
            T const* const from =
                row_at<T const>(x, segment.batch, tokens.token(step), work.column_head);
            copy_rows<C::kThreads>(tile, from, x.time, tokens, step, p.V);
        };
        copy(stage.value, p.v);
        if (with_queries) copy(stage.grad_out, p.grad_o);
        cp_async_commit();
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const c = first_row() + scalar_row(i);
            i64 const t = tokens.token(step + scalar_token(i));
            bool const inside =
                scalar_token(i) < C::kRun && c < p.K && tokens.has(step + scalar_token(i));
            auto load = [&](Rows const& x, bool wanted) {
                if (!wanted) return static_cast<T>(0.f);
                return load_global(row_at<T const>(x, segment.batch, t, work.row_head) + c);
            };
            raw_q[i] = load(p.q, inside && with_queries);
            raw_k[i] = load(p.k, inside);
            Gates const& gates = p.gates.rows;
            raw_gate[i] =
                inside ? gates.load(gates.at(segment.batch, t, work.head, c)) : Gates::kIdentity;
        }
    }

    LSM_DEVICE void store_scalars(Stage& stage) {
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const r = scalar_row(i), t = scalar_token(i);
            if (t >= C::kRun) continue;
            stage.q[r][t] = p.scale * static_cast<float>(raw_q[i]);
            stage.k[r][t] = static_cast<float>(raw_k[i]);
            stage.decay[r][t] = p.gates.rows.factor(raw_gate[i]);
        }
    }

    LSM_DEVICE void finish_run(Stage& stage, int run, bool) {
        store_scalars(stage);
        if constexpr (C::kByColumn) load_column_decays(stage, run);
        cp_async_wait<0>();
    }

    // Of columns there are too many to keep them in registers while they arrive.
    LSM_DEVICE void load_column_decays(Stage& stage, int run) {
        Gates const& gates = p.gates.columns;
        LSM_UNROLL_BY(4)
        for (int i = tid; i < C::kRun * V; i += C::kThreads) {
            int const n = i / V, c = i % V, step = run * C::kRun + n;
            bool const inside = c < p.V && tokens.has(step);
            i64 const at = gates.at(segment.batch, tokens.token(step), work.head, c);
            stage.column_decay[n][c] = gates.factor(inside ? gates.load(at) : Gates::kIdentity);
        }
    }

    // Decays of columns, 1 where they do not decay.
    LSM_DEVICE void load_column_decay(Stage& stage, int t, Row& b) const {
        if constexpr (C::kByColumn) {
            load_row(stage.column_decay[t], b);
        } else {
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j) b[j] = 1.f;
        }
    }

    LSM_DEVICE void advance(Stage& stage, int t, Row const& value, Row const& b) {
        LSM_UNROLL
        for (int r = 0; r < C::kRows; ++r) {
            float const decay = stage.decay[row + r][t], key = stage.k[row + r][t];
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j)
                S[r][j] = decay * (b[j] * S[r][j]) + key * value[j];
        }
    }

    LSM_DEVICE void walk_forwards(Stage& stage) {
        LSM_UNROLL_BY(4)
        for (int t = 0; t < C::kRun; ++t) {
            Row value, b;
            load_row(stage.value[t], value);
            load_column_decay(stage, t, b);
            advance(stage, t, value, b);
        }
    }

    // v · dO of every token of a run, by kShare neighbouring threads each.
    LSM_DEVICE void multiply_own(Stage& stage) {
        constexpr int kShare = C::kThreads / C::kRun;
        static_assert(kShare <= 32);
        int const t = tid / kShare;
        float sum = 0.f;
        for (int c = tid % kShare * 4; c < V; c += kShare * 4) {
            float value[4], grad_out[4];
            load4(&stage.value[t][c], value);
            load4(&stage.grad_out[t][c], grad_out);
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) sum += value[j] * grad_out[j];
        }
        LSM_UNROLL
        for (int distance = kShare / 2; distance > 0; distance /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (tid % kShare == 0) stage.own[t] = sum;
    }

    // What a token reads after its own decay has passed the columns' too.
    LSM_DEVICE void read_through(Row const& b, Row& grad_out) const {
        if constexpr (C::kByColumn) {
            LSM_UNROLL
            for (int j = 0; j < C::kColumns; ++j) grad_out[j] *= p.exclusive ? 1.f : b[j];
        }
    }

    // Forwards through a run, keeping the state before every token, and back.
    LSM_DEVICE void differentiate(Stage& stage) {
        multiply_own(stage);
        typename C::State before[C::kRun];
        typename C::Sums x;
        LSM_UNROLL
        for (int t = 0; t < C::kRun; ++t) {
            Row value, grad_out, b;
            load_row(stage.value[t], value);
            load_row(stage.grad_out[t], grad_out);
            load_column_decay(stage, t, b);
            read_through(b, grad_out);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                float dot = 0.f;
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) {
                    before[t][r][j] = S[r][j];
                    dot += S[r][j] * grad_out[j];
                }
                x[r * C::kRun + t] = dot;
            }
            advance(stage, t, value, b);
        }
        put(stage.x, x);

        typename C::Sums y, z;
        LSM_UNROLL
        for (int t = C::kRun - 1; t >= 0; --t) {
            Row value, grad_out, b;
            load_row(stage.value[t], value);
            load_row(stage.grad_out[t], grad_out);
            load_column_decay(stage, t, b);
            read_through(b, grad_out);
            LSM_UNROLL
            for (int r = 0; r < C::kRows; ++r) {
                float const decay = stage.decay[row + r][t];
                float const query = stage.q[row + r][t] * (p.exclusive ? 1.f : decay);
                float with_value = 0.f, with_state = 0.f;
                LSM_UNROLL
                for (int j = 0; j < C::kColumns; ++j) {
                    with_value += G[r][j] * value[j];
                    float const decayed = b[j] * G[r][j];
                    with_state += decayed * before[t][r][j];
                    G[r][j] = decay * decayed + query * grad_out[j];
                }
                y[r * C::kRun + t] = with_value;
                z[r * C::kRun + t] = with_state;
            }
        }
        put(stage.y, y);
        put(stage.z, z);
    }

    LSM_DEVICE void store_run(Stage& stage, int run) {
        LSM_UNROLL
        for (int i = 0; i < C::kScalars; ++i) {
            int const r = scalar_row(i), n = scalar_token(i);
            if (n >= C::kRun) continue;
            int const step = run * C::kRun + n;
            bool const inside = first_row() + r < p.K && tokens.has(step);
            float const q = stage.q[r][n], k = stage.k[r][n], decay = stage.decay[r][n];
            float dq = stage.x[r][n], dk = stage.y[r][n], dg = stage.z[r][n];
            if (!p.exclusive) {
                dg += q * dq;
                dq = decay * dq + k * stage.own[n];
                dk += q * stage.own[n];
            }
            store(tokens.token(step), r, inside, p.scale * dq, dk, decay * dg);
        }
    }

    // By all threads of a warp.
    LSM_DEVICE void store(i64 t, int r, bool inside, float dq, float dk, float dg) {
        int const c = first_row() + r;
        if (p.gate_shares != nullptr) {
            float const sum = Base::sum_rows(inside ? dg : 0.f);
            if (inside && r == 0)
                store_global(p.gate_shares + work.tile * p.gate_share_size + gate_at(t), sum);
        }
        if (!inside) return;
        if (p.dq.data != nullptr)
            store_global(row_at<T>(p.dq, segment.batch, t, work.head) + c, static_cast<T>(dq));
        if (p.dk.data != nullptr)
            store_global(row_at<T>(p.dk, segment.batch, t, work.head) + c, static_cast<T>(dk));
        if (p.dg.data != nullptr && p.gate_shares == nullptr) {
            i64 const gate = p.gates.rows.at(segment.batch, t, work.head, c);
            p.gates.rows.store(p.dg.data, gate_at(t) + c, p.gates.rows.through(dg, gate));
        }
    }

    LSM_DEVICE i64 gate_at(i64 t) const {
        return segment.batch * p.dg.batch + t * p.dg.time + work.head * p.dg.head;
    }

    LSM_DEVICE void poison() {
        int const r = tid % C::kTileRows;
        constexpr int kTokens = C::kThreads / C::kTileRows;
        for (int step = 0; step < tokens.steps; step += kTokens) {
            int const own = step + tid / C::kTileRows;
            bool const inside = first_row() + r < p.K && tokens.has(own);
            store(tokens.token(own), r, inside, nan_value(), nan_value(), nan_value());
        }
    }
};

template <class T, int V, DecayOn on>
__global__ void __launch_bounds__(RowConfig<V, on>::kThreads, 2)
    row_gradients(RowParams<T> const p, Segments const segments, int tiles) {
    Work const work(p.HV, p.groups, tiles);
    Segment const segment = segments[work.record];
    if (segment.t0 == segment.t1) return;
    RowGradients<T, V, on> s(p, segment, work);
    if (segment.poison) return s.poison();
    s.load_start();
    s.load_end();
    s.walk(s.runs(s.tokens.steps));
}

template <class T, DecayOn on>
void run_row_gradients(RowParams<T> const& p, Segments const& segments, void* stream) {
    i64 const tiles = row_tiles(p.K, p.V);
    dispatch(Buckets<64, 128, 256>{}, p.V, [&](auto V) {
        launch(row_gradients<T, V, on>, dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
               dim3(RowConfig<V, on>::kThreads), sizeof(RowStorage<T, V, on>), stream, p, segments,
               static_cast<int>(tiles));
    });
    run_sum_gate_shares<T>(
        {p.gate_shares, static_cast<int>(tiles), p.gate_share_size, p.HV, p.gates.rows, p.dg},
        stream);
}

}  // namespace lsm::recurrence
