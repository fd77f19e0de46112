// The chain of states, chunk by chunk: E, O and the next state (chunks.cuh). For a backward pass
// the same walk leaves the states at chunk starts and E's residuals V + e X S instead of O; for a
// transfer (cuts.cuh) only the state it ends with.
//
// A block owns kV value columns of a head's state and walks a piece of time; a warp has 16 of them.
// The state is kept transposed, [16 values, K], in accumulators, whose layout is that of an A
// operand: S and E reach the tensor cores without touching shared memory and warps share nothing
// but the tiles they read. Of more than 128 key channels a warp has half: two warps read the same
// values, and what they read from the state is added up in shared memory. Grid: (record, head, tile).
#pragma once

#include "kernels/delta/chunks.cuh"

namespace lsm::delta {

// NaN to columns [column0, column0 + kV) of rows [t0, t1).
LSM_DEVICE void poison_rows(Rows const& x, i64 batch, i64 t0, i64 t1, int head, int column0,
                            i64 columns) {
    int const c = column0 + threadIdx.x % kV;
    if (c >= columns) return;
    bf16* const to = static_cast<bf16*>(x.data) + batch * x.batch + head * x.head + c;
    for (i64 t = t0 + threadIdx.x / kV; t < t1; t += blockDim.x / kV)
        store_global(to + t * x.time, bf16(nan_value()));
}

// The transposed state of one warp: S[v][k], v = value0 + lane / 4 + {0, 8}, in accumulators; of K
// channels all or, of more than 128, half of them.
template <int K>
struct WarpState {
    static constexpr int kHalves = K > 128 ? 2 : 1, kShare = K / kHalves, kTiles = kShare / 8;
    static constexpr int kWarps = kV / 16;  // of each half
    float S[kTiles][4];

    LSM_DEVICE static int half() { return kHalves == 1 ? 0 : threadIdx.x / (32 * kWarps); }
    LSM_DEVICE static int first() { return half() * kShare; }

    // f(element, offset in a [rows, columns] matrix) for those that exist.
    template <class Visit>
    LSM_DEVICE void visit(i64 rows, i64 columns, int value0, Visit f) {
        int const lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) {
                int const k = first() + 8 * n + lane % 4 * 2 + e % 2,
                          v = value0 + lane / 4 + e / 2 * 8;
                if (k < rows && v < columns) f(S[n][e], k * static_cast<int>(columns) + v);
            }
        }
    }

    LSM_DEVICE void fill(float x) {
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) S[n][e] = x;
        }
    }

    // From a [K, V] state, null: zeros.
    LSM_DEVICE void start(DeltaParams const& p, int value0, float const* from) {
        fill(0.f);
        if (from == nullptr) return;
        visit(p.K, p.V, value0, [&](float& x, int at) { x = load_global(from + at); });
    }

    LSM_DEVICE void finish(i64 rows, i64 columns, int value0, float* to) {
        visit(rows, columns, value0, [&](float& x, int at) { store_global(to + at, x); });
    }

    LSM_DEVICE void scale(float by) {
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) S[n][e] *= by;
        }
    }

    // By key channel.
    LSM_DEVICE void scale(float const* by) {
        int const lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            float2 const f = pair_at(by, first() + 8 * n + lane % 4 * 2);
            S[n][0] *= f.x, S[n][1] *= f.y, S[n][2] *= f.x, S[n][3] *= f.y;
        }
    }

    // As A operand of products over K.
    LSM_DEVICE void operand(u32 (&a)[kShare / 16][4]) const {
        LSM_UNROLL
        for (int kk = 0; kk < kShare / 16; ++kk) {
            float const(&left)[4] = S[2 * kk];
            float const(&right)[4] = S[2 * kk + 1];
            a[kk][0] = pack_bf16(left[0], left[1]), a[kk][1] = pack_bf16(left[2], left[3]);
            a[kk][2] = pack_bf16(right[0], right[1]), a[kk][3] = pack_bf16(right[2], right[3]);
        }
    }

    // Leaves the operand in rows [V, K] of scratch; `to` is value row value0.
    LSM_DEVICE static void save(u32 const (&a)[kShare / 16][4], bf16* to) {
        int const lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int kk = 0; kk < kShare / 16; ++kk) {
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) {
                int const v = lane / 4 + i % 2 * 8,
                          k = first() + 16 * kk + i / 2 * 8 + lane % 4 * 2;
                store_global(reinterpret_cast<u32*>(to + v * K + k), a[kk][i]);
            }
        }
    }

    // out[v][t] += sum over k of S[v][k] tile[t][k].
    LSM_DEVICE static void read(u32 const (&a)[kShare / 16][4], u32 tile, float (&out)[kC / 8][4]) {
        int const lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int kk = 0; kk < kShare / 16; ++kk) {
            LSM_UNROLL
            for (int j = 0; j < kC / 16; ++j) {
                u32 b[4];
                ldmatrix_x4(b, tile + Tile<K>::columns_first(16 * j, first() + 16 * kk, lane));
                mma(out[2 * j], a[kk], b[0], b[1]);
                mma(out[2 * j + 1], a[kk], b[2], b[3]);
            }
        }
    }

    // S[v][k] += sum over t of x[v][t] tile[t][k].
    LSM_DEVICE void write(u32 const (&x)[kC / 16][4], u32 tile) {
        int const lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int kk = 0; kk < kShare / 16; ++kk) {
            LSM_UNROLL
            for (int j = 0; j < kC / 16; ++j) {
                u32 b[4];
                ldmatrix_x4_trans(b, tile + Tile<K>::rows_first(16 * j, first() + 16 * kk, lane));
                mma(S[2 * kk], x[j], b[0], b[1]);
                mma(S[2 * kk + 1], x[j], b[2], b[3]);
            }
        }
    }
};

// [16 values, kC rows] of a [kC, kV] tile, as A operand.
LSM_DEVICE void load_values(u32 tile, int warp, u32 (&x)[kC / 16][4]) {
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int j = 0; j < kC / 16; ++j)
        ldmatrix_x4_trans(x[j], tile + Tile<kV>::columns_first(16 * j, 16 * warp, lane));
}

// Accumulators [16 values, kC rows] as A operand, row t times by[t].
LSM_DEVICE void pack_rows(float const (&x)[kC / 8][4], float const* by, u32 (&packed)[kC / 16][4]) {
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int n = 0; n < kC / 8; ++n) {
        float2 const f = pair_at(by, 8 * n + lane % 4 * 2);
        packed[n / 2][n % 2 * 2] = pack_bf16(x[n][0] * f.x, x[n][1] * f.y);
        packed[n / 2][n % 2 * 2 + 1] = pack_bf16(x[n][2] * f.x, x[n][3] * f.y);
    }
}

// What that leaves out, as a second operand: together 16 bits of x by.
LSM_DEVICE void pack_rest(float const (&x)[kC / 8][4], float const* by,
                          u32 const (&packed)[kC / 16][4], u32 (&rest)[kC / 16][4]) {
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int n = 0; n < kC / 8; ++n) {
        float2 const f = pair_at(by, 8 * n + lane % 4 * 2);
        LSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            float2 const high = unpack(packed[n / 2][n % 2 * 2 + i]);
            rest[n / 2][n % 2 * 2 + i] =
                pack_bf16(x[n][2 * i] * f.x - high.x, x[n][2 * i + 1] * f.y - high.y);
        }
    }
}

LSM_DEVICE void copy(u32 const (&from)[kC / 16][4], u32 (&to)[kC / 16][4]) {
    LSM_UNROLL
    for (int i = 0; i < kC / 4; ++i) to[i / 4][i % 4] = from[i / 4][i % 4];
}

// Puts what rounding left out of Z in its place. All threads.
template <int K, int Threads>
LSM_DEVICE void replace_z(DeltaWork const& work, Chunk const& chunk, char const* tile) {
    __syncthreads();  // Z is not needed any more
    load_tile<kC, K, Threads>(work.scratch.z_rest + chunk.slot * kC * K, K, smem_u32(tile));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

enum class RecurKind { output, states };

// Where X and Y of a chunk come from: the tensors, or scratch if channels decay; and gamma.
template <int K, Form form, int Threads>
LSM_DEVICE void load_erase(DeltaWork const& work, Chunk const& chunk, int head, char* to) {
    DeltaParams const& p = work.p;
    if constexpr (form != Form::whole) {
        load_tile<kC, K, Threads>(work.scratch.erase + chunk.slot * kC * K, K, smem_u32(to));
    } else {
        load_rows<K, Threads>(p.erase.data != nullptr ? p.erase : p.k, chunk.batch, chunk.row,
                              work.key_head(head), chunk.rows, 1, 0, static_cast<int>(p.K),
                              smem_u32(to));
    }
}

template <int K, Form form, int Threads>
LSM_DEVICE void load_query(DeltaWork const& work, Chunk const& chunk, int head, char* to) {
    DeltaParams const& p = work.p;
    if constexpr (form != Form::whole) {
        load_tile<kC, K, Threads>(work.scratch.query + chunk.slot * kC * K, K, smem_u32(to));
    } else {
        load_rows<K, Threads>(p.q, chunk.batch, chunk.token, work.key_head(head), chunk.rows,
                              static_cast<int>(p.n), 0, static_cast<int>(p.K), smem_u32(to));
    }
}

template <int K, Form form, int Threads>
LSM_DEVICE void load_coefficients(DeltaWork const& work, Chunk const& chunk, Coefficients& by,
                                  float* decay) {
    load_floats<Threads>(work.scratch.coefficients + chunk.slot * 4 * kC, 4 * kC, smem_u32(by));
    if constexpr (form != Form::whole)
        load_floats<Threads>(work.scratch.decay + chunk.slot * K, K, smem_u32(decay));
}

// What a walk in either direction has and loads. Queries: Y and R are needed.
template <int K, Form form, bool Queries>
struct Chain {
    static constexpr int kHalves = WarpState<K>::kHalves, kShare = WarpState<K>::kShare;
    static constexpr int kWarps = kV / 16 * kHalves, kThreads = 32 * kWarps;
    static constexpr bool kSources = form == Form::sources;
    // Two blocks per multiprocessor; one of halves.
    static constexpr int kStages = kSources || kHalves > 1 ? 2 : 3;

    struct Stage {
        alignas(128) char erase[kC * K * 2];
        alignas(128) char query[Queries ? kC * K * 2 : 16];
        alignas(128) char write[kC * K * 2];
        alignas(128) char value[kC * kV * 2];  // of v, or of dO
        alignas(16) char relate[Queries ? Square::kBytes : 16];
        alignas(128) char write_values[kSources ? kC * K * 2 : 16];
        alignas(16) char relate_values[kSources && Queries ? Square::kBytes : 16];
        alignas(16) Coefficients by;
        alignas(16) float decay[form != Form::whole ? K : 4];
    };
    struct SharedStorage {
        Stage stage[kStages];
        // Sums of one half of K: of what erases, and of queries.
        float halves[kHalves > 1 ? (Queries ? 2 : 1) : 1][kHalves > 1 ? kC* kV * 2 : 1];
    };

    DeltaWork const& work;
    DeltaParams const& p;
    SharedStorage& s;
    Segment const& segment;
    i64 const first_slot;
    int const head, tile, lane, warp, value0;
    WarpState<K> state;

    LSM_DEVICE Chunk at(int index) const {
        return chunk_at(work, segment, first_slot, index, head);
    }

    // Of the sequence's state and head, among initial or final ones.
    LSM_DEVICE i64 owner() const {
        return (static_cast<i64>(segment.sequence) * p.HV + head) * p.K * p.V;
    }

    // Chunk `index` into its stage, with `columns` of the rows x, of which a token has n.
    LSM_DEVICE void load(int index, Rows const& x, int n, int column0, int columns) {
        Stage& to = s.stage[index % kStages];
        Chunk const chunk = at(index);
        load_erase<K, form, kThreads>(work, chunk, head, to.erase);
        load_tile<kC, K, kThreads>(work.scratch.z + chunk.slot * kC * K, K, smem_u32(to.write));
        load_rows<kV, kThreads>(x, chunk.batch, n == 1 ? chunk.row : chunk.token, head, chunk.rows,
                                n, column0, columns, smem_u32(to.value));
        if constexpr (Queries) {
            load_query<K, form, kThreads>(work, chunk, head, to.query);
            load_square<kThreads>(work.scratch.r + chunk.slot * kC * kC, smem_u32(to.relate));
        }
        if constexpr (kSources) {
            load_tile<kC, K, kThreads>(work.scratch.z_values + chunk.slot * kC * K, K,
                                       smem_u32(to.write_values));
            if constexpr (Queries)
                load_square<kThreads>(work.scratch.r_values + chunk.slot * kC * kC,
                                      smem_u32(to.relate_values));
        }
        load_coefficients<K, form, kThreads>(work, chunk, to.by, to.decay);
    }

    // Makes of sums over half of K sums over all of it; once a chunk. All threads.
    template <class... Sums>
    LSM_DEVICE void join_halves(Sums&... sums) {
        if constexpr (kHalves > 1) {
            auto const place = [&](int which, int half, int i) -> float& {
                return s.halves[which][((half * kV / 16 + warp) * kC / 2 + i) * 32 + lane];
            };
            int const half = state.half();
            int which = 0;
            auto const leave = [&](auto const& x) {
                LSM_UNROLL
                for (int i = 0; i < kC / 2; ++i) place(which, half, i) = x[i / 4][i % 4];
                ++which;
            };
            (leave(sums), ...);
            __syncthreads();
            which = 0;
            auto const take = [&](auto& x) {
                LSM_UNROLL
                for (int i = 0; i < kC / 2; ++i) x[i / 4][i % 4] += place(which, 1 - half, i);
                ++which;
            };
            (take(sums), ...);
        }
    }
    // Halves share the work on rows.
    LSM_DEVICE bool has_row(int t) const { return kHalves == 1 || t / (kC / 2) == state.half(); }

    LSM_DEVICE void decay(Stage const& tiles) {
        if constexpr (form != Form::whole) {
            state.scale(tiles.decay);
        } else {
            state.scale(tiles.by[kKeep][0]);
        }
    }

    // start(), then load(i) and step(i) for all chunks, in order or against it.
    template <bool Reverse, class Start, class Load, class Step>
    LSM_DEVICE void walk(Start const& start, Load const& load, Step const& step) {
        int const chunks = segment.poison ? 0 : work.chunks(segment);
        auto const index = [&](int i) { return Reverse ? chunks - 1 - i : i; };
        LSM_UNROLL
        for (int i = 0; i < kStages - 1; ++i) {
            if (i < chunks) load(index(i));
            cp_async_commit();
        }
        start();  // its loads come second
        LSM_UNROLL_BY(1)
        for (int i = 0; i < chunks; ++i) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // the stage has landed, and everybody is done with the one before it
            if (i + kStages - 1 < chunks) load(index(i + kStages - 1));
            cp_async_commit();
            step(index(i));
        }
        cp_async_wait<0>();
    }
};

template <int K, RecurKind Kind, Form form>
struct Recur : Chain<K, form, Kind == RecurKind::output> {
    using Base = Chain<K, form, Kind == RecurKind::output>;
    using Base::kShare;
    using Base::warp, Base::value0, Base::state, Base::kStages, Base::kThreads, Base::kSources;
    using Base::work, Base::p, Base::s, Base::segment, Base::head, Base::tile, Base::lane;
    using typename Base::Stage;
    static constexpr bool kReads = Kind == RecurKind::output;

    // What a piece does to a state goes only to pieces after it; and the first one's has been done
    // to the state itself.
    LSM_DEVICE static bool transfers(DeltaWork const& work, Segment const& segment, int tile) {
        return !segment.is_last && (tile < work.v_tiles || !work.cuts.leads(segment));
    }
    LSM_DEVICE bool transfer() const { return !kReads && work.transfer; }
    // Columns of the transition M come after those of V; their walk writes no values.
    LSM_DEVICE bool of_transition() const { return transfer() && tile >= work.v_tiles; }

    LSM_DEVICE void step(int index) {
        Stage const& tiles = s.stage[index % kStages];
        Chunk const chunk = this->at(index);
        u32 a[kShare / 16][4];
        state.operand(a);
        float residual[kC / 8][4] = {};
        state.read(a, smem_u32(tiles.erase), residual);
        float o[kC / 8][4] = {};
        if constexpr (kReads) {
            state.read(a, smem_u32(tiles.query), o);
            this->join_halves(residual, o);
        } else {
            if (!work.transfer)
                state.save(a, work.scratch.state + (chunk.slot * work.v_tiles * kV + value0) * K);
            this->join_halves(residual);
        }

        u32 value[kC / 16][4];
        load_values(smem_u32(tiles.value), warp, value);
        LSM_UNROLL
        for (int n = 0; n < kC / 8; ++n) {
            float2 const e = pair_at(tiles.by[kErase], 8 * n + lane % 4 * 2);
            float2 const upper = unpack(value[n / 2][n % 2 * 2]),
                         lower = unpack(value[n / 2][n % 2 * 2 + 1]);
            residual[n][0] = (kSources ? 0.f : upper.x) + e.x * residual[n][0];
            residual[n][1] = (kSources ? 0.f : upper.y) + e.y * residual[n][1];
            residual[n][2] = (kSources ? 0.f : lower.x) + e.x * residual[n][2];
            residual[n][3] = (kSources ? 0.f : lower.y) + e.y * residual[n][3];
        }
        u32 E[kC / 16][4];
        pack_rows(residual, tiles.by[kWrite], E);
        this->decay(tiles);
        int const passes = amplifies(tiles.by) ? 3 : 1;
        LSM_UNROLL_BY(1)
        for (int pass = 0; pass < passes; ++pass) {
            u32 x[kC / 16][4];
            if (pass == 1) {
                pack_rest(residual, tiles.by[kWrite], E, x);
            } else {
                copy(E, x);
            }
            if (pass == 2) replace_z<K, kThreads>(work, chunk, tiles.write);
            state.write(x, smem_u32(tiles.write));
        }

        if constexpr (kSources) state.write(value, smem_u32(tiles.write_values));

        if constexpr (kReads) {
            scale_output(tiles, o);
            answer(tiles.relate, E, o);
            if constexpr (kSources) answer(tiles.relate_values, value, o);
            bf16* const to = static_cast<bf16*>(p.o.data) + chunk.batch * p.o.batch +
                             chunk.token * p.o.time + head * p.o.head + value0;
            int const n = static_cast<int>(p.n);
            store_transposed(o, static_cast<int>(p.V) - value0, [&](int t) -> bf16* {
                if (!this->has_row(t)) return nullptr;
                if (n == 1) return t < chunk.rows ? to + t * p.o.time : nullptr;
                return t < chunk.rows && (t + 1) % n == 0 ? to + t / n * p.o.time : nullptr;
            });
        } else if (!work.transfer) {
            bf16* const to = work.scratch.residual + chunk.slot * kC * work.v_tiles * kV + value0;
            store_transposed(residual, 16, [&](int t) -> bf16* {
                return this->has_row(t) ? to + t * work.v_tiles * kV : nullptr;
            });
        }
    }

    LSM_DEVICE void scale_output(Stage const& tiles, float (&o)[kC / 8][4]) {
        LSM_UNROLL
        for (int n = 0; n < kC / 8; ++n) {
            float2 const c = pair_at(tiles.by[kRead], 8 * n + lane % 4 * 2);
            o[n][0] *= c.x, o[n][1] *= c.y, o[n][2] *= c.x, o[n][3] *= c.y;
        }
    }

    // o += R x.
    LSM_DEVICE void answer(char const* relate, u32 const (&x)[kC / 16][4], float (&o)[kC / 8][4]) {
        LSM_UNROLL
        for (int i = 0; i < kC / 16; ++i) {
            LSM_UNROLL
            for (int j = 0; j <= i; ++j) {  // R is lower triangular
                u32 b[4];
                ldmatrix_x4(b, smem_u32(relate) + Square::columns_first(16 * i, 16 * j, lane));
                mma(o[2 * i], x[j], b[0], b[1]);
                mma(o[2 * i + 1], x[j], b[2], b[3]);
            }
        }
    }

    // What the walk starts from.
    LSM_DEVICE void start() {
        if (segment.poison) {
            state.fill(nan_value());
        } else if (of_transition()) {
            state.fill(0.f);
            int const pitch = static_cast<int>(p.K) + 1;
            state.visit(p.K, p.K, column(),
                        [&](float& x, int at) { x = at % pitch == 0 ? 1.f : 0.f; });
        } else if (transfer() && !work.cuts.leads(segment)) {
            state.fill(0.f);
        } else if (segment.index > 0) {
            state.start(p, value0, work.cuts.state(segment.batch, segment.t0, head));
        } else {
            float const* const initial = static_cast<float const*>(p.initial_state);
            state.start(p, value0, initial == nullptr ? nullptr : initial + this->owner());
        }
    }

    LSM_DEVICE void finish() {
        if (of_transition()) {
            state.finish(p.K, p.K, column(), work.cuts.transfer(segment.batch, segment.t0, head));
        } else if (transfer()) {
            state.finish(p.K, p.V, value0, work.cuts.state(segment.batch, segment.t1, head));
        } else if (kReads && segment.is_last && p.final_state != nullptr && segment.sequence >= 0) {
            state.finish(p.K, p.V, value0, static_cast<float*>(p.final_state) + this->owner());
        }
    }

    // Of this warp's columns of the transition, the first.
    LSM_DEVICE int column() const { return value0 - work.v_tiles * kV; }

    LSM_DEVICE void run() {
        int const column = of_transition() ? 0 : tile * kV,
                  columns = of_transition() ? 0 : static_cast<int>(p.V) - column;
        this->template walk<false>([&] { start(); },
                                   [&](int i) { this->load(i, p.v, 1, column, columns); },
                                   [&](int i) { step(i); });
        if (kReads && segment.poison)
            poison_rows(p.o, segment.batch, segment.t0, segment.t1, head, tile * kV, p.V);
        finish();
    }
};

// What a block of a chain works on: blockIdx.x = (record, head, tile).
template <class Kernel>
LSM_DEVICE void run_chain(DeltaWork const& work) {
    int const tile = static_cast<int>(blockIdx.x % work.tiles);
    i64 const unit = blockIdx.x / work.tiles;
    int const head = static_cast<int>(unit % work.p.HV);
    i64 const record = work.record_of(unit / work.p.HV);
    if (record < 0) return;
    Segment const segment = work.segments[record];
    if (segment.unused()) return;
    if (work.transfer && (segment.poison || !Kernel::transfers(work, segment, tile))) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    int const tid = threadIdx.x;
    i64 const first_slot = work.first_slot(segment, record);
    constexpr int kWarps = kV / 16;  // of each half of K
    Kernel{{work,
            work.p,
            shared,
            segment,
            first_slot,
            head,
            tile,
            tid % 32,
            tid / 32 % kWarps,
            tile * kV + tid / 32 % kWarps * 16,
            {}}}
        .run();
}

template <int K, RecurKind Kind, Form form>
__global__ void __launch_bounds__(K > 128 ? 256 : 128, K > 128 ? 1 : 2)
    recur(DeltaWork const work) {
    run_chain<Recur<K, Kind, form>>(work);
}

}  // namespace lsm::delta
