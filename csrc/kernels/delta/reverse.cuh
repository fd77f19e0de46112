// The chain of the states' gradients, backwards: with dS the gradient of the state after a chunk,
//
//     dE = R^T dO + Z dS        dV = w dE        dS <- gamma dS + (c Y)^T dO + (w e X)^T dE,
//
// which is recur.cuh with its operands in other places; it does not need the states. Leaves dE and dS for the gradients.
// Grid: (record, head, tile of V).
#pragma once

#include "kernels/delta/recur.cuh"

namespace lsm::delta {

template <int K, Form form>
struct Reverse {
    static constexpr int kWarps = kV / 16, kThreads = 32 * kWarps;
    static constexpr bool kSources = form == Form::sources;
    static constexpr int kStages = kSources ? 2 : 3;  // two blocks per multiprocessor

    struct Stage {
        alignas(128) char erase[kC * K * 2];
        alignas(128) char query[kC * K * 2];
        alignas(128) char write[kC * K * 2];
        alignas(128) char grad_o[kC * kV * 2];
        alignas(16) char relate[Square::kBytes];
        alignas(128) char write_values[kSources ? kC * K * 2 : 16];
        alignas(16) char relate_values[kSources ? Square::kBytes : 16];
        alignas(16) Coefficients by;
        alignas(16) float decay[form != Form::whole ? K : 4];
    };
    struct SharedStorage {
        Stage stage[kStages];
    };

    DeltaWork const& work;
    DeltaParams const& p;
    SharedStorage& s;
    Segment const& segment;
    i64 const record;
    int const head, tile, lane, warp, value0;
    WarpState<K> state;

    LSM_DEVICE Chunk at(int index) const {
        return chunk_at(work, segment, work.first_slot(segment, record), index, head);
    }

    LSM_DEVICE void load(int index) {
        Stage& to = s.stage[index % kStages];
        Chunk const chunk = at(index);
        load_erase<K, form, kThreads>(work, chunk, head, to.erase);
        load_query<K, form, kThreads>(work, chunk, head, to.query);
        load_tile<kC, K, kThreads>(work.scratch.z + chunk.slot * kC * K, K, smem_u32(to.write));
        load_rows<kV, kThreads>(p.grad_o, chunk.batch, chunk.token, head, chunk.rows,
                                static_cast<int>(p.n), tile * kV, static_cast<int>(p.V) - tile * kV,
                                smem_u32(to.grad_o));
        load_square<kThreads>(work.scratch.r + chunk.slot * kC * kC, smem_u32(to.relate));
        if constexpr (kSources) {
            load_tile<kC, K, kThreads>(work.scratch.z_values + chunk.slot * kC * K, K,
                                       smem_u32(to.write_values));
            load_square<kThreads>(work.scratch.r_values + chunk.slot * kC * kC,
                                  smem_u32(to.relate_values));
        }
        load_coefficients<K, form, kThreads>(work, chunk, to.by, to.decay);
    }

    LSM_DEVICE void step(int index) {
        Stage const& tiles = s.stage[index % kStages];
        Chunk const chunk = at(index);
        u32 a[K / 16][4];
        state.operand(a);
        state.save(a, work.scratch.dstate + (chunk.slot * work.v_tiles * kV + value0) * K);

        float de[kC / 8][4] = {};
        int const passes = amplifies(tiles.by) ? 2 : 1;
        LSM_UNROLL_BY(1)
        for (int pass = 0; pass < passes; ++pass) {
            if (pass == 1) replace_z<K, kThreads>(work, chunk, tiles.write);
            state.read(a, smem_u32(tiles.write), de);
        }
        u32 grad_o[kC / 16][4];
        load_values(smem_u32(tiles.grad_o), warp, grad_o);
        ask(tiles.relate, grad_o, de);
        if constexpr (kSources) {
            float dv[kC / 8][4] = {};
            state.read(a, smem_u32(tiles.write_values), dv);
            ask(tiles.relate_values, grad_o, dv);
            store_dv(chunk, dv);
        }
        bf16* const to = work.scratch.de + chunk.slot * kC * work.v_tiles * kV + value0;
        store_transposed(de, 16, [&](int t) { return to + t * work.v_tiles * kV; });
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
        if constexpr (form != Form::whole) {
            state.scale(tiles.decay);
        } else {
            state.scale(tiles.by[kKeep][0]);
        }
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
        bf16* const to = static_cast<bf16*>(p.dv.data) + chunk.batch * p.dv.batch +
                         chunk.row * p.dv.time + head * p.dv.head + value0;
        store_transposed(dv, static_cast<int>(p.V) - value0, [&](int t) -> bf16* {
            return t < chunk.rows ? to + t * p.dv.time : nullptr;
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

    LSM_DEVICE void run() {
        int const chunks = segment.poison ? 0 : work.chunks(segment);
        LSM_UNROLL
        for (int i = 0; i < kStages - 1; ++i) {
            if (i < chunks) load(chunks - 1 - i);
            cp_async_commit();
        }
        i64 const owner = static_cast<i64>(segment.sequence) * p.HV + head;
        float const* const last = static_cast<float const*>(p.grad_final_state);
        state.start(p, value0,
                    last != nullptr && !segment.poison ? last + owner * p.K * p.V : nullptr,
                    segment.poison ? nan_value() : 0.f);
        LSM_UNROLL_BY(1)
        for (int i = chunks - 1; i >= 0; --i) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // the stage has landed, and everybody is done with the one before it
            if (i >= kStages - 1) load(i - (kStages - 1));
            cp_async_commit();
            step(i);
        }
        cp_async_wait<0>();
        if (segment.poison) {
            poison_rows(p.dv, segment.batch, segment.t0 * p.n, segment.t1 * p.n, head, tile * kV,
                        p.V);
        }
        if (p.grad_initial_state != nullptr && segment.sequence >= 0)
            state.finish(p, value0, static_cast<float*>(p.grad_initial_state) + owner * p.K * p.V);
    }
};

template <int K, Form form>
__global__ void __launch_bounds__(128, 2) reverse(DeltaWork const work) {
    run_chain<Reverse<K, form>>(work);
}

}  // namespace lsm::delta
