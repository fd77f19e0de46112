// prepare.cuh for decay by key channel: A and P pair by pair of half blocks (levels.cuh), and X and Y with the decay since the
// chunk began, for the chains.
#pragma once

#include "kernels/delta/levels.cuh"
#include "kernels/delta/prepare.cuh"

namespace lsm::delta {

template <int K>
struct PrepareChannels : Prepare<K> {
    using Base = Prepare<K>;
    using Base::chunk, Base::head, Base::kThreads, Base::lane, Base::p, Base::warp, Base::work;
    using typename Base::Wide;

    struct SharedStorage
        : Base::SharedStorage {           // x: rows of k at a level, right or left of the cut
        alignas(128) char y[kC * K * 2];  // rows of q, right of the cut
    };
    SharedStorage& s;

    LSM_DEVICE void scalars() {
        RowScalars const x = load_scalars(p, chunk, head);
        s.beta[lane] = x.beta;
        bool const valid = lane < chunk.rows;
        float* const to = work.scratch.coefficients + chunk.slot * 4 * kC + lane;
        store_global(to + kWrite * kC, x.beta);
        store_global(to + kErase * kC, valid ? -1.f : 0.f);
        store_global(to + kRead * kC, valid ? static_cast<float>(p.scale) : 0.f);
    }

    LSM_DEVICE void clear() {
        for (int i = threadIdx.x; i < kC * kC; i += kThreads) {
            s.A[i / kC][i % kC] = 0.f;
            *reinterpret_cast<bf16*>(s.P + Square::offset(i / kC, i % kC)) = bf16(0.f);
        }
    }

    LSM_DEVICE void set_read(int t, int s_, float x) {
        *reinterpret_cast<bf16*>(s.P + Square::offset(t, s_)) =
            bf16(static_cast<float>(p.scale) * x);
    }

    // Pairs that part at level w < 16, of a block of 16 rows: eight rows of k and of q, right of the cut, against eight of k,
    // left of it.
    LSM_DEVICE void relate_block(int w, int block) {
        float acc[4] = {};
        int const r = 16 * block + right_row(lane % 8, w), l = 16 * block + left_row(lane % 8, w);
        char const* const rows = lane / 8 % 2 == 0 ? s.x : s.y;
        LSM_UNROLL_BY(2)
        for (int kk = 0; kk < K / 32; ++kk) {
            u32 a[4], b[4];
            ldmatrix_x4(b, smem_u32(s.x) + Wide::offset(l, 32 * kk + lane / 8 * 8));
            LSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                ldmatrix_x4(a, smem_u32(rows) + Wide::offset(r, 32 * kk + 16 * i + lane / 16 * 8));
                mma(acc, a, b[2 * i], b[2 * i + 1]);
            }
        }
        int const t = right_row(lane / 4, w);
        LSM_UNROLL
        for (int e = 0; e < 2; ++e) {
            int const from = left_row(lane % 4 * 2 + e, w);
            if ((t ^ from) >= 2 * w) continue;  // of another block of 2 w
            s.A[16 * block + t][16 * block + from] = s.beta[16 * block + t] * acc[e];
            set_read(16 * block + t, 16 * block + from, acc[2 + e]);
        }
    }

    // The second half of the chunk against the first, for A or for P.
    LSM_DEVICE void relate_halves(bool reads) {
        float acc[2][4] = {};
        product(reads ? s.y : s.x, 16, s.x, 0, acc);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const t = 16 + lane / 4 + i % 4 / 2 * 8, from = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (reads) {
                set_read(t, from, acc[i / 4][i % 4]);
            } else {
                s.A[t][from] = s.beta[t] * acc[i / 4][i % 4];
            }
        }
    }

    LSM_DEVICE void relate_diagonal(int block) {
        float acc[2][4] = {};
        product(s.q, 16 * block, s.k, 16 * block, acc);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const t = lane / 4 + i % 4 / 2 * 8, from = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (t == from) set_read(16 * block + t, 16 * block + from, acc[i / 4][i % 4]);
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
            if (warp < 2) relate_halves(warp == 1);
        } else if (warp < 2) {
            relate_block(w, warp);
        } else if (w == 1) {
            relate_diagonal(warp - 2);
        }
    }

    template <int w>
    LSM_DEVICE void scale_level(int c, float const (&prefix)[kC], float const (&suffix)[kC]) {
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            float const k = element<K>(s.k, t, c);
            set_element<K>(s.x, t, c, k * (t & w ? prefix[t] : suffix[t]));
            if (t & w) set_element<K>(s.y, t, c, element<K>(s.q, t, c) * prefix[t]);
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
        __syncthreads();  // k and q have landed
        level<1>(c, prefix, suffix);
        level<2>(c, prefix, suffix);
        level<4>(c, prefix, suffix);
        level<8>(c, prefix, suffix);
        level<16>(c, prefix, suffix);
        if (!owner) return;
        LSM_UNROLL
        for (int t = 0; t < kC; ++t) {
            float const k = element<K>(s.k, t, c);
            set_element<K>(s.x, t, c, k * prefix[t]);
            set_element<K>(s.y, t, c, element<K>(s.q, t, c) * prefix[t]);
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

    LSM_DEVICE void run() {
        int const from = work.key_head(head), columns = static_cast<int>(p.K);
        load_rows<K, kThreads>(p.k, chunk.batch, chunk.row, from, chunk.rows, 1, 0, columns,
                               smem_u32(s.k));
        load_rows<K, kThreads>(p.q, chunk.batch, chunk.token, from, chunk.rows,
                               static_cast<int>(p.n), 0, columns, smem_u32(s.q));
        cp_async_commit();
        clear();
        if (warp == 0) scalars();
        levels();
        __syncthreads();
        store_tile(s.x, work.scratch.erase + chunk.slot * kC * K);
        store_tile(s.y, work.scratch.query + chunk.slot * kC * K);
        this->template finish<false>();
    }
};

template <int K>
__global__ void __launch_bounds__(128) prepare_channels(DeltaWork const work, bool backward) {
    using Kernel = PrepareChannels<K>;
    int head;
    bool poison;
    Chunk const chunk = chunk_of_block(work, head, poison);
    if (chunk.rows == 0 || poison) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    int const tid = threadIdx.x;
    Kernel{{work, work.p, shared, chunk, head, tid % 32, tid / 32, backward}, shared}.run();
}

}  // namespace lsm::delta
