// gradients.cuh for decay by key channel. What rows give each other is summed level by level
// (levels.cuh): at each, dP and dA are masked to its pairs, meet the level's rows of k and q, and
// the result takes the other factor, row by row.
//
// The gate's gradient likewise: a level's pair (s, t) has its gates in two pieces, of the right
// half up to t and of the left half after s. So with r_t = q.dq + x.dx and l_s = k.dk of that level
// alone, by channel,
//
//     dg_u += sum of r_t over t >= u in u's half, if that is a right one, else of l_s over s < u in it,
//
// and the same once for the chunk as a whole and what crosses its ends. Again nothing is
// subtracted.
#pragma once

#include "kernels/delta/gradients.cuh"
#include "kernels/delta/levels.cuh"

namespace lsm::delta {

template <int K, bool Sources>
struct LevelScratch {
    static constexpr int kPitch = K + 8;    // rows of a fragment fall into different banks
    alignas(128) char x[kC * K * 2];        // k, or a and b, by the row's factor at the level
    alignas(128) char y[kC * K * 2];        // q right of the cut; left of it k of sources, or zeros
    alignas(16) char P[2][Square::kBytes];  // c dP; of sources: of b, of k
    alignas(16) char A[2][Square::kBytes];  // dA; and w dA, or of sources: of b, of k
    alignas(16) float prefix[kC][kPitch], suffix[kC][kPitch];
    alignas(16) float crossing[kC][kPitch];              // r_t right of the cut, l_s left of it
    alignas(16) float erased[Sources ? kC : 1][kPitch];  // of r_t what a gives, t - 1 for t
    alignas(16) float dg[kC][K];
    float diagonal[2][kC];  // of P
};
template <int K>
struct PairScratch<K, Form::channels> : LevelScratch<K, false> {};
template <int K>
struct PairScratch<K, Form::sources> : LevelScratch<K, true> {};

template <int K, Form form>
struct GradientsChannels : Gradients<K, form == Form::sources, form> {
    static constexpr bool kSources = form == Form::sources;
    using Base = Gradients<K, kSources, form>;
    using Base::Base;
    using Base::dq, Base::dx, Base::dk, Base::relation, Base::flux, Base::source;
    using Base::kColumns, Base::kThreads, Base::kTiles;
    using Base::p, Base::s, Base::chunk, Base::head, Base::lane, Base::warp, Base::m, Base::j;
    using typename Base::Wide;

    // What a state's gradient gives is db of sources, else dk.
    LSM_DEVICE float (&writes())[kTiles][4] {
        if constexpr (kSources)
            return source.db;
        else
            return dk;
    }
    LSM_DEVICE char const* erased() const {
        if constexpr (kSources) return s.b;
        return s.k;
    }
    LSM_DEVICE float beta(int t) const {
        if constexpr (kSources) return 1.f;
        return s.beta[t];
    }

    // Two channels' per thread, where the levels' rows of q come later.
    LSM_DEVICE float* flux_parts() const { return reinterpret_cast<float*>(s.after.y); }

    LSM_DEVICE void store_pairs() {
        store_pairs(relation, 0);
        if constexpr (kSources) store_pairs(source.relation, 1);
    }

    LSM_DEVICE void store_pairs(float const (&of)[2][4], int which) {
        bool const reads = this->reads();
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = 16 * m + lane / 4 + 8 * half_;
            float const by = reads ? static_cast<float>(p.scale) : kSources ? 1.f : -1.f;
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                int const column = 16 * this->block() + 8 * n + lane % 4 * 2;
                float x[2];
                LSM_UNROLL
                for (int e = 0; e < 2; ++e) {
                    bool const keep = reads ? column + e <= t : column + e < t;
                    x[e] = keep ? by * of[n][2 * half_ + e] : 0.f;
                    if (reads && column + e == t) s.after.diagonal[which][t] = x[e];
                }
                u32 const at = Square::offset(t, column);
                *reinterpret_cast<u32*>((reads ? s.after.P : s.after.A)[which] + at) =
                    pack_bf16(x[0], x[1]);
                if (!kSources && !reads) {
                    *reinterpret_cast<u32*>(s.after.A[1] + at) =
                        pack_bf16(beta(t) * x[0], beta(t) * x[1]);
                }
            }
        }
    }

    // Factors of the chunk as a whole. A thread per channel.
    LSM_DEVICE void chunk_factors() {
        int const c = threadIdx.x;
        if (c >= K) return;
        float product = 1.f;
        LSM_UNROLL_BY(2)
        for (int t = 0; t < kC; ++t) {
            float const a = channel_factor(p, chunk, head, t, c);
            product *= a;
            s.after.prefix[t][c] = product;
            s.after.crossing[t][c] = a;
        }
        product = 1.f;
        LSM_UNROLL_BY(2)
        for (int t = kC - 1; t >= 0; --t) {
            s.after.suffix[t][c] = product;
            product *= s.after.crossing[t][c];
        }
    }

    LSM_DEVICE int row(int half_) const { return 16 * m + lane / 4 + 8 * half_; }
    LSM_DEVICE int column(int n) const { return j * kColumns + 8 * n + lane % 4 * 2; }
    LSM_DEVICE static float2 pair_of(char const* tile, int t, int c) {
        return unpack(*reinterpret_cast<u32 const*>(tile + Wide::offset(t, c)));
    }
    // Of what erases, within halves of w rows.
    LSM_DEVICE float2 erase_factor(int w, int t, int c) const {
        if constexpr (kSources) {
            if ((t & (w - 1)) == 0) return {1.f, 1.f};
            return pair_at(&s.after.prefix[t - 1][c], 0);
        }
        return pair_at(&s.after.prefix[t][c], 0);
    }
    LSM_DEVICE static float2 times(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
    LSM_DEVICE static float2 times(float a, float2 b) { return {a * b.x, a * b.y}; }
    LSM_DEVICE static float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
    LSM_DEVICE static float2& at(float* x) { return *reinterpret_cast<float2*>(x); }

    // What the states gave, by the rows' factors; and the own terms of P.
    LSM_DEVICE void scale_ends() {
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = row(half_), i = 2 * half_;
            float const scale = static_cast<float>(p.scale), sign = kSources ? 1.f : -beta(t);
            LSM_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                int const c = column(n);
                float2 const q = pair_of(s.q, t, c), x = pair_of(this->erasers(), t, c),
                             b = pair_of(erased(), t, c);
                float2 const before = pair_at(&s.after.prefix[t][c], 0),
                             after = pair_at(&s.after.suffix[t][c], 0);
                float2& to_q = at(&dq[n][i]);
                float2& to_x = at(&dx[n][i]);
                float2& to_b = at(&writes()[n][i]);
                to_q = times(times(scale, before), to_q);
                to_x = times(times(sign, erase_factor(kC, t, c)), to_x);
                to_b = times(after, to_b);
                float2 const read = times(q, to_q), erase = times(x, to_x);
                float2 written = times(b, to_b);
                float const own = s.after.diagonal[0][t];
                to_q = plus(to_q, times(own, b));
                to_b = plus(to_b, times(own, q));
                if constexpr (kSources) {
                    float2 const k = pair_of(s.k, t, c);
                    float2& to_k = at(&dk[n][i]);
                    to_k = times(after, to_k);
                    written = plus(written, times(k, to_k));
                    float const values = s.after.diagonal[1][t];
                    to_q = plus(to_q, times(values, k));
                    to_k = plus(to_k, times(values, q));
                    at(&s.after.crossing[t][c]) = read;
                    at(&s.after.erased[t][c]) = erase;
                } else {
                    at(&s.after.crossing[t][c]) = plus(read, erase);
                }
                at(&s.after.dg[t][c]) = written;
            }
        }
    }

    // dg of what crosses the chunk's ends. A thread per channel.
    LSM_DEVICE void sum_ends() {
        int const c = threadIdx.x;
        if (c >= K) return;
        float through = 0.f;
        for (int i = c / 2; i < kThreads; i += K / 2) through += flux_parts()[2 * i + c % 2];
        through *= s.after.prefix[kC - 1][c];
        float sum = 0.f;
        LSM_UNROLL_BY(2)
        for (int t = kC - 1; t >= 0; --t) {
            sum += s.after.crossing[t][c];
            s.after.crossing[t][c] = sum;
            if constexpr (kSources) sum += s.after.erased[t][c];
        }
        sum = through;
        LSM_UNROLL_BY(2)
        for (int t = 0; t < kC; ++t) {
            float const left = s.after.dg[t][c];
            s.after.dg[t][c] = s.after.crossing[t][c] + sum;
            sum += left;
        }
    }

    // A thread per channel and half of the chunk.
    LSM_DEVICE int channel() const { return threadIdx.x % K; }
    LSM_DEVICE int first() const { return threadIdx.x / K * 16; }
    LSM_DEVICE bool owns() const { return threadIdx.x < 2 * K; }

    LSM_DEVICE void start_levels() {
        LSM_UNROLL_BY(2)
        for (int t = first(); t < first() + 16; ++t) {
            s.after.prefix[t][channel()] = channel_factor(p, chunk, head, t, channel());
            s.after.suffix[t][channel()] = 1.f;
        }
    }

    LSM_DEVICE void scale_level(int w) {
        int const c = channel();
        LSM_UNROLL_BY(2)
        for (int t = first(); t < first() + 16; ++t) {
            if (t & w) {
                float const f = s.after.prefix[t][c];
                float const e = !kSources ? f : (t & (w - 1)) == 0 ? 1.f : s.after.prefix[t - 1][c];
                set_element<K>(s.after.x, t, c, element<K>(this->erasers(), t, c) * e);
                set_element<K>(s.after.y, t, c, element<K>(s.q, t, c) * f);
            } else {
                float const f = s.after.suffix[t][c];
                set_element<K>(s.after.x, t, c, element<K>(erased(), t, c) * f);
                set_element<K>(s.after.y, t, c, kSources ? element<K>(s.k, t, c) * f : 0.f);
            }
        }
    }

    LSM_DEVICE void sum_level(int w) {
        int const c = channel(), begin = first();
        float sum = 0.f;
        LSM_UNROLL_BY(2)
        for (int t = begin + 15; t >= begin; --t) {
            if (((t + 1) & (w - 1)) == 0) sum = 0.f;
            sum += s.after.crossing[t][c];
            if (t & w) {
                s.after.dg[t][c] += sum;
                if constexpr (kSources) sum += s.after.erased[t][c];
            }
        }
        LSM_UNROLL_BY(2)
        for (int t = begin; t < begin + 16; ++t) {
            if ((t & (w - 1)) == 0) sum = 0.f;
            if (!(t & w)) s.after.dg[t][c] += sum;
            sum += s.after.crossing[t][c];
        }
    }

    // The pairs of a 16 x 16 block that part at level w, in an A operand.
    LSM_DEVICE void keep_level(int w, u32 (&a)[4]) const {
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            int const r = lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
            auto const parts = [&](int d) { return d >= w && d < 2 * w; };
            if (!parts(r ^ c)) a[i] &= 0xffff0000u;
            if (!parts(r ^ (c + 1))) a[i] &= 0xffffu;
        }
    }

    // A level's products, by the rows' factors. Of rows right of the cut: dq and dx; dots: of x
    // with dx, before beta, for the warp's rows lane / 4 and that + 8.
    LSM_DEVICE void level_reads(int w, float (&dots)[2]) {
        int const left = w == 16 ? 0 : 16 * m;
        constexpr int kOf = kSources ? 2 : 1;
        u32 reads[kOf][4], erases[kOf][4];
        LSM_UNROLL
        for (int of = 0; of < kOf; ++of) {
            ldmatrix_x4(reads[of],
                        smem_u32(s.after.P[of]) + Square::rows_first(16 * m, left, lane));
            ldmatrix_x4(erases[of],
                        smem_u32(s.after.A[of]) + Square::rows_first(16 * m, left, lane));
            if (w < 16) keep_level(w, reads[of]), keep_level(w, erases[of]);
        }
        LSM_UNROLL
        for (int i = 0; i < kTiles / 2; ++i) {
            float q[2][4] = {}, x[2][4] = {};
            LSM_UNROLL
            for (int of = 0; of < kOf; ++of) {
                u32 b[4];
                ldmatrix_x4_trans(b, smem_u32(of == 0 ? s.after.x : s.after.y) +
                                         Wide::rows_first(left, j * kColumns + 16 * i, lane));
                mma(q[0], reads[of], b[0], b[1]), mma(q[1], reads[of], b[2], b[3]);
                mma(x[0], erases[of], b[0], b[1]), mma(x[1], erases[of], b[2], b[3]);
            }
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) take_reads(w, 2 * i + n, q[n], x[n], dots);
        }
    }

    LSM_DEVICE void take_reads(int w, int n, float const (&q)[4], float const (&x)[4],
                               float (&dots)[2]) {
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = row(half_), c = column(n), i = 2 * half_;
            if (!(t & w)) continue;
            float2 const from_q = times(pair_at(&s.after.prefix[t][c], 0), float2{q[i], q[i + 1]});
            float2 const from_x = times(erase_factor(w, t, c), float2{x[i], x[i + 1]});
            float2 const dot = times(pair_of(this->erasers(), t, c), from_x);
            float2 const read = times(pair_of(s.q, t, c), from_q);
            at(&dq[n][i]) = plus(at(&dq[n][i]), from_q);
            at(&dx[n][i]) = plus(at(&dx[n][i]), times(beta(t), from_x));
            if constexpr (kSources) {
                at(&s.after.crossing[t][c]) = read;
                at(&s.after.erased[t][c]) = dot;
            } else {
                dots[half_] += dot.x + dot.y;
                at(&s.after.crossing[t][c]) = plus(read, times(beta(t), dot));
            }
        }
    }

    // Of rows left of the cut: dk, or db and dk.
    LSM_DEVICE void level_writes(int w) {
        level_writes(w, s.after.P[0], s.after.A[kSources ? 0 : 1], erased(), writes(), false);
        if constexpr (kSources) level_writes(w, s.after.P[1], s.after.A[1], s.k, dk, true);
    }

    LSM_DEVICE void level_writes(int w, char const* P, char const* A, char const* own,
                                 float (&to)[kTiles][4], bool add) {
        int const right = w == 16 ? 16 : 16 * m;
        u32 reads[4], erases[4];
        ldmatrix_x4_trans(reads, smem_u32(P) + Square::columns_first(right, 16 * m, lane));
        ldmatrix_x4_trans(erases, smem_u32(A) + Square::columns_first(right, 16 * m, lane));
        if (w < 16) keep_level(w, reads), keep_level(w, erases);
        LSM_UNROLL
        for (int i = 0; i < kTiles / 2; ++i) {
            float k[2][4] = {};
            u32 const place = Wide::rows_first(right, j * kColumns + 16 * i, lane);
            u32 b[4];
            ldmatrix_x4_trans(b, smem_u32(s.after.y) + place);
            mma(k[0], reads, b[0], b[1]), mma(k[1], reads, b[2], b[3]);
            ldmatrix_x4_trans(b, smem_u32(s.after.x) + place);
            mma(k[0], erases, b[0], b[1]), mma(k[1], erases, b[2], b[3]);
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) take_writes(w, 2 * i + n, k[n], own, to[2 * i + n], add);
        }
    }

    LSM_DEVICE void take_writes(int w, int n, float const (&k)[4], char const* rows, float (&to)[4],
                                bool add) {
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const t = row(half_), c = column(n), i = 2 * half_;
            if (t & w) continue;
            float2 const from = times(pair_at(&s.after.suffix[t][c], 0), float2{k[i], k[i + 1]});
            float2 const own = times(pair_of(rows, t, c), from);
            at(&to[i]) = plus(at(&to[i]), from);
            float2& crossing = at(&s.after.crossing[t][c]);
            crossing = add ? plus(crossing, own) : own;
        }
    }

    LSM_DEVICE void store_gates() {
        if (p.dg.data == nullptr || !owns() || channel() >= p.K) return;
        int const n = static_cast<int>(p.n);
        i64 const base = chunk.batch * p.dg.batch + chunk.token * p.dg.time + head * p.dg.head;
        for (int t = first(); t < first() + 16 && t < chunk.rows; ++t) {
            if (t % n == 0) {
                this->store_as(p.dg.data, p.gate_dtype, base + t / n * p.dg.time + channel(),
                               s.after.dg[t][channel()]);
            }
        }
    }

    LSM_DEVICE void store_betas() {
        if (warp != 0 || lane >= chunk.rows) return;
        float const* const parts = &s.ends[0][0][lane];
        this->store_as(
            p.dbeta.data, p.beta_dtype,
            chunk.batch * p.dbeta.batch + (chunk.row + lane) * p.dbeta.time + head * p.dbeta.head,
            s.dbeta[lane] + (parts[0] + parts[kC] + (parts[2 * kC] + parts[3 * kC])));
    }

    LSM_DEVICE void run() {
        this->contract();
        flux_parts()[2 * threadIdx.x] = flux[0], flux_parts()[2 * threadIdx.x + 1] = flux[1];
        store_pairs();
        chunk_factors();
        __syncthreads();  // pairs and factors of the chunk
        scale_ends();
        __syncthreads();  // what crosses the ends
        sum_ends();
        __syncthreads();  // factors may be replaced
        if (owns()) start_levels();
        float dots[2] = {};
        LSM_UNROLL_BY(1)
        for (int w = 1; w < kC; w *= 2) {
            if (owns()) scale_level(w);
            __syncthreads();  // the level's rows are complete
            if (w < 16 || m == 1) level_reads(w, dots);
            if (w < 16 || m == 0) level_writes(w);
            __syncthreads();  // as are its results
            if (!owns()) continue;
            sum_level(w);
            if (w < 16) merge_level(w);
        }
        if constexpr (!kSources) {
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                dots[half_] += __shfl_xor_sync(0xffffffffu, dots[half_], 1);
                dots[half_] += __shfl_xor_sync(0xffffffffu, dots[half_], 2);
                if (lane % 4 == 0) s.ends[0][j][row(half_)] = dots[half_];
            }
        }
        store_gates();
        __syncthreads();
        this->store(p.dq, chunk.token, static_cast<int>(p.n), dq);
        if constexpr (kSources) {
            this->store(p.derase, chunk.row, 1, dx);
            this->store(p.dwrite, chunk.row, 1, source.db);
        } else {
            store_betas();
            LSM_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e) dk[i][e] += dx[i][e];
            }
        }
        this->store(p.dk, chunk.row, 1, dk);
    }

    LSM_DEVICE void merge_level(int w) {
        int const c = channel(), begin = first();
        LSM_UNROLL_BY(1)
        for (int block = begin; block < begin + 16; block += 2 * w) {
            float const left = s.after.prefix[block + w - 1][c],
                        right = s.after.prefix[block + 2 * w - 1][c];
            LSM_UNROLL_BY(1)
            for (int i = 0; i < w; ++i) {
                s.after.suffix[block + i][c] *= right;
                s.after.prefix[block + w + i][c] *= left;
            }
        }
    }

    // NaN in everything.
    LSM_DEVICE void poison() {
        this->poison_rows_and_beta();
        if (p.dg.data == nullptr || !owns() || channel() >= p.K) return;
        int const n = static_cast<int>(p.n);
        i64 const base = chunk.batch * p.dg.batch + chunk.token * p.dg.time + head * p.dg.head;
        for (int t = first(); t < first() + 16 && t < chunk.rows; ++t) {
            if (t % n == 0)
                this->store_as(p.dg.data, p.gate_dtype, base + t / n * p.dg.time + channel(),
                               nan_value());
        }
    }
};

template <int K, Form form>
__global__ void __launch_bounds__(256, form == Form::sources ? 1 : 2)
    gradients_channels(DeltaWork const work) {
    run_chunk<GradientsChannels<K, form>>(work);
}

}  // namespace lsm::delta
