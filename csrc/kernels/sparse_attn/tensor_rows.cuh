// Attention by tiles of queries on tensor cores: o and lse, or dq. A warp has MT x 16 rows of a tile and goes with the
// others through the keys of the tile's plan, N at a time, in two stages of shared memory. First come steps in which
// every row sees every key; masks and whatever else bends scores are the business of the steps after them.
#pragma once

#include "kernels/sparse_attn/query_tile.cuh"

namespace lsm::sparse_attn {

// Columns of a result that each of the warps that share it adds up.
constexpr int columns_each(int columns, int warps) {
    return (columns + 64 * warps - 1) / (64 * warps) * 64;
}

// With two tiles of 16 rows a warp, scores are plain and no token has a list of its own: there are no registers for more.
// K up to D, V up to DV. Beyond 256 columns two warps share a strip of rows, as one has no registers for its results.
template <class T_, int D_, int Warps_, int MT_, int N_, bool Backward_, int DV_ = D_>
struct RowsConfig {
    using T = T_;
    static constexpr int D = D_, DV = DV_, Warps = Warps_, MT = MT_, N = N_;
    static constexpr int Split = D > 256 ? 2 : 1, Together = Split;
    static constexpr int Sums = columns_each(Backward_ ? D : DV, Split);
    static constexpr bool Backward = Backward_, Plain = MT > 1, Unites = MT == 1;
    static constexpr int kThreads = 32 * Warps;
    static constexpr int kBlocks = kThreads <= 128 ? 2 : 1;  // per multiprocessor, at least
};

template <class Config>
struct RowsKernel : QueryTile<Config> {
    using Base = QueryTile<Config>;
    using Base::D, Base::MT, Base::N, Base::Split, Base::Sums, Base::kRows, Base::kThreads,
        Base::kBackward, Base::kPlain;
    using Base::row_of, Base::lane_row, Base::exists, Base::head, Base::token, Base::strip,
        Base::first_column;
    using Base::width_k, Base::width_v;
    using Base::work, Base::p, Base::s, Base::steps, Base::sums, Base::lane, Base::warp,
        Base::group;
    using typename Base::T;
    static constexpr int DV = Config::DV;
    using Queries = Matrix<kRows, D>;
    using Grads = Matrix<kRows, DV>;
    using Keys = Matrix<N, D>;
    using Values = Matrix<N, DV>;

    struct Stage {
        alignas(1024) char keys[Keys::kBytes];
        alignas(1024) char values[Values::kBytes];
    };
    struct SharedStorage {
        alignas(1024) char q[Queries::kBytes];  // in the end o, or dq
        alignas(1024) char grad_o[kBackward ? Grads::kBytes : 1024];
        Stage stage[2];
        typename Base::Shared tile;
    };

    SharedStorage& shared;

    LSM_DEVICE explicit RowsKernel(Work const& work_)
        : Base(work_, storage().tile), shared(storage()) {}

    LSM_DEVICE static SharedStorage& storage() {
        return *reinterpret_cast<SharedStorage*>(dyn_smem());
    }

    LSM_DEVICE void start() {
        load_tile_rows<T, D, kRows, kThreads>(p.q, shared.q, width_k(),
                                              [&](int m) { return row_of(p.q, m); });
        if constexpr (kBackward)
            load_tile_rows<T, DV, kRows, kThreads>(p.grad_o, shared.grad_o, width_v(),
                                                   [&](int m) { return row_of(p.grad_o, m); });
        cp_async_commit();
        this->start_rows();
    }

    LSM_DEVICE void load(int step) {
        Sequence const& sequence = s.place.sequence;
        Stage& to = shared.stage[step % 2];
        auto const at = [&](Rows const& x) {
            T const* const base = element<T>(x, s.batch, sequence.k0, s.key_head);
            return [&, base](int column) -> T const* {
                int const key = steps.token(s.plan, step, column);
                return key < 0 || key >= sequence.Tk ? nullptr : base + key * x.time;
            };
        };
        load_tile_rows<T, D, N, kThreads>(p.k, to.keys, width_k(), at(p.k));
        load_tile_rows<T, DV, N, kThreads>(p.v, to.values, width_v(), at(p.v));
        cp_async_commit();
    }

    template <bool kBent>
    LSM_DEVICE void step_forward(int step) {
        Stage const& tiles = shared.stage[step % 2];
        Accumulators<N> x[MT];
        relate<T, Queries, Keys>(rows_of<Queries>(shared.q, strip() * MT * 16),
                                 columns_of<Keys>(tiles.keys), width_k(), x);
        float by = work.scale * kLog2e;
        if constexpr (kBent) {
            this->bend_scores(step, x);
            by = 1.f;
        }
        Operands<N> weights[MT];
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            float fade[2];
            bool const moved = this->soften(m, x[m], by, fade);
            if constexpr (MT == 1) {
                if (work.least_weight > 0.f && !this->weighs(x[m])) return;
            }
            pack_weights<T, N>(x[m], weights[m]);
            if (__any_sync(0xffffffffu, moved)) this->fade_sums(m, fade);
        }
        gather<T, Values, Sums, N>(
            weights, rows_of<Values>(tiles.values, 0) + Values::offset(0, first_column()),
            width_v() - first_column(), sums);
    }

    template <bool kBent>
    LSM_DEVICE void step_backward(int step) {
        Stage const& tiles = shared.stage[step % 2];
        Accumulators<N> x[MT], grad[MT];
        relate<T, Queries, Keys>(rows_of<Queries>(shared.q, strip() * MT * 16),
                                 columns_of<Keys>(tiles.keys), width_k(), x);
        relate<T, Grads, Values>(rows_of<Grads>(shared.grad_o, strip() * MT * 16),
                                 columns_of<Values>(tiles.values), width_v(), grad);
        this->template differentiate<kBent>(step, x, grad, [] {});
        Operands<N> weights[MT];
        pack_weights<T, N>(x[0], weights[0]);
        gather<T, Keys, Sums, N>(weights,
                                 rows_of<Keys>(tiles.keys, 0) + Keys::offset(0, first_column()),
                                 width_k() - first_column(), sums);
    }

    // Stage `step` is here for everybody, and the one before it is not needed any more.
    LSM_DEVICE void advance(int step, int count) {
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < count) load(step + 1);
    }

    template <bool kBent>
    LSM_DEVICE void attend(int step) {
        if (s.idle[group()] || (kBent && this->skips(step))) return;
        if constexpr (kBackward) {
            step_backward<kBent>(step);
        } else {
            step_forward<kBent>(step);
        }
    }

    LSM_DEVICE void finish() {
        u32 odd[MT][2];
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            float by[2] = {work.scale, work.scale};
            if constexpr (kBackward) {
                this->find_odd(m, this->lse, odd[m]);
                if (work.ramp_parts != nullptr) this->store_ramp();
            } else {
                this->find_odd(m, this->sum[m], odd[m]);
                this->finish_softmax(m, by);
            }
            __syncwarp();
            store_tile_rows<T, Queries>(
                shared.q, (strip() * MT + m) * 16, kBackward ? width_k() : width_v(), sums[m],
                by[0], by[1], [&](int row) { return row_of(kBackward ? p.dq : p.o, row); },
                first_column());
            if constexpr (Split > 1) this->share_odd(odd[m]);
        }
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) this->repair(m, odd[m]);
    }

    LSM_DEVICE void run() {
        if (s.place.unused) return;
        if (s.place.poison) return this->poison();
        start();
        if (warp() == 0) this->start_plan();
        LSM_UNROLL_BY(1)
        do {
            __syncthreads();  // the last part is done with
            if (warp() == 0) this->plan_part();
            this->clear_bias();
            __syncthreads();
            go_through(*this, s.plan, steps.each);
            if constexpr (kBackward) {
                if (this->biased()) {
                    __syncthreads();
                    this->store_bias();
                }
            }
        } while (s.plan.more);
        cp_async_wait<0>();
        __syncthreads();  // q, if there was no step at all
        finish();
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    tensor_rows(__grid_constant__ Work const work) {
    RowsKernel<Config>(work).run();
}

}  // namespace lsm::sparse_attn
