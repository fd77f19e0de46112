// Everything of a chunk that does not need the state, for all chunks at once (docs/math.md, section
// 12): with G the gates summed from the chunk's start, A_ts = w_t x_t.k_s e^{G_t - G_s} (s < t),
// P_ts = c q_t.k_s e^{G_t - G_s} (s <= t),
//
//     T = (I + A)^-1        R = P T        Z = T^T diag(e^{G_end - G}) K.
//
// T by forward substitution in fp32, a lane per column: powers of A, and T in bf16, fail as soon as
// keys repeat. Its products take T as two bf16, high and low. Grid: (slot, head).
#pragma once

#include "kernels/delta/chunks.cuh"

namespace lsm::delta {

// log2 gates and betas of a chunk's rows, in one warp (lane = row).
struct RowScalars {
    float beta;
    float sum;     // of gates up to and including the row
    float before;  // what the erased value has decayed by: the same, or without the row's own gate
};

LSM_DEVICE float load_as_float(void const* data, Dtype dtype, i64 at) {
    return dtype == Dtype::f32
               ? load_global(static_cast<float const*>(data) + at)
               : static_cast<float>(load_global(static_cast<bf16 const*>(data) + at));
}

LSM_DEVICE RowScalars load_scalars(DeltaParams const& p, Chunk const& chunk, int head) {
    int const row = threadIdx.x % 32, n = static_cast<int>(p.n);
    RowScalars x = {0.f, 0.f, 0.f};
    bool const valid = row < chunk.rows;
    if (valid && p.beta.data != nullptr) {
        x.beta = load_as_float(
            p.beta.data, p.beta_dtype,
            chunk.batch * p.beta.batch + (chunk.row + row) * p.beta.time + head * p.beta.head);
    }
    if (p.decay != Decay::scalar) return x;
    if (valid && row % n == 0) {
        float const g = load_as_float(
            p.g.data, p.gate_dtype,
            chunk.batch * p.g.batch + (chunk.token + row / n) * p.g.time + head * p.g.head);
        x.sum = fmaxf(g * kLog2e, kForget);
    }
    LSM_UNROLL
    for (int d = 1; d < 32; d *= 2) {
        float const below = __shfl_up_sync(0xffffffffu, x.sum, d);
        if (row >= d) x.sum += below;
    }
    float const previous = __shfl_up_sync(0xffffffffu, x.sum, 1);
    x.before = p.transition == Transition::householder ? x.sum : row == 0 ? 0.f : previous;
    return x;
}

template <int K>
struct Prepare {
    static constexpr int kThreads = 128;
    using Wide = Tile<K>;

    struct SharedStorage {
        alignas(128) char k[kC * K * 2];
        alignas(128) char q[kC * K * 2];
        alignas(16) float A[kC][kC + 4];
        alignas(16) char P[Square::kBytes];
        alignas(16) char solve[2][Square::kBytes];   // T
        alignas(16) char second[2][Square::kBytes];  // diag(e^{G_end - G}) T; of sources T A_v
        float beta[kC], sum[kC], before[kC];
        float largest;
        alignas(128) char x[kC * K * 2];  // last: allocated only where it is not k
    };
    static std::size_t bytes(DeltaParams const& p) {
        return p.erase.data != nullptr ? sizeof(SharedStorage) : offsetof(SharedStorage, x);
    }

    DeltaWork const& work;
    DeltaParams const& p;
    SharedStorage& s;
    Chunk const chunk;
    int const head, lane, warp;
    bool const backward;

    LSM_DEVICE void load() {
        int const from = work.key_head(head), n = static_cast<int>(p.n),
                  columns = static_cast<int>(p.K);
        load_rows<K, kThreads>(p.k, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                               smem_u32(s.k));
        load_rows<K, kThreads>(p.q, chunk.batch, chunk.token, from, chunk.rows, n, 0, columns,
                               smem_u32(s.q));
        if (p.erase.data != nullptr) {
            load_rows<K, kThreads>(p.erase, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                                   smem_u32(s.x));
        }
        cp_async_commit();
        if (warp == 0) scalars();
    }

    LSM_DEVICE void scalars() {
        RowScalars const x = load_scalars(p, chunk, head);
        s.beta[lane] = x.beta, s.sum[lane] = x.sum, s.before[lane] = x.before;
        bool const valid = lane < chunk.rows;
        float const total = __shfl_sync(0xffffffffu, x.sum, kC - 1);
        float* const to = work.scratch.coefficients + chunk.slot * 4 * kC + lane;
        store_global(to + kWrite * kC, x.beta);
        store_global(to + kErase * kC, valid ? -exp2_approx(x.before) : 0.f);
        store_global(to + kRead * kC,
                     valid ? static_cast<float>(p.scale) * exp2_approx(x.sum) : 0.f);
        if (lane == 0) store_global(to + kKeep * kC, exp2_approx(total));
    }

    // Warps 0 and 1: 16 rows of A each; warps 2 and 3: of P.
    LSM_DEVICE void relate() {
        int const m = warp % 2;
        bool const reads = warp >= 2;
        char const* const rows = reads ? s.q : p.erase.data != nullptr ? s.x : s.k;
        float acc[kC / 8][4] = {};
        LSM_UNROLL_BY(4)
        for (int kk = 0; kk < K / 16; ++kk) {
            u32 a[4], b[4];
            ldmatrix_x4(a, smem_u32(rows) + Wide::rows_first(16 * m, 16 * kk, lane));
            LSM_UNROLL
            for (int j = 0; j < 2; ++j) {
                if (j > m) break;
                ldmatrix_x4(b, smem_u32(s.k) + Wide::columns_first(16 * j, 16 * kk, lane));
                mma(acc[2 * j], a, b[0], b[1]);
                mma(acc[2 * j + 1], a, b[2], b[3]);
            }
        }
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = 16 * m + lane / 4 + 8 * half_;
            float const by = reads ? static_cast<float>(p.scale) : s.beta[t];
            float const from = reads ? s.sum[t] : s.before[t];
            LSM_UNROLL
            for (int j = 0; j < kC / 8; ++j) {
                int const column = 8 * j + lane % 4 * 2;
                float x[2];
                LSM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    // Select, never multiply: what is dropped may be inf.
                    bool const keep = reads ? column + e <= t : column + e < t;
                    x[e] = keep ? by * acc[j][2 * half_ + e] * exp2_approx(from - s.sum[column + e])
                                : 0.f;
                }
                if (reads) {
                    *reinterpret_cast<u32*>(s.P + Square::offset(t, column)) =
                        pack_bf16(x[0], x[1]);
                } else {
                    *reinterpret_cast<float2*>(&s.A[t][column]) = {x[0], x[1]};
                }
            }
        }
    }

    // A column of (I + A)^-1 B per lane, in registers; right(t) is B's.
    template <class Right>
    LSM_DEVICE void substitute(float (&T)[kC], Right right) {
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            float sum[4] = {right(t), 0.f, 0.f, 0.f};
            LSM_UNROLL
            for (int i = 0; i < t; i += 4) {
                float4 const a = *reinterpret_cast<float4 const*>(&s.A[t][i]);
                sum[0] -= a.x * T[i];
                if (i + 1 < t) sum[1] -= a.y * T[i + 1];
                if (i + 2 < t) sum[2] -= a.z * T[i + 2];
                if (i + 3 < t) sum[3] -= a.w * T[i + 3];
            }
            T[t] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }

    // Column `lane` of a square, as high + low.
    LSM_DEVICE void put(int t, float x, char (&to)[2][Square::kBytes]) {
        bf16 high, low;
        split(x, high, low);
        *reinterpret_cast<bf16*>(to[0] + Square::offset(t, lane)) = high;
        *reinterpret_cast<bf16*>(to[1] + Square::offset(t, lane)) = low;
    }
    LSM_DEVICE void keep(int t, float x, bf16* to) {
        bf16 high, low;
        split(x, high, low);
        store_global(to + t * kC + lane, high);
        store_global(to + (kC + t) * kC + lane, low);
    }

    // T; Weighted: its rows with e^{G_end - G}, too.
    template <bool Weighted>
    LSM_DEVICE void solve() {
        float T[kC], largest = 0.f;
        substitute(T, [&](int t) { return t == lane ? 1.f : 0.f; });
        LSM_UNROLL
        for (int t = 1; t < kC; ++t) largest = t > lane ? fmaxf(largest, fabsf(T[t])) : largest;
        LSM_UNROLL
        for (int d = 16; d > 0; d /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
        if (lane == 0) s.largest = largest;
        float* const to = work.scratch.coefficients + (chunk.slot * 4 + kKeep) * kC;
        if (lane > 0) store_global(to + lane, largest);

        float const beta = s.beta[lane];
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            put(t, T[t], s.solve);
            if constexpr (Weighted) put(t, T[t] * exp2_approx(s.sum[kC - 1] - s.sum[t]), s.second);
            if (backward) keep(t, T[t] * beta, work.scratch.solve + chunk.slot * 2 * kC * kC);
        }
    }

    // plus + P inverse, by 16 x 16 blocks, one per warp.
    LSM_DEVICE void fold_reads(char const (&inverse)[2][Square::kBytes], char const* plus,
                               bf16* to) {
        int const m = warp % 2, j = warp / 2;
        float acc[2][4] = {};
        if (plus != nullptr) add_tile<Square>(plus, 16 * m, 16 * j, acc);
        LSM_UNROLL
        for (int kk = j; kk <= m; ++kk) {
            u32 a[4], b[4];
            ldmatrix_x4(a, smem_u32(s.P) + Square::rows_first(16 * m, 16 * kk, lane));
            LSM_UNROLL
            for (int part = 1; part >= 0; --part) {
                ldmatrix_x4_trans(
                    b, smem_u32(inverse[part]) + Square::rows_first(16 * kk, 16 * j, lane));
                mma(acc[0], a, b[0], b[1]);
                mma(acc[1], a, b[2], b[3]);
            }
        }
        store(to + chunk.slot * kC * kC, kC, 16 * m, 16 * j, acc);
    }

    // plus + inverse^T rows: warp w has rows 16 (w % 2) and half of the columns.
    LSM_DEVICE void fold_writes(char const (&inverse)[2][Square::kBytes], char const* rows,
                                char const* plus, bf16* to, bf16* rest) {
        int const m = warp % 2;
        i64 const at = chunk.slot * kC * K;
        LSM_UNROLL_BY(2)
        for (int c = 0; c < K / 32; ++c) {
            int const column = warp / 2 * (K / 2) + 16 * c;
            float acc[2][4] = {};
            if (plus != nullptr) add_tile<Wide>(plus, 16 * m, column, acc);
            LSM_UNROLL
            for (int kk = 0; kk < 2; ++kk) {
                if (kk < m) continue;  // lower triangular
                u32 b[4], a[4];
                ldmatrix_x4_trans(b, smem_u32(rows) + Wide::rows_first(16 * kk, column, lane));
                LSM_UNROLL
                for (int part = 1; part >= 0; --part) {
                    ldmatrix_x4_trans(
                        a, smem_u32(inverse[part]) + Square::columns_first(16 * kk, 16 * m, lane));
                    mma(acc[0], a, b[0], b[1]);
                    mma(acc[1], a, b[2], b[3]);
                }
            }
            store(to + at, K, 16 * m, column, acc);
            if (rest != nullptr && s.largest > 1.f) {
                LSM_UNROLL
                for (int i = 0; i < 8; ++i)
                    acc[i / 4][i % 4] -= static_cast<float>(bf16(acc[i / 4][i % 4]));
                store(rest + at, K, 16 * m, column, acc);
            }
        }
    }

    template <class Layout>
    LSM_DEVICE void add_tile(char const* tile, int row, int column, float (&acc)[2][4]) {
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            float2 const x = unpack(*reinterpret_cast<u32 const*>(
                tile +
                Layout::offset(row + lane / 4 + i % 2 * 8, column + i / 2 * 8 + lane % 4 * 2)));
            acc[i / 2][i % 2 * 2] += x.x, acc[i / 2][i % 2 * 2 + 1] += x.y;
        }
    }

    LSM_DEVICE void store(bf16* to, int pitch, int row, int column, float const (&acc)[2][4]) {
        LSM_UNROLL
        for (int j = 0; j < 2; ++j) {
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                int const t = row + lane / 4 + 8 * half_, c = column + 8 * j + lane % 4 * 2;
                store_global(reinterpret_cast<u32*>(to + t * pitch + c),
                             pack_bf16(acc[j][2 * half_], acc[j][2 * half_ + 1]));
            }
        }
    }

    LSM_DEVICE void run() {
        load();
        cp_async_wait<0>();
        __syncthreads();
        relate();
        __syncthreads();
        if (warp == 0) solve<true>();
        __syncthreads();
        fold_reads(s.solve, nullptr, work.scratch.r);
        fold_writes(s.second, s.k, nullptr, work.scratch.z, work.scratch.z_rest);
    }
};

template <int K>
__global__ void __launch_bounds__(128, 5) prepare(DeltaWork const work, bool backward) {
    using Kernel = Prepare<K>;
    int head;
    bool poison;
    Chunk const chunk = chunk_of_block(work, head, poison);
    if (chunk.rows == 0 || poison) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    int const tid = threadIdx.x;
    Kernel{work, work.p, shared, chunk, head, tid % 32, tid / 32, backward}.run();
}

}  // namespace lsm::delta
