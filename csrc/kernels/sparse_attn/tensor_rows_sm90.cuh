// o and lse, or dq, by tiles of queries on Hopper: the tile, plan and softmax of tensor_rows.cuh, with products of
// warpgroups. One warp brings keys and values, N at a time, into rings of stages; two warpgroups have 64 rows each, and
// multiply the scores of a step while the weights of the step before multiply their values (dS its keys).
#pragma once

#include "kernels/dispatch.h"
#include "kernels/sm90.cuh"
#include "kernels/sparse_attn/launch.h"
#include "kernels/sparse_attn/query_tile.cuh"

#include <algorithm>

namespace lsm::sparse_attn {

template <class T_, int D_, bool Backward_>
struct WarpgroupConfig {
    using T = T_;
    static constexpr bool Backward = Backward_, Plain = false, Unites = false;
    static constexpr int D = D_, Warps = 8, MT = 1, N = Backward ? 64 : 128, Together = 4;
    static constexpr int Split = 1, Sums = D;
    static constexpr int kStages = Backward || D == 64 ? 4 : 2;
    static constexpr int kBlockThreads = 32 * Warps + 128;
    // Of a multiprocessor's 65536, what each thread that loads leaves to those that multiply.
    static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
};

template <class Config>
struct WarpgroupKernel : QueryTile<Config> {
    using Base = QueryTile<Config>;
    using Base::D, Base::N, Base::kRows, Base::kThreads, Base::kGroups, Base::kBackward,
        Base::Warps;
    using Base::row_of, Base::width_k, Base::width_v;
    using Base::work, Base::p, Base::s, Base::steps, Base::sums, Base::lane, Base::warp,
        Base::group;
    using typename Base::T;
    static constexpr int kStages = Config::kStages, kSlabs = D / 64;
    using Queries = Slabs<kRows, D>;
    using Keys = Slabs<N, D>;

    // Tiles of keys or of values on their way.
    struct Ring {
        alignas(1024) char tile[kStages][N * D * 2];
        Turns<kStages> turns;
    };
    struct SharedStorage {
        alignas(1024) char rows[kBackward ? 2 : 1][kRows * D * 2];  // q, in the end o or dq; dO
        Ring keys, values;
        typename Base::Shared tile;
    };

    SharedStorage& shared;
    CUtensorMap const &key_map, &value_map;
    Operands<N> weights;  // of the step before, or its dS
    int taken = 0;        // steps of the parts before

    LSM_DEVICE WarpgroupKernel(Work const& work_, CUtensorMap const& keys,
                               CUtensorMap const& values)
        : Base(work_, storage().tile), shared(storage()), key_map(keys), value_map(values) {}

    LSM_DEVICE static SharedStorage& storage() {
        return *reinterpret_cast<SharedStorage*>(dyn_smem());
    }

    // The tiles that weights multiply, the last that a step needs.
    LSM_DEVICE Ring& weighed() const { return kBackward ? shared.keys : shared.values; }

    // Between the warp that plans and those that have rows: a part of the plan is there, or done with.
    LSM_DEVICE void meet() { NamedBarrier::arrive_and_wait(kThreads + 32, 0); }

    // ---- The warp that plans and loads ----

    LSM_DEVICE void load(Ring& ring, CUtensorMap const& map, int step) {
        int const turn = taken + step, stage = turn % kStages;
        uint64_t* const full = &ring.turns.full[stage];
        ring.turns.wait_empty(turn);
        if (lane() == 0) Mbarrier::arrive_and_expect_tx(full, N * D * 2);
        __syncwarp();
        // A unit that is none lies outside of the tensor, as do keys past its end.
        LSM_UNROLL_BY(1)
        for (int i = lane(); i < steps.each * kSlabs; i += 32) {
            int const unit = i / kSlabs, slab = i % kSlabs;
            load_box(
                map, full, ring.tile[stage] + Keys::offset(unit << steps.size_shift, 64 * slab),
                64 * slab, s.key_head,
                static_cast<int>(s.place.sequence.k0) + s.plan.at(step * steps.each + unit).first,
                s.batch);
        }
    }

    LSM_DEVICE void produce() {
        this->start_plan();
        __syncwarp();
        LSM_UNROLL_BY(1)
        while (true) {
            this->plan_part();
            meet();
            int const count = s.plan.steps(steps.each);
            LSM_UNROLL_BY(1)
            for (int step = 0; step < count; ++step) {
                load(shared.keys, key_map, step);
                load(shared.values, value_map, step);
            }
            taken += count;
            if (!s.plan.more) break;
            meet();
        }
    }

    // ---- Warpgroups ----

    LSM_DEVICE void release(Ring& ring, int step) {
        if (lane() == 0) ring.turns.release(taken + step);
    }
    LSM_DEVICE u32 tile_of(Ring const& ring, int step) const {
        return smem_u32(ring.tile[(taken + step) % kStages]);
    }
    LSM_DEVICE void wait_for(Ring& ring, int step) {
        ring.turns.wait_full(taken + step);
        if (&ring == &weighed() && work.first != nullptr && (step + 1) * steps.each > s.plan.full)
            clear_past_end(ring, step);
    }

    // After the end of a packed sequence comes the next one, whose numbers may be such that a weight of zero does not keep
    // them out. Every step's are waited for by all, in order.
    LSM_DEVICE void clear_past_end(Ring& ring, int step) {
        char* const tile = ring.tile[(taken + step) % kStages];
        bool cleared = false;
        LSM_UNROLL_BY(1)
        for (int c = 0; c < steps.each; ++c) {
            int const first = s.plan.at(step * steps.each + c).first;
            int const real = s.place.sequence.Tk - first;
            if (first < 0 || real >= steps.size()) continue;
            cleared = true;
            LSM_UNROLL_BY(1)
            for (int i = threadIdx.x; i < (steps.size() - real) * (D / 8); i += kThreads)
                *reinterpret_cast<uint4*>(tile + Keys::offset(c * steps.size() + real + i / (D / 8),
                                                              i % (D / 8) * 8)) = uint4{0, 0, 0, 0};
        }
        if (!cleared) return;
        fence_async_proxy();
        NamedBarrier::arrive_and_wait(kThreads, 1);
    }

    // x = rows of this warpgroup, of q or dO . tokens of keys or values
    LSM_DEVICE void relate(char const* rows, Ring const& ring, int step, Accumulators<N>& x) {
        multiply_rows<T, D, Queries, Keys>(smem_u32(rows) + Queries::offset(64 * group(), 0),
                                           tile_of(ring, step), x);
        cute::warpgroup_commit_batch();
    }
    LSM_DEVICE void gather(int step) {
        add_weighed<T, D, Keys>(weights, tile_of(weighed(), step), sums[0]);
        cute::warpgroup_commit_batch();
    }

    // From the weights of the step before, if they are `due`, to those of this one.
    template <bool kBent, bool kDue>
    LSM_DEVICE void attend(int step) {
        if constexpr (kBackward) {
            attend_backward<kBent, kDue>(step);
        } else {
            attend_forward<kBent, kDue>(step);
        }
    }
    template <bool kBent, bool kDue>
    LSM_DEVICE void attend_forward(int step) {
        if constexpr (kDue) wait_for(shared.values, step - 1);
        wait_for(shared.keys, step);
        Accumulators<N> x[1];
        cute::warpgroup_arrive();
        relate(shared.rows[0], shared.keys, step, x[0]);
        if constexpr (kDue) gather(step - 1);
        cute::warpgroup_wait<kDue ? 1 : 0>();
        keep_registers(x[0]);
        release(shared.keys, step);
        float by = work.scale * kLog2e, fade[2];
        if constexpr (kBent) {
            this->bend_scores(step, x);
            by = 1.f;
        }
        bool const moved = this->soften(0, x[0], by, fade);
        if constexpr (kDue) finish(step - 1);
        if (__any_sync(0xffffffffu, moved)) this->fade_sums(0, fade);
        pack_weights<T, N>(x[0], weights);
    }
    template <bool kBent, bool kDue>
    LSM_DEVICE void attend_backward(int step) {
        wait_for(shared.keys, step);
        wait_for(shared.values, step);
        Accumulators<N> x[1], grad[1];
        cute::warpgroup_arrive();
        relate(shared.rows[0], shared.keys, step, x[0]);
        if constexpr (kDue) gather(step - 1);
        relate(shared.rows[1], shared.values, step, grad[0]);
        cute::warpgroup_wait<kDue ? 2 : 1>();
        keep_registers(x[0]);
        this->template differentiate<kBent>(step, x, grad, [&] {
            if constexpr (kDue) {
                finish(step - 1);
            } else {
                cute::warpgroup_wait<0>();
            }
            keep_registers(grad[0]);
            release(shared.values, step);
        });
        pack_weights<T, N>(x[0], weights);
    }
    // All products.
    LSM_DEVICE void finish(int step) {
        cute::warpgroup_wait<0>();
        keep_registers(sums[0]);
        keep_registers(weights);
        release(weighed(), step);
    }
    LSM_DEVICE void settle(int step) {
        if constexpr (!kBackward) wait_for(shared.values, step);
        cute::warpgroup_arrive();
        gather(step);
        finish(step);
    }
    // None of this warpgroup's rows sees a key of the step.
    LSM_DEVICE void pass(int step) {
        wait_for(shared.keys, step);
        release(shared.keys, step);
        wait_for(shared.values, step);
        release(shared.values, step);
    }

    LSM_DEVICE void go_through() {
        int const count = s.plan.steps(steps.each), plain = s.plan.full / steps.each;
        bool const idle = s.idle[group()];
        bool due = false;
        LSM_UNROLL_BY(1)
        for (int step = 0; step < count; ++step) {
            bool const bent = step >= plain;
            if (idle || (bent && this->skips(step))) {
                if (due) settle(step - 1);
                due = false;
                pass(step);
            } else if (!due) {
                attend<true, false>(step);
                due = true;
            } else if (bent) {
                attend<true, true>(step);
            } else {
                attend<false, true>(step);
            }
        }
        if (due) settle(count - 1);
        taken += count;
    }

    LSM_DEVICE void consume() {
        auto const load_rows = [&](Rows const& x, char* to, int columns) {
            load_tile_rows<T, D, kRows, kThreads, Queries>(
                x, to, columns, [&](int m) { return row_of(x, m); }, D);
        };
        load_rows(p.q, shared.rows[0], width_k());
        if constexpr (kBackward) load_rows(p.grad_o, shared.rows[1], width_v());
        cp_async_commit();
        this->start_rows();
        cp_async_wait<0>();
        fence_async_proxy();
        LSM_UNROLL_BY(1)
        while (true) {
            this->clear_bias();
            meet();
            go_through();
            if constexpr (kBackward) {
                if (this->biased()) {
                    NamedBarrier::arrive_and_wait(kThreads, 1);
                    this->store_bias();
                }
            }
            if (!s.plan.more) break;
            meet();
        }
        u32 odd[2];
        float by[2] = {work.scale, work.scale};
        if constexpr (kBackward) {
            this->find_odd(0, this->lse, odd);
            if (work.ramp_parts != nullptr) this->store_ramp();
        } else {
            this->find_odd(0, this->sum[0], odd);
            this->finish_softmax(0, by);
        }
        __syncwarp();
        store_tile_rows<T, Queries>(shared.rows[0], 16 * warp(), kBackward ? width_k() : width_v(),
                                    sums[0], by[0], by[1],
                                    [&](int row) { return row_of(kBackward ? p.dq : p.o, row); });
        this->repair(0, odd);
    }

    LSM_DEVICE void run() {
        bool const rows = threadIdx.x < kThreads;
        if (s.place.unused) return;
        if (s.place.poison) {
            if (rows) this->poison();
            return;
        }
        if (threadIdx.x == 0) {
            shared.keys.turns.start(1, Warps), shared.values.turns.start(1, Warps);
            cutlass::arch::fence_barrier_init();
        }
        __syncthreads();
        if (rows) {
            cutlass::arch::warpgroup_reg_alloc<Config::kMultiplyRegisters>();
            consume();
        } else {
            cutlass::arch::warpgroup_reg_dealloc<Config::kLoadRegisters>();
            if (warp() == Warps) produce();
        }
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kBlockThreads, 1)
    warpgroup_rows(__grid_constant__ Work const work, __grid_constant__ CUtensorMap const keys,
                   __grid_constant__ CUtensorMap const values) {
    WarpgroupKernel<Config>(work, keys, values).run();
}

// False if the tensors lie in memory as TMA cannot read them.
template <class T, bool kBackward>
bool rows_on_warpgroups(Work const& work, void* stream) {
    SparseAttnParams const& p = work.p;
    dim3 const grid = query_grid(work);
    if (grid.x == 0) return true;
    int const tokens = std::min(work.block_k, WarpgroupConfig<T, 64, kBackward>::N);
    CUtensorMap keys, values;
    if (!encode_boxes(keys, p.dtype, p.k, p.B, p.Tk, p.Hkv, p.K, tokens) ||
        !encode_boxes(values, p.dtype, p.v, p.B, p.Tk, p.Hkv, p.V, tokens))
        return false;
    dispatch(Buckets<64, 128>{}, std::max(p.K, p.V), [&](auto D) {
        using Config = WarpgroupConfig<T, D, kBackward>;
        launch(warpgroup_rows<Config>, grid, dim3(Config::kBlockThreads),
               sizeof(typename WarpgroupKernel<Config>::SharedStorage), stream, work, keys, values);
    });
    return true;
}

}  // namespace lsm::sparse_attn
