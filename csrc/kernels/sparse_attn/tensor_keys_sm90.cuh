// dk and dv on Hopper: the tile of keys and the plan of tensor_keys.cuh, with products of warpgroups. A warpgroup has a
// tile of 64 keys; a warp of its own brings queries and dO, N at a time and head by head, into a ring of stages. Two such
// pairs share a multiprocessor, so that one multiplies while the other weighs: each has the shared memory and the named
// barriers of its tile, and they never wait for each other.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/sm90.cuh"
#include "kernels/sparse_attn/key_tile.cuh"
#include "kernels/sparse_attn/launch.h"

#include <algorithm>

namespace lsm::sparse_attn {

template <class T_, int D_>
struct WarpgroupKeysConfig {
    using T = T_;
    // 64 queries a step would be 20 to 200 bytes of spilled registers beyond 64 columns.
    static constexpr int D = D_, N = D == 64 ? 64 : 32, Warps = 4, Together = 4, Split = 1;
    static constexpr int KSums = D, VSums = D;
    static constexpr Want Wants = Want::both;
    static constexpr int kStages = 4;
    // Of a block of threads: warpgroups are its rows, the last one loads.
    static constexpr int kTiles = 2, kBlockThreads = 128 * (kTiles + 1);
    // Of a multiprocessor's 65536, what each thread that loads leaves to those that multiply.
    static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
};

template <class Config>
struct WarpgroupKeysKernel : TileOfKeys<Config> {
    using Base = TileOfKeys<Config>;
    using Base::D, Base::N, Base::kRows, Base::kThreads, Base::Warps;
    using Base::lane, Base::warp, Base::width_k, Base::width_v;
    using Base::work, Base::p, Base::s, Base::steps, Base::dk, Base::dv, Base::row_of;
    using typename Base::T;
    static constexpr int kStages = Config::kStages, kSlabs = D / 64, kTiles = Config::kTiles;
    using Keys = Slabs<kRows, D>;
    using Queries = Slabs<N, D>;

    struct Stage {
        alignas(1024) char q[N * D * 2];
        alignas(1024) char grad_o[N * D * 2];
        typename Base::Numbers numbers;
        bool odd;  // some query's rows are to be cleared
    };
    struct SharedStorage {
        alignas(1024) char keys[kRows * D * 2];  // in the end dk
        alignas(1024) char values[kRows * D * 2];
        Stage stage[kStages];
        Turns<kStages> turns;
        typename Base::Shared tile;
    };

    SharedStorage& shared;
    CUtensorMap const &query_map, &grad_map;
    int taken = 0;  // steps of the parts before

    LSM_DEVICE WarpgroupKeysKernel(Work const& work_, CUtensorMap const& queries,
                                   CUtensorMap const& grads)
        : Base(work_, storage().tile, kTiles * blockIdx.x + tile_of_block(),
               threadIdx.x == 0 && !loads()),
          shared(storage()),
          query_map(queries),
          grad_map(grads) {}

    LSM_DEVICE static bool loads() { return threadIdx.y == kTiles; }
    // Whose keys, or whose loader, this warp has.
    LSM_DEVICE static int tile_of_block() {
        return loads() ? min(warp(), kTiles - 1) : static_cast<int>(threadIdx.y);
    }
    LSM_DEVICE static SharedStorage& storage() {
        return reinterpret_cast<SharedStorage*>(dyn_smem())[tile_of_block()];
    }

    // Between the warp that plans and those that have keys: a part of the plan is there, or done with.
    LSM_DEVICE void meet() { NamedBarrier::arrive_and_wait(kThreads + 32, 2 * tile_of_block()); }

    // ---- The warp that plans and loads ----

    LSM_DEVICE void load(int step) {
        int const turn = taken + step, stage = turn % kStages;
        Stage& to = shared.stage[stage];
        uint64_t* const full = &shared.turns.full[stage];
        shared.turns.wait_empty(turn);
        if (lane() == 0) Mbarrier::arrive_and_expect_tx(full, 2 * N * D * 2);
        __syncwarp();
        // A unit that is none lies outside of the tensor, as do queries past its end.
        LSM_UNROLL_BY(1)
        for (int i = lane(); i < 2 * steps.each * kSlabs; i += 32) {
            int const unit = i / 2 / kSlabs, slab = i / 2 % kSlabs;
            load_box(i % 2 == 0 ? query_map : grad_map, full,
                     (i % 2 == 0 ? to.q : to.grad_o) +
                         Queries::offset(unit << steps.size_shift, 64 * slab),
                     64 * slab, s.head,
                     static_cast<int>(s.tile.place.sequence.q0) +
                         s.plan.at(step * steps.each + unit).first,
                     s.tile.batch);
        }
        bool odd = false;
        LSM_UNROLL
        for (int i = 0; i < N; i += 32) {
            int const column = i + lane(), t = this->token(step, column);
            float4 stats = this->no_stats();
            if (t >= 0) {
                stats = load_global(this->stats_of(t));
            } else if (work.first != nullptr) {
                stats.x = infinity();  // after a packed sequence comes the next one: to be cleared
            }
            odd |= is_odd(stats);
            to.numbers.rows[column] = this->row(t);
            to.numbers.stats[column] = stats;
        }
        if (!work.plain) {
            LSM_UNROLL_BY(1)
            for (int i = lane(); i < Warps * N; i += 32)
                to.numbers.bias[i / N][i % N] = this->bias(step, i % N, this->member(i / N));
        }
        odd = __any_sync(0xffffffffu, odd) != 0;
        if (lane() == 0) to.odd = odd;
        Mbarrier::arrive(full);
    }

    LSM_DEVICE void produce() {
        LSM_UNROLL_BY(1)
        for (int h = 0; h < work.group; ++h) {
            this->start_plan(s.tile.key_head * work.group + h);
            LSM_UNROLL_BY(1)
            do {
                this->plan_queries();
                meet();
                int const count = s.plan.steps(steps.each);
                LSM_UNROLL_BY(1)
                for (int step = 0; step < count; ++step) load(step);
                taken += count;
                meet();
            } while (s.plan.more);
        }
    }

    // ---- Warpgroups ----

    LSM_DEVICE Stage& stage(int step) { return shared.stage[(taken + step) % kStages]; }

    // As in tensor_keys.cuh: rows that keys which do not see them must not take 0 times. Every step is waited for by all,
    // in order.
    LSM_DEVICE void wait_for(int step) {
        shared.turns.wait_full(taken + step);
        Stage& tiles = stage(step);
        if (!tiles.odd) return;
        LSM_UNROLL_BY(1)
        for (int i = threadIdx.x; i < N * (D / 8); i += kThreads) {
            int const row = i / (D / 8), c = i % (D / 8) * 8;
            if (!is_odd(tiles.numbers.stats[row])) continue;
            *reinterpret_cast<uint4*>(tiles.q + Queries::offset(row, c)) = {0, 0, 0, 0};
            *reinterpret_cast<uint4*>(tiles.grad_o + Queries::offset(row, c)) = {0, 0, 0, 0};
        }
        fence_async_proxy();
        NamedBarrier::arrive_and_wait(kThreads, 2 * tile_of_block() + 1);
    }
    LSM_DEVICE void release(int step) {
        __syncwarp();  // its numbers
        if (lane() == 0) shared.turns.release(taken + step);
    }

    // Masked or not, the products are the same instructions: twice they would take registers that are not there.
    LSM_DEVICE void attend(int step, bool bent) {
        Stage const& tiles = stage(step);
        // Before the products, which leave no registers to find it.
        u32 const seen = bent ? this->seen(step, tiles.numbers) : 0;
        u32 row = Keys::offset(16 * this->group_strip(), 0);
        cute::warpgroup_fence_operand(row);  // or all steps' descriptors are kept in registers
        Accumulators<N> x, grad;
        cute::warpgroup_arrive();
        multiply_rows<T, D, Keys, Queries>(smem_u32(shared.keys) + row, smem_u32(tiles.q), x);
        multiply_rows<T, D, Keys, Queries>(smem_u32(shared.values) + row, smem_u32(tiles.grad_o),
                                           grad);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        keep_registers(x);
        keep_registers(grad);
        bent ? this->template weigh<true>(seen, tiles.numbers, x, grad)
             : this->template weigh<false>(seen, tiles.numbers, x, grad);
        Operands<N> weights, slopes;
        pack_weights<T, N>(x, weights);
        pack_weights<T, N>(grad, slopes);
        cute::warpgroup_arrive();
        add_weighed<T, D, Queries>(weights, smem_u32(tiles.grad_o), dv[0]);
        add_weighed<T, D, Queries>(slopes, smem_u32(tiles.q), dk[0]);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        keep_registers(dv[0]);
        keep_registers(dk[0]);
        keep_registers(weights);
        keep_registers(slopes);
    }

    LSM_DEVICE void go_through() {
        int const count = s.plan.steps(steps.each), plain = s.plan.full / steps.each;
        bool const idle = this->idle();
        LSM_UNROLL_BY(1)
        for (int step = 0; step < count; ++step) {
            wait_for(step);
            bool const bent = step >= plain;
            if (!idle && !(bent && this->skips(step))) attend(step, bent);
            release(step);
        }
        taken += count;
    }

    LSM_DEVICE void consume() {
        auto const load_rows = [&](Rows const& x, char* to, int columns) {
            load_tile_rows<T, D, kRows, kThreads, Keys>(
                x, to, columns, [&](int r) { return row_of(x, r); }, D);
        };
        load_rows(p.k, shared.keys, width_k());
        load_rows(p.v, shared.values, width_v());
        cp_async_commit();
        this->start_sums();
        cp_async_wait<0>();
        fence_async_proxy();
        LSM_UNROLL_BY(1)
        for (int h = 0; h < work.group; ++h) {
            bool more;
            LSM_UNROLL_BY(1)
            do {
                meet();
                go_through();
                more = s.plan.more;
                meet();
            } while (more);
        }
        this->template store<Keys, Keys>(shared.keys, shared.values);
    }

    LSM_DEVICE void run() {
        if (threadIdx.x == 0 && !loads()) {
            shared.turns.start(33, Warps);  // the loader's lanes, and once more for what TMA brings
            cutlass::arch::fence_barrier_init();
        }
        __syncthreads();
        if (loads()) {
            cutlass::arch::warpgroup_reg_dealloc<Config::kLoadRegisters>();
            if (warp() < kTiles && !s.tile.place.unused && !s.tile.place.poison) produce();
        } else {
            cutlass::arch::warpgroup_reg_alloc<Config::kMultiplyRegisters>();
            if (s.tile.place.unused) return;
            s.tile.place.poison ? this->poison() : consume();
        }
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kBlockThreads, 1)
    warpgroup_keys(__grid_constant__ Work const work, __grid_constant__ CUtensorMap const queries,
                   __grid_constant__ CUtensorMap const grads) {
    WarpgroupKeysKernel<Config>(work, queries, grads).run();
}

// False if the tensors lie in memory as TMA cannot read them.
template <class T>
bool keys_on_warpgroups(Work const& work, void* stream) {
    SparseAttnParams const& p = work.p;
    unsigned const tiles = key_grid(work).x;
    if (tiles == 0) return true;
    bool fits = false;
    dispatch(Buckets<64, 128>{}, std::max(p.K, p.V), [&](auto D) {
        using Config = WarpgroupKeysConfig<T, D>;
        constexpr int kTiles = Config::kTiles;
        int const tokens = std::min(work.block_q, Config::N);
        CUtensorMap queries, grads;
        fits = encode_boxes(queries, p.dtype, p.q, p.B, p.Tq, p.Hq, p.K, tokens) &&
               encode_boxes(grads, p.dtype, p.grad_o, p.B, p.Tq, p.Hq, p.V, tokens);
        if (fits)
            launch(warpgroup_keys<Config>, dim3((tiles + kTiles - 1) / kTiles),
                   dim3(128, kTiles + 1),
                   kTiles * sizeof(typename WarpgroupKeysKernel<Config>::SharedStorage), stream,
                   work, queries, grads);
    });
    return fits;
}

}  // namespace lsm::sparse_attn
