// The chain of the states' gradients, backwards: with dS the gradient of the state after a chunk,
//
//     dE = R^T dO + Z dS        dV = w dE        dS <- gamma dS + (c Y)^T dO + (w e X)^T dE,
//
// which is recur.cuh with its operands in other places; it does not need the states. Leaves dE and
// dS for the gradients; for a transfer only the dS it ends with. Grid: (record, head, tile of V).
#pragma once

#include "kernels/delta/recur.cuh"

namespace lsm::delta {

template <int K, Form form>
struct Reverse : Chain<K, form, true> {
    using Base = Chain<K, form, true>;
    using Base::kShare;
    using Base::warp, Base::value0, Base::state, Base::kStages, Base::kThreads, Base::kSources;
    using Base::work, Base::p, Base::s, Base::segment, Base::head, Base::tile, Base::lane;
    using typename Base::Stage;

    LSM_DEVICE static bool transfers(DeltaWork const& work, Segment const& segment, int) {
        return segment.index > 0 && !work.cuts.ends_window(segment.t0);
    }

    LSM_DEVICE void step(int index) {
        Stage const& tiles = s.stage[index % kStages];
        Chunk const chunk = this->at(index);
        u32 a[kShare / 16][4];
        state.operand(a);
        if (!work.transfer)
            state.save(a, work.scratch.dstate + (chunk.slot * work.v_tiles * kV + value0) * K);

        float de[kC / 8][4] = {};
        int const passes = amplifies(tiles.by) ? 2 : 1;
        LSM_UNROLL_BY(1)
        for (int pass = 0; pass < passes; ++pass) {
            if (pass == 1) replace_z<K, kThreads>(work, chunk, tiles.write);
            state.read(a, smem_u32(tiles.write), de);
        }
        this->join_halves(de);
        u32 grad_o[kC / 16][4];
        load_values(smem_u32(tiles.value), warp, grad_o);
        ask(tiles.relate, grad_o, de);
        if constexpr (kSources) {
            float dv[kC / 8][4] = {};
            static_assert(Base::kHalves == 1);  // else dv is a sum over halves, too
            state.read(a, smem_u32(tiles.write_values), dv);
            ask(tiles.relate_values, grad_o, dv);
            store_dv(chunk, dv);
        }
        if (!work.transfer) {
            bf16* const to = work.scratch.de + chunk.slot * kC * work.v_tiles * kV + value0;
            store_transposed(de, 16, [&](int t) -> bf16* {
                return this->has_row(t) ? to + t * work.v_tiles * kV : nullptr;
            });
        }
        LSM_UNROLL
        for (int n = 0; n < kC / 8; ++n) {
            int const t = 8 * n + lane % 4 * 2;
            float2 const w = pair_at(tiles.by[kWrite], t), c = pair_at(tiles.by[kRead], t);
            de[n][0] *= w.x, de[n][1] *= w.y, de[n][2] *= w.x, de[n][3] *= w.y;
            grad_o[n / 2][n % 2 * 2] = scaled(grad_o[n / 2][n % 2 * 2], c);
            grad_o[n / 2][n % 2 * 2 + 1] = scaled(grad_o[n / 2][n % 2 * 2 + 1], c);
        }
        if constexpr (!kSources) store_dv(chunk, de);

        u32 E[kC / 16][4];
        pack_rows(de, tiles.by[kErase], E);
        this->decay(tiles);
        state.write(grad_o, smem_u32(tiles.query));
        LSM_UNROLL_BY(1)
        for (int pass = 0; pass < passes; ++pass) {
            u32 x[kC / 16][4];
            if (pass == 1) {
                pack_rest(de, tiles.by[kErase], E, x);
            } else {
                copy(E, x);
            }
            state.write(x, smem_u32(tiles.erase));
        }
    }

    LSM_DEVICE void store_dv(Chunk const& chunk, float const (&dv)[kC / 8][4]) {
        if (work.transfer) return;
        bf16* const to = static_cast<bf16*>(p.dv.data) + chunk.batch * p.dv.batch +
                         chunk.row * p.dv.time + head * p.dv.head + value0;
        store_transposed(dv, static_cast<int>(p.V) - value0, [&](int t) -> bf16* {
            return t < chunk.rows && this->has_row(t) ? to + t * p.dv.time : nullptr;
        });
    }

    // de += R^T dO.
    LSM_DEVICE void ask(char const* relate, u32 const (&grad_o)[kC / 16][4],
                        float (&de)[kC / 8][4]) {
        LSM_UNROLL
        for (int i = 0; i < kC / 16; ++i) {
            LSM_UNROLL
            for (int j = 0; j <= i; ++j) {  // R is lower triangular
                u32 b[4];
                ldmatrix_x4_trans(b, smem_u32(relate) + Square::rows_first(16 * i, 16 * j, lane));
                mma(de[2 * j], grad_o[i], b[0], b[1]);
                mma(de[2 * j + 1], grad_o[i], b[2], b[3]);
            }
        }
    }

    LSM_DEVICE void start() {
        if (segment.poison) {
            state.fill(nan_value());
        } else if (work.transfer && !work.cuts.leads_back(segment)) {
            state.fill(0.f);
        } else if (!segment.is_last) {
            state.start(p, value0, work.cuts.grad(segment.batch, segment.t1, head));
        } else {
            float const* const last = static_cast<float const*>(p.grad_final_state);
            state.start(p, value0, last == nullptr ? nullptr : last + this->owner());
        }
    }

    // Where a window begins inside a sequence, the one before it goes on from there.
    LSM_DEVICE void finish() {
        if (segment.index > 0) {
            if (!segment.poison && (work.transfer || work.cuts.ends_window(segment.t0))) {
                state.finish(p.K, p.V, value0, work.cuts.grad(segment.batch, segment.t0, head));
            }
        } else if (p.grad_initial_state != nullptr && segment.sequence >= 0) {
            state.finish(p.K, p.V, value0,
                         static_cast<float*>(p.grad_initial_state) + this->owner());
        }
    }

    LSM_DEVICE void run() {
        int const n = static_cast<int>(p.n), column = tile * kV;
        this->template walk<true>(
            [&] { start(); },
            [&](int i) { this->load(i, p.grad_o, n, column, static_cast<int>(p.V) - column); },
            [&](int i) { step(i); });
        if (segment.poison) {
            poison_rows(p.dv, segment.batch, segment.t0 * p.n, segment.t1 * p.n, head, tile * kV,
                        p.V);
        }
        finish();
    }
};

template <int K, Form form>
__global__ void __launch_bounds__(K > 128 ? 256 : 128, K > 128 ? 1 : 2)
    reverse(DeltaWork const work) {
    run_chain<Reverse<K, form>>(work);
}

}  // namespace lsm::delta
