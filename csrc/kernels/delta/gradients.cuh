// Gradients of a chunk, all chunks at once, from what the chains left (docs/math.md, section 12).
// With D_ts the decay between two rows, U = T E and everything in the chunk's frame,
//
//     dP = tril(dO U^T)    dA = -tril(dE U^T, -1)    P~ = c D dP    M = w D dA
//     dq = c e^G S dO + P~ K      dx = w e S dE + M K      dk = P~^T Q + M^T X + e^{G_end - G} dS U
//     dbeta = dE . (V + e X S) + sum_s D dA (x . k)
//
// and dg_u adds up every pair the gate lies between, s < u <= t: those inside the chunk as they
// stand, a rectangle of c D dP (q.k) + w D dA (x.k); those that enter or leave it by their ends;
// and gamma <S, dS> for those that span it. Nothing is subtracted, so that dg is exact however
// strong the gates. Grid: (slot, head).
#pragma once

#include "kernels/delta/prepare.cuh"
#include "kernels/delta/recur.cuh"
#include "kernels/warp.cuh"

namespace lsm::delta {

// What takes the place of tiles of values once they are contracted: products of rows, and what
// pairs of rows give to dg and dbeta.
template <int K, Form form>
struct PairScratch {  // of a whole decay
    alignas(16) char P[Square::kBytes], M[Square::kBytes];
    float pairs[kC][kC + 1], erased[kC][kC + 1];  // c D dP (q.k), D dA (x.k)
};

// OwnErase: what erases is not k, and has a gradient of its own (and the value is erased before the
// row's own decay).
template <int K, bool OwnErase, Form form = Form::whole>
struct Gradients {
    static constexpr bool kChannels = form != Form::whole, kSources = form == Form::sources;
    static constexpr int kThreads = 256, kWarps = 8;
    static constexpr int kColumns = K / 4, kTiles = kColumns / 8;  // of a warp; 16 rows
    using Wide = Tile<K>;
    using Values = Tile<kV>;

    struct SharedStorage {
        alignas(128) char k[kC * K * 2];
        alignas(128) char q[kC * K * 2];
        alignas(128) char x[OwnErase ? kC * K * 2 : 16];
        alignas(128) char b[kSources ? kC * K * 2 : 16];
        union {
            struct {
                alignas(128) char grad_o[kC * kV * 2];
                alignas(128) char de[kC * kV * 2];
                alignas(128) char residual[kC * kV * 2];
                alignas(128) char u[kC * kV * 2];
                alignas(128) char state[kV * K * 2];
                alignas(128) char dstate[kV * K * 2];
                alignas(16) char solve[2][Square::kBytes];
                alignas(128) char value[kSources ? kC * kV * 2 : 16];
                alignas(16) char solve_values[kSources ? 2 : 1][kSources ? Square::kBytes : 16];
            };
            PairScratch<K, form> after;
        };
        // In parts by columns: q.dq and x.dx of what the state gives, k.dk of what it takes.
        float ends[3][4][kC];
        float beta[kC], sum[kC], before[kC], dbeta[kC];
        float flux[kWarps];
        Chunk chunk;  // here rather than in registers, which are short
    };

    DeltaWork const& work;
    DeltaParams const& p;
    SharedStorage& s;
    Chunk const& chunk;
    int const head, lane, warp;
    int const m, j;  // 16 rows and kColumns columns of the warp

    alignas(8) float dq[kTiles][4] = {};
    alignas(8) float dx[kTiles][4] = {};
    alignas(8) float dk[kTiles][4] = {};
    float relation[2][4] =
        {};  // warps j < 2: dO U^T, 16 columns from 16 j; else dE U^T, from 16 (j - 2)
    float flux[kChannels ? 2 : 1] = {};

    // With rows that write values beside what they erase, k stands with V in the roles of b with U.
    struct Source {
        alignas(8) float db[kTiles][4] = {};
        float relation[2][4] = {};
    };
    struct None {};
    std::conditional_t<kSources, Source, None> source;

    LSM_DEVICE Gradients(DeltaWork const& delta_work, SharedStorage& storage, int value_head)
        : work(delta_work),
          p(delta_work.p),
          s(storage),
          chunk(storage.chunk),
          head(value_head),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          m(threadIdx.x / 128),
          j(threadIdx.x / 32 % 4) {}

    LSM_DEVICE bool reads() const { return j < 2; }
    LSM_DEVICE int block() const { return j % 2; }
    LSM_DEVICE char const* erasers() const {
        if constexpr (OwnErase) return s.x;
        return s.k;
    }

    LSM_DEVICE void load_keys() {
        int const from = work.key_head(head), columns = static_cast<int>(p.K);
        load_rows<K, kThreads>(p.k, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                               smem_u32(s.k));
        load_rows<K, kThreads>(p.q, chunk.batch, chunk.token, from, chunk.rows,
                               static_cast<int>(p.n), 0, columns, smem_u32(s.q));
        if constexpr (OwnErase) {
            load_rows<K, kThreads>(p.erase, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                                   smem_u32(s.x));
        }
        bf16 const* const solve = work.scratch.solve + chunk.slot * 2 * kC * kC;
        load_square<kThreads>(solve, smem_u32(s.solve[0]));
        load_square<kThreads>(solve + kC * kC, smem_u32(s.solve[1]));
        if constexpr (kSources) {
            load_rows<K, kThreads>(p.write, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                                   smem_u32(s.b));
            bf16 const* const values = work.scratch.solve_values + chunk.slot * 2 * kC * kC;
            load_square<kThreads>(values, smem_u32(s.solve_values[0]));
            load_square<kThreads>(values + kC * kC, smem_u32(s.solve_values[1]));
        } else if (warp == 0) {
            RowScalars const x = load_scalars(p, chunk, head);
            s.beta[lane] = x.beta, s.sum[lane] = x.sum, s.before[lane] = x.before;
        }
    }

    LSM_DEVICE void load_values(int tile) {
        int const V = work.v_tiles * kV;
        load_rows<kV, kThreads>(p.grad_o, chunk.batch, chunk.token, head, chunk.rows,
                                static_cast<int>(p.n), tile * kV, static_cast<int>(p.V) - tile * kV,
                                smem_u32(s.grad_o));
        i64 const at = chunk.slot * kC * V + tile * kV;
        load_tile<kC, kV, kThreads>(work.scratch.de + at, V, smem_u32(s.de));
        load_tile<kC, kV, kThreads>(work.scratch.residual + at, V, smem_u32(s.residual));
        if constexpr (kSources) {
            load_rows<kV, kThreads>(p.v, chunk.batch, chunk.row, head, chunk.rows, 1, tile * kV,
                                    static_cast<int>(p.V) - tile * kV, smem_u32(s.value));
        }
        i64 const state = (chunk.slot * V + tile * kV) * K;
        load_tile<kV, K, kThreads>(work.scratch.state + state, K, smem_u32(s.state));
        load_tile<kV, K, kThreads>(work.scratch.dstate + state, K, smem_u32(s.dstate));
    }

    LSM_DEVICE void add_residuals(int tile) {
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            u32 const at = Values::offset(4 * warp + i, 2 * lane);
            float const dot = warp_sum(add_products(0.f, s.de + at, s.residual + at));
            if (lane == 0) s.dbeta[4 * warp + i] = dot + (tile == 0 ? 0.f : s.dbeta[4 * warp + i]);
        }
    }

    // acc += (high + low) rows, for the warp's 16 rows and columns 16 j.
    LSM_DEVICE void add_solved(char const* high, char const* low, char const* rows,
                               float (&acc)[2][4]) {
        LSM_UNROLL
        for (int kk = 0; kk <= 1; ++kk) {
            if (kk > m) break;
            u32 a[4], b[4];
            ldmatrix_x4_trans(b, smem_u32(rows) + Values::rows_first(16 * kk, 16 * j, lane));
            ldmatrix_x4(a, smem_u32(low) + Square::rows_first(16 * m, 16 * kk, lane));
            mma(acc[0], a, b[0], b[1]);
            mma(acc[1], a, b[2], b[3]);
            ldmatrix_x4(a, smem_u32(high) + Square::rows_first(16 * m, 16 * kk, lane));
            mma(acc[0], a, b[0], b[1]);
            mma(acc[1], a, b[2], b[3]);
        }
    }

    // U's 16 columns 16 j of the tile; and sums of products of elements.
    LSM_DEVICE void solve_values(int tile) {
        float acc[2][4] = {};
        add_solved(s.solve[0], s.solve[1], s.residual, acc);
        if constexpr (kSources) add_solved(s.solve_values[0], s.solve_values[1], s.value, acc);
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                u32 const at =
                    Values::offset(16 * m + lane / 4 + 8 * half_, 16 * j + 8 * n + lane % 4 * 2);
                *reinterpret_cast<u32*>(s.u + at) =
                    pack_bf16(acc[n][2 * half_], acc[n][2 * half_ + 1]);
            }
        }
        if constexpr (!kSources) add_residuals(tile);
        LSM_UNROLL_BY(4)
        for (int i = threadIdx.x; i < kV * K / 2; i += kThreads) add_flux(4 * i);
    }

    // <S, dS>; by channel, a thread has the same two in every row it visits.
    LSM_DEVICE void add_flux(int at) {
        if constexpr (kChannels) {
            u32 const place = Wide::offset(at / (2 * K), at % (2 * K) / 2);
            float2 const x = unpack(*reinterpret_cast<u32 const*>(s.state + place)),
                         y = unpack(*reinterpret_cast<u32 const*>(s.dstate + place));
            flux[0] += x.x * y.x, flux[1] += x.y * y.y;
        } else {
            flux[0] = add_products(flux[0], s.state + at, s.dstate + at);
        }
    }

    LSM_DEVICE static float add_products(float sum, char const* a, char const* b) {
        float2 const x = unpack(*reinterpret_cast<u32 const*>(a)),
                     y = unpack(*reinterpret_cast<u32 const*>(b));
        return sum + x.x * y.x + x.y * y.y;
    }

    // What a tile of V adds to products over values.
    LSM_DEVICE void contract_values() {
        LSM_UNROLL
        for (int kk = 0; kk < kV / 16; ++kk) {
            u32 o[4], e[4], u[4], b[4];
            ldmatrix_x4(o, smem_u32(s.grad_o) + Values::rows_first(16 * m, 16 * kk, lane));
            ldmatrix_x4(e, smem_u32(s.de) + Values::rows_first(16 * m, 16 * kk, lane));
            ldmatrix_x4(u, smem_u32(s.u) + Values::rows_first(16 * m, 16 * kk, lane));
            if (block() <= m) {
                ldmatrix_x4(b, smem_u32(s.u) + Values::columns_first(16 * block(), 16 * kk, lane));
                u32 a[4];
                LSM_UNROLL
                for (int i = 0; i < 4; ++i) a[i] = reads() ? o[i] : e[i];
                mma(relation[0], a, b[0], b[1]);
                mma(relation[1], a, b[2], b[3]);
                if constexpr (kSources) {
                    ldmatrix_x4(
                        b, smem_u32(s.value) + Values::columns_first(16 * block(), 16 * kk, lane));
                    mma(source.relation[0], a, b[0], b[1]);
                    mma(source.relation[1], a, b[2], b[3]);
                }
            }
            LSM_UNROLL
            for (int c = 0; c < kTiles / 2; ++c) {
                ldmatrix_x4_trans(b, smem_u32(s.state) + state_block(kk, c));
                mma(dq[2 * c], o, b[0], b[1]);
                mma(dq[2 * c + 1], o, b[2], b[3]);
                mma(dx[2 * c], e, b[0], b[1]);
                mma(dx[2 * c + 1], e, b[2], b[3]);
                ldmatrix_x4_trans(b, smem_u32(s.dstate) + state_block(kk, c));
                if constexpr (kSources) {
                    mma(source.db[2 * c], u, b[0], b[1]);
                    mma(source.db[2 * c + 1], u, b[2], b[3]);
                    u32 v[4];
                    ldmatrix_x4(v, smem_u32(s.value) + Values::rows_first(16 * m, 16 * kk, lane));
                    mma(dk[2 * c], v, b[0], b[1]);
                    mma(dk[2 * c + 1], v, b[2], b[3]);
                } else {
                    mma(dk[2 * c], u, b[0], b[1]);
                    mma(dk[2 * c + 1], u, b[2], b[3]);
                }
            }
        }
    }

    LSM_DEVICE u32 state_block(int kk, int c) const {
        return Wide::rows_first(16 * kk, j * kColumns + 16 * c, lane);
    }

    // P~, M and the pairs of dg and dbeta.
    LSM_DEVICE void relate() {
        float raw[2][4] = {};
        if (block() <= m) {
            char const* const rows = reads() ? s.q : erasers();
            LSM_UNROLL_BY(4)
            for (int kk = 0; kk < K / 16; ++kk) {
                u32 a[4], b[4];
                ldmatrix_x4(a, smem_u32(rows) + Wide::rows_first(16 * m, 16 * kk, lane));
                ldmatrix_x4(b, smem_u32(s.k) + Wide::columns_first(16 * block(), 16 * kk, lane));
                mma(raw[0], a, b[0], b[1]);
                mma(raw[1], a, b[2], b[3]);
            }
        }
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = 16 * m + lane / 4 + 8 * half_;
            float const from = reads() ? s.sum[t] : s.before[t];
            float const by = reads() ? static_cast<float>(p.scale) : s.beta[t];
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                int const column = 16 * block() + 8 * n + lane % 4 * 2;
                float x[2];
                LSM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    int const c = column + e;
                    bool const keep = reads() ? c <= t : c < t;
                    float const d = relation[n][2 * half_ + e] * exp2_approx(from - s.sum[c]);
                    float const r = raw[n][2 * half_ + e];
                    x[e] = keep ? (reads() ? by * d : -by * d) : 0.f;
                    (reads() ? s.after.pairs : s.after.erased)[t][c] =
                        keep ? (reads() ? by * d * r : -d * r) : 0.f;
                }
                *reinterpret_cast<u32*>((reads() ? s.after.P : s.after.M) +
                                        Square::offset(t, column)) = pack_bf16(x[0], x[1]);
            }
        }
    }

    // Brings what the states gave to the rows' scale; its dots with the rows are what crosses the
    // chunk's ends.
    LSM_DEVICE void scale_ends() {
        float const scale = static_cast<float>(p.scale), last = s.sum[kC - 1];
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = 16 * m + lane / 4 + 8 * half_;
            float const read = scale * exp2_approx(s.sum[t]),
                        erase = -s.beta[t] * exp2_approx(s.before[t]),
                        write = exp2_approx(last - s.sum[t]);
            float const a = scale_rows(dq, s.q, t, half_, read),
                        b = scale_rows(dx, erasers(), t, half_, erase),
                        c = scale_rows(dk, s.k, t, half_, write);
            if (lane % 4 == 0) s.ends[0][j][t] = a, s.ends[1][j][t] = b, s.ends[2][j][t] = c;
        }
    }

    LSM_DEVICE float scale_rows(float (&d)[kTiles][4], char const* rows, int t, int half_,
                                float by) {
        float dot = 0.f;
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            float2 const x = unpack(*reinterpret_cast<u32 const*>(
                rows + Wide::offset(t, j * kColumns + 8 * n + lane % 4 * 2)));
            d[n][2 * half_] *= by, d[n][2 * half_ + 1] *= by;
            dot += d[n][2 * half_] * x.x + d[n][2 * half_ + 1] * x.y;
        }
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        return dot + __shfl_xor_sync(0xffffffffu, dot, 2);
    }

    // What the chunk's rows give each other.
    LSM_DEVICE void contract_rows() {
        LSM_UNROLL
        for (int kk = 0; kk < 2; ++kk) {
            u32 a[4], b[4], c[4], d[4];
            if (kk <= m) {
                ldmatrix_x4(a, smem_u32(s.after.P) + Square::rows_first(16 * m, 16 * kk, lane));
                ldmatrix_x4(b, smem_u32(s.after.M) + Square::rows_first(16 * m, 16 * kk, lane));
                add_rows(s.k, kk, a, dq, b, dx);
            }
            if (kk >= m) {
                ldmatrix_x4_trans(
                    c, smem_u32(s.after.P) + Square::columns_first(16 * kk, 16 * m, lane));
                ldmatrix_x4_trans(
                    d, smem_u32(s.after.M) + Square::columns_first(16 * kk, 16 * m, lane));
                LSM_UNROLL
                for (int i = 0; i < kTiles / 2; ++i) {
                    u32 const at = Wide::rows_first(16 * kk, j * kColumns + 16 * i, lane);
                    u32 q[4], x[4];
                    ldmatrix_x4_trans(q, smem_u32(s.q) + at);
                    ldmatrix_x4_trans(x, smem_u32(erasers()) + at);
                    mma(dk[2 * i], c, q[0], q[1]);
                    mma(dk[2 * i + 1], c, q[2], q[3]);
                    mma(dk[2 * i], d, x[0], x[1]);
                    mma(dk[2 * i + 1], d, x[2], x[3]);
                }
            }
        }
    }

    LSM_DEVICE void add_rows(char const* rows, int kk, u32 const (&a)[4], float (&to)[kTiles][4],
                             u32 const (&b)[4], float (&too)[kTiles][4]) {
        LSM_UNROLL
        for (int i = 0; i < kTiles / 2; ++i) {
            u32 x[4];
            ldmatrix_x4_trans(
                x, smem_u32(rows) + Wide::rows_first(16 * kk, j * kColumns + 16 * i, lane));
            mma(to[2 * i], a, x[0], x[1]);
            mma(to[2 * i + 1], a, x[2], x[3]);
            mma(too[2 * i], b, x[0], x[1]);
            mma(too[2 * i + 1], b, x[2], x[3]);
        }
    }

    // Rows of dq, dk, dx: per value head, contiguous.
    LSM_DEVICE void store(Rows const& to, i64 time, int n, float const (&d)[kTiles][4]) {
        i64 const base = chunk.batch * to.batch + time * to.time + head * to.head;
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const row = 16 * m + lane / 4 + 8 * half_;
            if (row >= chunk.rows || (n > 1 && (row + 1) % n != 0)) continue;
            i64 const at = base + (n == 1 ? row : row / n) * to.time;
            LSM_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                int const c = j * kColumns + 8 * i + lane % 4 * 2;
                if (c >= p.K) continue;
                float const x = d[i][2 * half_], y = d[i][2 * half_ + 1];
                if (p.key_grad_dtype == Dtype::f32) {
                    store_global(reinterpret_cast<float2*>(static_cast<float*>(to.data) + at + c),
                                 float2{x, y});
                } else {
                    store_global(reinterpret_cast<u32*>(static_cast<bf16*>(to.data) + at + c),
                                 pack_bf16(x, y));
                }
            }
        }
    }

    LSM_DEVICE static void store_as(void* data, Dtype dtype, i64 at, float x) {
        if (dtype == Dtype::f32) {
            store_global(static_cast<float*>(data) + at, x);
        } else {
            store_global(static_cast<bf16*>(data) + at, bf16(x));
        }
    }

    // One warp, lane = row: dbeta and dg.
    LSM_DEVICE void store_scalars() {
        int const t = lane, n = static_cast<int>(p.n);
        auto const end = [&](int which, int row) {
            return s.ends[which][0][row] + s.ends[which][1][row] +
                   (s.ends[which][2][row] + s.ends[which][3][row]);
        };
        // Row t of `pairs` becomes the sum over s < u of all pairs that end at t.
        int const eraser = OwnErase ? t + 1 : t;  // erases what the gate of row t decays last
        float const beta = eraser < kC ? s.beta[eraser] : 0.f;
        float before = end(0, t) + (eraser < kC ? end(1, eraser) : 0.f), dbeta = s.dbeta[t];
        LSM_UNROLL_BY(4)
        for (int u = 0; u < kC; ++u) {
            float const erased = eraser < kC ? beta * s.after.erased[eraser][u] : 0.f;
            float const pair = s.after.pairs[t][u] + erased;
            s.after.pairs[t][u] = before;
            before += pair;
            dbeta += s.after.erased[t][u];
        }
        if (t < chunk.rows) {
            store_as(
                p.dbeta.data, p.beta_dtype,
                chunk.batch * p.dbeta.batch + (chunk.row + t) * p.dbeta.time + head * p.dbeta.head,
                dbeta);
        }
        s.dbeta[t] = end(2, t);
        __syncwarp();
        if (p.dg.data == nullptr || t >= chunk.rows || t % n != 0) return;
        float through = 0.f, sum = 0.f;
        for (int w = 0; w < kWarps; ++w) through += s.flux[w];
        sum = through * exp2_approx(s.sum[kC - 1]);
        for (int i = kC - 1; i >= t; --i) sum += s.after.pairs[i][t];
        for (int i = 0; i < t; ++i) sum += s.dbeta[i];
        store_as(p.dg.data, p.gate_dtype,
                 chunk.batch * p.dg.batch + (chunk.token + t / n) * p.dg.time + head * p.dg.head,
                 sum);
    }

    LSM_DEVICE void contract() {
        load_keys();
        LSM_UNROLL_BY(1)
        for (int tile = 0; tile < work.v_tiles; ++tile) {
            load_values(tile);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();  // landed
            solve_values(tile);
            __syncthreads();  // U is complete
            contract_values();
            __syncthreads();  // nobody needs the tiles any more
        }
    }

    LSM_DEVICE void run() {
        contract();
        scale_ends();
        relate();
        float const through = warp_sum(flux[0]);
        if (lane == 0) s.flux[warp] = through;
        __syncthreads();  // P~, M, pairs and parts are complete
        contract_rows();
        store(p.dq, chunk.token, static_cast<int>(p.n), dq);
        if constexpr (OwnErase) {
            store(p.derase, chunk.row, 1, dx);
        } else {
            LSM_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e) dk[i][e] += dx[i][e];
            }
        }
        store(p.dk, chunk.row, 1, dk);
        if (warp == 0) store_scalars();
    }

    LSM_DEVICE void poison_rows_and_beta() {
        LSM_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) dq[i][e] = nan_value();
        }
        store(p.dq, chunk.token, static_cast<int>(p.n), dq);
        store(p.dk, chunk.row, 1, dq);
        if constexpr (OwnErase) store(p.derase, chunk.row, 1, dq);
        if constexpr (kSources) store(p.dwrite, chunk.row, 1, dq);
        if (kSources || warp != 0 || lane >= chunk.rows) return;
        store_as(
            p.dbeta.data, p.beta_dtype,
            chunk.batch * p.dbeta.batch + (chunk.row + lane) * p.dbeta.time + head * p.dbeta.head,
            nan_value());
    }

    // NaN in everything.
    LSM_DEVICE void poison() {
        poison_rows_and_beta();
        int const n = static_cast<int>(p.n);
        if (p.dg.data == nullptr || warp != 0 || lane >= chunk.rows || lane % n != 0) return;
        store_as(p.dg.data, p.gate_dtype,
                 chunk.batch * p.dg.batch + (chunk.token + lane / n) * p.dg.time + head * p.dg.head,
                 nan_value());
    }
};

template <class Kernel>
LSM_DEVICE void run_chunk(DeltaWork const& work) {
    int head;
    bool poison;
    Chunk const chunk = chunk_of_block(work, head, poison);
    if (chunk.rows == 0) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    if (threadIdx.x == 0) shared.chunk = chunk;
    __syncthreads();
    Kernel kernel(work, shared, head);
    if (poison) {
        kernel.poison();
    } else {
        kernel.run();
    }
}

template <int K, bool OwnErase>
__global__ void __launch_bounds__(256, K > 128 ? 1 : 2) gradients(DeltaWork const work) {
    run_chunk<Gradients<K, OwnErase>>(work);
}

}  // namespace lsm::delta
