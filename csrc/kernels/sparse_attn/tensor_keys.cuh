// dk and dv on tensor cores: the same the other way round. A warp has 16 keys of a tile and goes with the others through
// the queries that have them on their lists, head by head, so a group's query heads are added up in registers.
#pragma once

#include "kernels/sparse_attn/key_tile.cuh"
#include "kernels/sparse_attn/tensor_rows.cuh"

namespace lsm::sparse_attn {

// Of rows and columns as RowsConfig.
template <class T_, int D_, int N_, Want Wants_, int DV_ = D_>
struct KeysConfig {
    using T = T_;
    static constexpr int D = D_, DV = DV_, N = N_, Split = D > 256 ? 2 : 1, Together = Split;
    static constexpr Want Wants = Wants_;
    static constexpr int Warps = 4, kThreads = 32 * Warps;
    static constexpr int KSums = columns_each(D, Split), VSums = columns_each(DV, Split);
};

template <class Config>
struct KeysKernel : TileOfKeys<Config> {
    using Base = TileOfKeys<Config>;
    using Base::D, Base::N, Base::kRows, Base::kThreads, Base::kKeys, Base::kValues, Base::KSums,
        Base::VSums;
    using Base::lane, Base::warp, Base::strip, Base::part, Base::width_k, Base::width_v;
    using Base::work, Base::p, Base::s, Base::steps, Base::dk, Base::dv, Base::row_of;
    using typename Base::T;
    static constexpr int DV = Config::DV;

    using Keys = Matrix<kRows, D>;
    using Values = Matrix<kRows, DV>;
    using Queries = Matrix<N, D>;
    using Grads = Matrix<N, DV>;

    struct Stage {
        alignas(1024) char q[Queries::kBytes];
        alignas(1024) char grad_o[Grads::kBytes];
        typename Base::Numbers numbers;
    };
    struct SharedStorage {
        alignas(1024) char keys[Keys::kBytes];  // in the end dk
        alignas(1024) char values[Values::kBytes];
        Stage stage[2];
        typename Base::Shared tile;
    };

    SharedStorage& shared;

    LSM_DEVICE explicit KeysKernel(Work const& work_)
        : Base(work_, storage().tile, blockIdx.x, threadIdx.x == 0), shared(storage()) {}

    LSM_DEVICE static SharedStorage& storage() {
        return *reinterpret_cast<SharedStorage*>(dyn_smem());
    }

    LSM_DEVICE void load(int step) {
        Stage& to = shared.stage[step % 2];
        auto const at = [&](Rows const& x) {
            T const* const base = element<T>(x, s.tile.batch, s.tile.place.sequence.q0, s.head);
            return [&, base](int column) -> T const* {
                int const t = this->token(step, column);
                return t < 0 ? nullptr : base + t * x.time;
            };
        };
        load_tile_rows<T, D, N, kThreads>(p.q, to.q, width_k(), at(p.q));
        load_tile_rows<T, DV, N, kThreads>(p.grad_o, to.grad_o, width_v(), at(p.grad_o));
        if (threadIdx.x < N) {
            int const t = this->token(step, threadIdx.x);
            to.numbers.rows[threadIdx.x] = this->row(t);
            if (t < 0) {
                to.numbers.stats[threadIdx.x] = this->no_stats();
            } else {
                cp_async16(smem_u32(&to.numbers.stats[threadIdx.x]), this->stats_of(t), true);
            }
        }
        static_assert(N <= 32);
        if (!work.plain && lane() < N)
            to.numbers.bias[warp()][lane()] = this->bias(step, lane(), this->member(strip()));
        cp_async_commit();
    }

    template <bool kBent>
    LSM_DEVICE void attend(int step) {
        if (this->idle() || (kBent && this->skips(step))) return;
        Stage const& tiles = shared.stage[step % 2];
        Accumulators<N> x[1], grad[1];
        relate<T, Keys, Queries>(rows_of<Keys>(shared.keys, 16 * strip()),
                                 columns_of<Queries>(tiles.q), width_k(), x);
        if constexpr (kKeys)
            relate<T, Values, Grads>(rows_of<Values>(shared.values, 16 * strip()),
                                     columns_of<Grads>(tiles.grad_o), width_v(), grad);
        u32 const seen = kBent ? this->seen(step, tiles.numbers) : 0;
        this->template weigh<kBent>(seen, tiles.numbers, x[0], grad[0]);
        Operands<N> weights[1];
        if constexpr (kValues) {
            pack_weights<T, N>(x[0], weights[0]);
            gather<T, Grads, VSums, N>(
                weights, rows_of<Grads>(tiles.grad_o, 0) + Grads::offset(0, part() * VSums),
                width_v() - part() * VSums, dv);
        }
        if constexpr (kKeys) {
            pack_weights<T, N>(grad[0], weights[0]);
            gather<T, Queries, KSums, N>(
                weights, rows_of<Queries>(tiles.q, 0) + Queries::offset(0, part() * KSums),
                width_k() - part() * KSums, dk);
        }
    }

    // A query with odd stats may hold inf or NaN, which keys that it does not see would take 0 times. Its rows become
    // zeros: keys that it sees still get NaN, as its weights are inf.
    LSM_DEVICE void clear(int step) {
        Stage& tiles = shared.stage[step % 2];
        LSM_UNROLL_BY(1)
        for (int i = threadIdx.x; i < N * (D / 8); i += kThreads) {
            int const row = i / (D / 8);
            if (!is_odd(tiles.numbers.stats[row])) continue;
            int const c = i % (D / 8) * 8;
            *reinterpret_cast<uint4*>(tiles.q + Queries::offset(row, c)) = {0, 0, 0, 0};
            if (c < DV)
                *reinterpret_cast<uint4*>(tiles.grad_o + Grads::offset(row, c)) = {0, 0, 0, 0};
        }
        __syncthreads();
    }
    LSM_DEVICE void advance(int step, int count) {
        cp_async_wait<0>();
        bool const odd =
            threadIdx.x < N && is_odd(shared.stage[step % 2].numbers.stats[threadIdx.x]);
        if (__syncthreads_or(odd) != 0) clear(step);
        if (step + 1 < count) load(step + 1);
    }

    LSM_DEVICE void run() {
        if (s.tile.place.unused) return;
        if (s.tile.place.poison) return this->poison();
        load_tile_rows<T, D, kRows, kThreads>(p.k, shared.keys, width_k(),
                                              [&](int r) { return row_of(p.k, r); });
        load_tile_rows<T, DV, kRows, kThreads>(p.v, shared.values, width_v(),
                                               [&](int r) { return row_of(p.v, r); });
        cp_async_commit();
        this->start_sums();
        LSM_UNROLL_BY(1)
        for (int h = 0; h < work.group; ++h) {
            __syncthreads();  // the last head is done with
            if (warp() == 0) this->start_plan(s.tile.key_head * work.group + h);
            LSM_UNROLL_BY(1)
            do {
                __syncthreads();  // the last part is done with
                if (warp() == 0) this->plan_queries();
                __syncthreads();
                go_through(*this, s.plan, steps.each);
            } while (s.plan.more);
        }
        cp_async_wait<0>();
        __syncthreads();
        this->template store<Keys, Values>(shared.keys, shared.values);
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) tensor_keys(Work work) {
    KeysKernel<Config>(work).run();
}

}  // namespace lsm::sparse_attn
