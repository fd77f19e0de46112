// prepare.cuh for decay by key channel: A and P pair by pair of half blocks (levels.cuh), and X and
// Y with the decay since the chunk began, for the chains.
//
// Of sources (dplr), with a for X, which reads the state before its own row's decay, and b for the
// k of the erased: A_ts = -a_t.b_s e^{..}, P_ts = c q_t.b_s e^{..}, and likewise A_v, P_v with k in
// the place of b;
//
//     T = (I + A)^-1      R = P T      R_v = P_v + P T A_v      Z = T^T diag(..) B      Z_v = diag(..) K + (T A_v)^T diag(..) B.
#pragma once

#include "kernels/delta/levels.cuh"
#include "kernels/delta/prepare.cuh"

namespace lsm::delta {

template <int K, bool Sources>
struct PrepareChannels : Prepare<K> {
    using Base = Prepare<K>;
    using Base::chunk, Base::head, Base::kThreads, Base::lane, Base::p, Base::warp, Base::work;
    using typename Base::Wide;

    // x, y: rows at a level. Right of the cut they are what erases and q; left of it what is erased
    // along and, of sources, k.
    struct SharedStorage : Base::SharedStorage {
        alignas(128) char y[kC * K * 2];
        alignas(128) char a[Sources ? kC * K * 2 : 16];
        alignas(128) char b[Sources ? kC * K * 2 : 16];
        alignas(16) float A_values[Sources ? kC : 1][kC + 4];
        alignas(16) char P_values[Sources ? Square::kBytes : 16];
    };
    SharedStorage& s;

    LSM_DEVICE char* erasers() const {
        if constexpr (Sources) return s.a;
        return s.k;
    }
    LSM_DEVICE char* erased() const {
        if constexpr (Sources) return s.b;
        return s.k;
    }

    LSM_DEVICE void load() {
        int const from = work.key_head(head), columns = static_cast<int>(p.K);
        auto const load = [&](Rows const& x, char* to) {
            load_rows<K, kThreads>(x, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                                   smem_u32(to));
        };
        load(p.k, s.k);
        load_rows<K, kThreads>(p.q, chunk.batch, chunk.token, from, chunk.rows,
                               static_cast<int>(p.n), 0, columns, smem_u32(s.q));
        if constexpr (Sources) load(p.erase, s.a), load(p.write, s.b);
        cp_async_commit();
    }

    LSM_DEVICE void scalars() {
        bool const valid = lane < chunk.rows;
        float const beta = Sources ? 1.f : load_scalars(p, chunk, head).beta;
        s.beta[lane] = beta;
        float* const to = work.scratch.coefficients + chunk.slot * 4 * kC + lane;
        store_global(to + kWrite * kC, beta);
        store_global(to + kErase * kC, !valid ? 0.f : Sources ? 1.f : -1.f);
        store_global(to + kRead * kC, valid ? static_cast<float>(p.scale) : 0.f);
    }

    LSM_DEVICE void clear() {
        for (int i = threadIdx.x; i < kC * kC; i += kThreads) {
            u32 const at = Square::offset(i / kC, i % kC);
            s.A[i / kC][i % kC] = 0.f;
            *reinterpret_cast<bf16*>(s.P + at) = bf16(0.f);
            if constexpr (Sources) {
                s.A_values[i / kC][i % kC] = 0.f;
                *reinterpret_cast<bf16*>(s.P_values + at) = bf16(0.f);
            }
        }
    }

    LSM_DEVICE void set_A(int t, int from, float x) { s.A[t][from] = Sources ? -x : s.beta[t] * x; }
    LSM_DEVICE void set_P(char* P, int t, int from, float x) {
        *reinterpret_cast<bf16*>(P + Square::offset(t, from)) =
            bf16(static_cast<float>(p.scale) * x);
    }

    // Pairs that part at level w < 16, of a block of 16 rows: eight rows of x and of y, right of
    // the cut, against eight of x, and of y, left of it.
    LSM_DEVICE void relate_block(int w, int block) {
        float acc[Sources ? 2 : 1][4] = {};
        int const r = 16 * block + right_row(lane % 8, w), l = 16 * block + left_row(lane % 8, w);
        char const* const rows = lane / 8 % 2 == 0 ? s.x : s.y;
        LSM_UNROLL_BY(2)
        for (int kk = 0; kk < K / 32; ++kk) {
            u32 a[2][4], b[4];
            LSM_UNROLL
            for (int i = 0; i < 2; ++i)
                ldmatrix_x4(a[i],
                            smem_u32(rows) + Wide::offset(r, 32 * kk + 16 * i + lane / 16 * 8));
            LSM_UNROLL
            for (int source = 0; source < (Sources ? 2 : 1); ++source) {
                ldmatrix_x4(
                    b, smem_u32(source == 0 ? s.x : s.y) + Wide::offset(l, 32 * kk + lane / 8 * 8));
                mma(acc[source], a[0], b[0], b[1]);
                mma(acc[source], a[1], b[2], b[3]);
            }
        }
        int const t = right_row(lane / 4, w);
        LSM_UNROLL
        for (int e = 0; e < 2; ++e) {
            int const from = left_row(lane % 4 * 2 + e, w);
            if ((t ^ from) >= 2 * w) continue;  // of another block of 2 w
            set_A(16 * block + t, 16 * block + from, acc[0][e]);
            set_P(s.P, 16 * block + t, 16 * block + from, acc[0][2 + e]);
            if constexpr (Sources) {
                s.A_values[16 * block + t][16 * block + from] = acc[1][e];
                set_P(s.P_values, 16 * block + t, 16 * block + from, acc[1][2 + e]);
            }
        }
    }

    // The second half of the chunk against the first: A, P, A_v or P_v.
    LSM_DEVICE void relate_halves(int which) {
        float acc[2][4] = {};
        product(which % 2 == 0 ? s.x : s.y, 16, which < 2 ? s.x : s.y, 0, acc);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const t = 16 + lane / 4 + i % 4 / 2 * 8, from = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float const x = acc[i / 4][i % 4];
            if (which == 0) set_A(t, from, x);
            if (which == 1) set_P(s.P, t, from, x);
            if constexpr (Sources) {
                if (which == 2) s.A_values[t][from] = x;
                if (which == 3) set_P(s.P_values, t, from, x);
            }
        }
    }

    LSM_DEVICE void relate_diagonal(char const* rows, char* P, int block) {
        float acc[2][4] = {};
        product(s.q, 16 * block, rows, 16 * block, acc);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const t = lane / 4 + i % 4 / 2 * 8, from = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (t == from) set_P(P, 16 * block + t, 16 * block + from, acc[i / 4][i % 4]);
        }
    }

    LSM_DEVICE void product(char const* left, int row, char const* right, int column,
                            float (&acc)[2][4]) {
        LSM_UNROLL_BY(2)
        for (int kk = 0; kk < K / 16; ++kk) {
            u32 a[4], b[4];
            ldmatrix_x4(a, smem_u32(left) + Wide::rows_first(row, 16 * kk, lane));
            ldmatrix_x4(b, smem_u32(right) + Wide::columns_first(column, 16 * kk, lane));
            mma(acc[0], a, b[0], b[1]);
            mma(acc[1], a, b[2], b[3]);
        }
    }

    LSM_DEVICE void relate(int w) {
        if (w == 16) {
            if (warp < 2 || Sources) relate_halves(warp);
        } else if (warp < 2) {
            relate_block(w, warp);
        } else if (w == 1) {
            relate_diagonal(erased(), s.P, warp - 2);
            if constexpr (Sources) relate_diagonal(s.k, s.P_values, warp - 2);
        }
    }

    // The decay of what erases, from the start of row t's half of w rows.
    template <int w>
    LSM_DEVICE static float erase_factor(float const (&prefix)[kC], int t) {
        if (!Sources) return prefix[t];
        return (t & (w - 1)) == 0 ? 1.f : prefix[t - 1];
    }

    template <int w>
    LSM_DEVICE void scale_level(int c, float const (&prefix)[kC], float const (&suffix)[kC]) {
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            if (t & w) {
                set_element<K>(s.x, t, c, element<K>(erasers(), t, c) * erase_factor<w>(prefix, t));
                set_element<K>(s.y, t, c, element<K>(s.q, t, c) * prefix[t]);
            } else {
                set_element<K>(s.x, t, c, element<K>(erased(), t, c) * suffix[t]);
                if constexpr (Sources) set_element<K>(s.y, t, c, element<K>(s.k, t, c) * suffix[t]);
            }
        }
    }

    template <int w>
    LSM_DEVICE void level(int c, float (&prefix)[kC], float (&suffix)[kC]) {
        if (c < K) scale_level<w>(c, prefix, suffix);
        __syncthreads();  // the level's rows are complete
        relate(w);
        __syncthreads();  // nobody needs them any more
        merge<w>(prefix, suffix);
    }

    // A thread per channel.
    LSM_DEVICE void levels() {
        int const c = threadIdx.x;
        bool const owner = c < K;
        float prefix[kC], suffix[kC];
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            prefix[t] = owner ? channel_factor(p, chunk, head, t, c) : 1.f;
            suffix[t] = 1.f;
        }
        cp_async_wait<0>();
        __syncthreads();  // the rows have landed
        level<1>(c, prefix, suffix);
        level<2>(c, prefix, suffix);
        level<4>(c, prefix, suffix);
        level<8>(c, prefix, suffix);
        level<16>(c, prefix, suffix);
        if (!owner) return;
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            float const k = element<K>(s.k, t, c);
            set_element<K>(s.x, t, c, element<K>(erasers(), t, c) * erase_factor<kC>(prefix, t));
            set_element<K>(s.y, t, c, element<K>(s.q, t, c) * prefix[t]);
            if constexpr (Sources) set_element<K>(s.b, t, c, element<K>(s.b, t, c) * suffix[t]);
            set_element<K>(s.k, t, c, k * suffix[t]);
        }
        store_global(work.scratch.decay + chunk.slot * K + c, prefix[kC - 1]);
    }

    LSM_DEVICE void store_tile(char const* tile, bf16* to) {
        for (int i = threadIdx.x; i < kC * K / 8; i += kThreads) {
            store_global(
                reinterpret_cast<uint4*>(to) + i,
                *reinterpret_cast<uint4 const*>(tile + Wide::offset(i / (K / 8), i % (K / 8) * 8)));
        }
    }

    // T A_v, as T.
    LSM_DEVICE void solve_values() {
        float x[kC];
        this->substitute(x, [&](int t) { return s.A_values[t][lane]; });
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            this->put(t, x[t], s.second);
            if (this->backward)
                this->keep(t, x[t], work.scratch.solve_values + chunk.slot * 2 * kC * kC);
        }
    }

    LSM_DEVICE void run() {
        load();
        clear();
        if (warp == 0) scalars();
        levels();
        __syncthreads();
        store_tile(s.x, work.scratch.erase + chunk.slot * kC * K);
        store_tile(s.y, work.scratch.query + chunk.slot * kC * K);
        if (warp == 0) this->template solve<false>();
        if constexpr (Sources) {
            if (warp == 1) solve_values();
        }
        __syncthreads();
        this->fold_reads(s.solve, nullptr, work.scratch.r);
        this->fold_writes(s.solve, erased(), nullptr, work.scratch.z, work.scratch.z_rest);
        if constexpr (Sources) {
            this->fold_reads(s.second, s.P_values, work.scratch.r_values);
            this->fold_writes(s.second, s.b, s.k, work.scratch.z_values, nullptr);
        }
    }
};

template <int K, bool Sources>
__global__ void __launch_bounds__(128) prepare_channels(DeltaWork const work, bool backward) {
    using Kernel = PrepareChannels<K, Sources>;
    int head;
    bool poison;
    Chunk const chunk = chunk_of_block(work, head, poison);
    if (chunk.rows == 0 || poison) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    int const tid = threadIdx.x;
    Kernel{{work, work.p, shared, chunk, head, tid % 32, tid / 32, backward}, shared}.run();
}

}  // namespace lsm::delta
