// The recurrence, token by token, with the state in registers, tiled over V: one block walks one
// segment of one value head with a [K, 32] tile of the state.
//
//     forward:   S = Diag(a_t) S + key_t value_t^T;   out_t = S^T query_t
//     reverse:   S = S + key_t value_t^T;   out_t = S^T query_t;   S = Diag(a_t) S
//
// Forward with (q, k, v) gives o and the final state. Reverse with (k, q, dO) gives dv and the
// gradient of the initial state. Without output, from a zero state, either leaves what a segment
// adds to its neighbour, and its summed gates.
//
// A thread holds 8 rows and 4 columns; 8 threads lie along V and K / 8 along K, so the block has K
// threads. Stages of 8 tokens go through shared memory, the next one on its way while this one is
// used.
#pragma once

#include "kernels/recurrence/common.cuh"
#include "kernels/recurrence/plan.h"

namespace lsm::recurrence {

template <int K>
struct SweepConfig {
    static constexpr int kRows = 8,
                         kColumns = kSweepColumns;  // of the state: per thread; per block
    static constexpr int kThreads = K, kWarps = kThreads / 32;
    static constexpr int kTokens = 8;        // per stage
    static constexpr int kQuad = 4;          // tokens whose sums over K are taken together
    static constexpr int kBlocks = 384 / K;  // per multiprocessor: 168 registers, no spills
    static_assert(K % 32 == 0 && K / kRows * (kColumns / 4) == kThreads);
};

template <class T, int K>
struct SweepStorage {
    using C = SweepConfig<K>;
    struct Stage {
        alignas(16) T query[C::kTokens][K], key[C::kTokens][K], value[C::kTokens][C::kColumns];
        alignas(16) float decay[C::kTokens][K];
        // S^T query, a share per warp.
        alignas(16) float partial[C::kTokens][C::kWarps][C::kColumns];
    } stage[2];
};

struct SweepParams {
    Rows query, key, value, out;
    States start, end;  // end: of a local sweep per record, else per sequence and nullable
    float* gate_sum;    // [records, HV, K], log2; local sweeps
    int HV, heads_per_group, K, V;
    float value_scale, out_scale;
};

enum class Walk { forward, reverse };

template <class T, int K, Walk walk, bool Local, class Decay>
struct Sweep {
    using C = SweepConfig<K>;
    using Storage = SweepStorage<T, K>;
    static constexpr bool kReverse = walk == Walk::reverse;

    SweepParams const& p;
    Decay const& gate;
    Segment const segment;
    Work const work;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % 32;
    int const row = tid / 8 * C::kRows, column = tid % 8 * 4;  // first of this thread in the tile
    i64 const steps = segment.t1 - segment.t0;
    float S[C::kRows][4];
    typename Decay::Raw raw[C::kTokens];  // gates of channel tid in the next stage
    float gate_sum = 0.f;

    LSM_DEVICE Sweep(SweepParams const& p, Decay const& gate, Segment const& segment,
                     Work const& work)
        : p(p), gate(gate), segment(segment), work(work) {}

    LSM_DEVICE int first_column() const { return work.tile * C::kColumns; }

    LSM_DEVICE float* state_of(States const& states) const {
        return states.of(segment, work.record, work.head, p.HV, i64(p.K) * p.V);
    }

    // States from outside are contiguous, but may start on any float.
    LSM_DEVICE void load_state() {
        bool const zero = Local || p.start.data == nullptr;
        float const* const from = zero ? nullptr : state_of(p.start);
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                int const c = row + i, v = first_column() + column + j;
                S[i][j] = !zero && c < p.K && v < p.V ? load_global(from + i64(c) * p.V + v) : 0.f;
            }
        }
    }

    LSM_DEVICE void store_state() {
        float* const to = state_of(p.end);
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = row + i, v = first_column() + column;
            if (c < p.K && v < p.V) store4_global(to + i64(c) * p.V + v, S[i]);
        }
    }

    LSM_DEVICE void start_stage(typename Storage::Stage& stage, i64 step) {
        auto copy = [&](auto& tile, Rows const& x, int head, int first, int columns) {
            copy_rows<kReverse, C::kThreads>(tile, x, segment, head, step, steps, first, columns);
        };
        if constexpr (!Local) copy(stage.query, p.query, work.group_head, 0, p.K);
        copy(stage.key, p.key, work.group_head, 0, p.K);
        copy(stage.value, p.value, work.head, first_column(), p.V);
        cp_async_commit();
        LSM_UNROLL
        for (int i = 0; i < C::kTokens; ++i) {
            raw[i] = Decay::identity();
            if (step + i >= steps || tid >= p.K) continue;
            i64 const t = token_at<kReverse>(segment, step + i);
            raw[i] = gate.load(segment.batch, t, work.head, tid);
        }
    }

    LSM_DEVICE void store_decays(typename Storage::Stage& stage) {
        LSM_UNROLL
        for (int i = 0; i < C::kTokens; ++i) {
            stage.decay[i][tid] = Decay::factor(raw[i]);
            if constexpr (Local) gate_sum += Decay::log2(raw[i]);
        }
    }

    LSM_DEVICE void token(typename Storage::Stage& stage, int i, float* out) {
        float value[4];
        load4(&stage.value[i][column], value);
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) out[j] = 0.f, value[j] *= p.value_scale;
        LSM_UNROLL
        for (int half = 0; half < C::kRows; half += 4) {
            float query[4] = {}, key[4], decay[4];
            if constexpr (!Local) load4(&stage.query[i][row + half], query);
            load4(&stage.key[i][row + half], key);
            load4(&stage.decay[i][row + half], decay);
            LSM_UNROLL
            for (int c = 0; c < 4; ++c) {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) {
                    float& s = S[half + c][j];
                    s = (kReverse ? s : decay[c] * s) + key[c] * value[j];
                    if constexpr (!Local) out[j] += query[c] * s;
                    if constexpr (kReverse) s *= decay[c];
                }
            }
        }
    }

    LSM_DEVICE void compute(typename Storage::Stage& stage) {
        LSM_UNROLL_BY(1)
        for (int first = 0; first < C::kTokens; first += C::kQuad) {
            float out[C::kQuad * 4];
            LSM_UNROLL
            for (int i = 0; i < C::kQuad; ++i) token(stage, first + i, out + i * 4);
            if constexpr (!Local) {
                scatter_sums<16, 8, C::kQuad * 4>(out, lane);  // lanes 8i .. 8i + 7 keep token i
                *reinterpret_cast<float4*>(&stage.partial[first + lane / 8][tid / 32][column]) =
                    float4{out[0], out[1], out[2], out[3]};
            }
        }
    }

    // Adds the warps' shares, in their order.
    LSM_DEVICE void store_out(typename Storage::Stage& stage, i64 step) {
        constexpr int kPieces = C::kColumns / 4, kAll = C::kTokens * kPieces;
        LSM_UNROLL
        for (int round = 0; round < (kAll + C::kThreads - 1) / C::kThreads; ++round) {
            int const i = tid + round * C::kThreads, n = i / kPieces, c = i % kPieces * 4;
            if (i >= kAll || step + n >= steps || first_column() + c >= p.V) break;
            float sum[4];
            load4(&stage.partial[n][0][c], sum);
            for (int w = 1; w < C::kWarps; ++w) {
                float more[4];
                load4(&stage.partial[n][w][c], more);
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) sum[j] += more[j];
            }
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) sum[j] *= p.out_scale;
            i64 const t = token_at<kReverse>(segment, step + n);
            store4_global(row_at<T>(p.out, segment.batch, t, work.head) + first_column() + c, sum);
        }
    }

    LSM_DEVICE void walk_segment() {
        if (steps > 0) start_stage(shared.stage[0], 0);
        int buffer = 0;
        for (i64 step = 0; step < steps; step += C::kTokens, buffer ^= 1) {
            auto& stage = shared.stage[buffer];
            auto& other = shared.stage[buffer ^ 1];
            store_decays(stage);
            cp_async_wait<0>();
            __syncthreads();  // this stage has arrived, and nobody computes with the other any more
            if constexpr (!Local) {
                if (step > 0) store_out(other, step - C::kTokens);
            }
            if (step + C::kTokens < steps) start_stage(other, step + C::kTokens);
            compute(stage);
        }
        if constexpr (!Local) {
            __syncthreads();
            if (steps > 0)
                store_out(shared.stage[buffer ^ 1], (steps - 1) / C::kTokens * C::kTokens);
        }
    }

    LSM_DEVICE void poison() {
        float const nan[4] = {nan_value(), nan_value(), nan_value(), nan_value()};
        for (i64 i = tid; i < steps * 8; i += C::kThreads) {
            i64 const t = segment.t0 + i / 8;
            int const c = first_column() + static_cast<int>(i % 8) * 4;
            if (c < p.V) store4_global(row_at<T>(p.out, segment.batch, t, work.head) + c, nan);
        }
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) S[i][j] = nan_value();
        }
    }
};

template <class T, int K, Walk walk, bool Local, class Decay>
__global__ void __launch_bounds__(SweepConfig<K>::kThreads, SweepConfig<K>::kBlocks)
    sweep(SweepParams const p, Decay const gate, Segments const segments, int tiles) {
    Work const work(p.HV, p.heads_per_group, tiles);
    Segment const segment = segments[work.record];
    bool const last_of_walk = walk == Walk::reverse ? segment.index == 0 : segment.is_last;
    if (segment.unused() || (Local && (last_of_walk || segment.poison))) return;

    Sweep<T, K, walk, Local, Decay> s(p, gate, segment, work);
    if (segment.poison) {
        s.poison();
    } else {
        s.load_state();
        s.walk_segment();
    }
    if (Local || (p.end.data != nullptr && last_of_walk && segment.sequence >= 0)) s.store_state();
    if constexpr (Local) {
        if (work.tile == 0 && s.tid < p.K) {
            store_global(p.gate_sum + (work.record * p.HV + work.head) * p.K + s.tid, s.gate_sum);
        }
    }
}

constexpr i64 sweep_tiles(i64 V) {
    return (V + 31) / 32;
}

template <class T, int K, Walk walk, bool Local, class Decay>
void run_sweep(SweepParams const& p, Decay const& gate, Segments const& segments, void* stream) {
    i64 const tiles = (p.V + kSweepColumns - 1) / kSweepColumns;
    launch(sweep<T, K, walk, Local, Decay>,
           dim3(static_cast<unsigned>(segments.count * p.HV * tiles)),
           dim3(SweepConfig<K>::kThreads), sizeof(SweepStorage<T, K>), stream, p, gate, segments,
           static_cast<int>(tiles));
}

}  // namespace lsm::recurrence
