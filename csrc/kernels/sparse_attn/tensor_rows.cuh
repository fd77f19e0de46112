// Attention by tiles of queries on tensor cores: o and lse, or dq. A warp has MT x 16 rows of a tile and goes with the
// others through the keys of the tile's plan, N at a time, in two stages of shared memory. First come steps in which
// every row sees every key; masks and whatever else bends scores are the business of the steps after them.
#pragma once

#include "kernels/sparse_attn/tensor.cuh"

namespace lsm::sparse_attn {

// With two tiles of 16 rows a warp, scores are plain and no token has a list of its own: there are no registers for more.
template <class T_, int D_, int Warps_, int MT_, int N_, bool Backward_>
struct RowsConfig {
    using T = T_;
    static constexpr int D = D_, Warps = Warps_, MT = MT_, N = N_;
    static constexpr bool Backward = Backward_, Plain = MT > 1;
    static constexpr int kThreads = 32 * Warps, kRows = 16 * MT * Warps;
    static constexpr int kBlocks = kThreads <= 128 ? 2 : 1;  // per multiprocessor, at least
};

template <class Config>
struct RowsKernel {
    using T = typename Config::T;
    static constexpr int D = Config::D, MT = Config::MT, N = Config::N, kRows = Config::kRows;
    static constexpr int kThreads = Config::kThreads;
    static constexpr bool kBackward = Config::Backward, kPlain = Config::Plain;

    struct Stage {
        alignas(1024) char keys[N * D * 2];
        alignas(1024) char values[N * D * 2];
    };
    // What the loop over keys does not touch lies in shared memory: it has no registers to spare.
    struct SharedStorage {
        alignas(1024) char q[kRows * D * 2];  // in the end o, or dq
        alignas(1024) char grad_o[kBackward ? kRows * D * 2 : 1024];
        Stage stage[2];
        Row rows[kRows];
        Head heads[kRows];
        Plan plan;
        Place place;
        int batch, key_head, first_head;
        Bounds tile, seen[Config::Warps];  // of all rows, of each warp's
        u32 tokens[Config::Warps];         // with `unite`, that each warp has
        bool idle[Config::Warps];          // no rows
        Blocks blocks;                     // of the tile, or with `unite` of each token
        Blocks lists[32];
        int merged[32];
    };

    Work const& work;
    SparseAttnParams const& p;
    SharedStorage& s;
    Mask const& mask;
    Steps const steps;
    float most[MT][2], sum[MT][2];  // running maximum in units of log2, sum of this lane
    float lse[2], delta[2];         // backward, MT = 1
    float sums[MT][D / 8][4];

    LSM_DEVICE explicit RowsKernel(Work const& work_)
        : work(work_),
          p(work_.p),
          s(*reinterpret_cast<SharedStorage*>(dyn_smem())),
          mask(work_.mask),
          steps(work_.block_k, N) {
        i64 rest = blockIdx.x;
        int const index = work.query_tiles - 1 - static_cast<int>(rest % work.query_tiles);
        rest /= work.query_tiles;
        int const head_tile = static_cast<int>(rest % work.head_tiles);
        rest /= work.head_tiles;
        int const key_head = static_cast<int>(rest % p.Hkv), batch = static_cast<int>(rest / p.Hkv);
        Place const place = locate(work, &First::queries, batch, index, work.tokens);
        if (threadIdx.x == 0) {
            s.batch = batch, s.key_head = key_head;
            s.first_head = key_head * work.group + head_tile * work.heads;
            s.place = place;
        }
        __syncthreads();
    }

    // ---- Rows of the tile ----

    LSM_DEVICE bool unites() const { return !kPlain && work.unite; }
    LSM_DEVICE static int lane() { return threadIdx.x % 32; }
    LSM_DEVICE static int warp() { return threadIdx.x / 32; }
    LSM_DEVICE int width_k() const { return static_cast<int>(p.K); }
    LSM_DEVICE int width_v() const { return static_cast<int>(p.V); }
    LSM_DEVICE int token(int m) const { return s.place.token + work.token_of(m); }
    LSM_DEVICE int head(int m) const { return s.first_head + work.head_of(m); }
    LSM_DEVICE bool exists(int m, i64 tokens) const {
        return work.row_exists(m) && token(m) < tokens && head(m) < (s.key_head + 1) * work.group;
    }
    LSM_DEVICE bool exists(int m) const { return exists(m, s.place.sequence.Tq); }
    LSM_DEVICE T* row_of(Rows const& x, int m) const {
        return exists(m) ? element<T>(x, s.batch, s.place.sequence.q0 + token(m), head(m))
                         : nullptr;
    }
    // Row of this lane in its accumulators.
    LSM_DEVICE int lane_row(int m, int half_) const {
        return (warp() * MT + m) * 16 + lane() / 4 + 8 * half_;
    }

    LSM_DEVICE void poison() {
        Rows const& to = kBackward ? p.dq : p.o;
        int const columns = kBackward ? width_k() : width_v();
        u32 const nans = pack_as<T>(nan_value(), nan_value());
        for (int m = warp(); m < kRows; m += Config::Warps) {
            if (!exists(m, p.Tq)) continue;
            T* const row = element<T>(to, s.batch, token(m), head(m));
            for (int c = 2 * lane(); c < columns; c += 64)
                store_global(reinterpret_cast<u32*>(row + c), nans);
            if (!kBackward && lane() == 0)
                store_global(
                    static_cast<float*>(p.lse) + per_head(work, s.batch, token(m), head(m)),
                    nan_value());
        }
    }

    LSM_DEVICE void start_rows() {
        Sequence const& sequence = s.place.sequence;
        load_tile_rows<T, D, kRows, kThreads>(p.q, s.q, width_k(),
                                              [&](int m) { return row_of(p.q, m); });
        if constexpr (kBackward)
            load_tile_rows<T, D, kRows, kThreads>(p.grad_o, s.grad_o, width_v(),
                                                  [&](int m) { return row_of(p.grad_o, m); });
        cp_async_commit();
        int const shift = mask.shift(sequence.Tq, sequence.Tk), last = mask.key(sequence.Tk - 1);
        for (int m = threadIdx.x; m < kRows; m += kThreads) {
            bool const real = exists(m);
            s.rows[m] = real ? mask.row(token(m) + shift, mask.left_of(head(m)), last)
                             : Row{0, -kFar, 0, 0};
            s.heads[m] = real ? Head::of(work, head(m)) : Head{0.f, 0.f};
        }
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            LSM_UNROLL
            for (int i = 0; i < D / 2; ++i) sums[m][i / 4][i % 4] = 0.f;
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                most[m][half_] = kLowest, sum[m][half_] = 0.f;
                if constexpr (kBackward) {
                    int const row = lane_row(m, half_);
                    float4 const stats =
                        exists(row) ? load_global(work.stats + per_head(work, s.batch,
                                                                        sequence.q0 + token(row),
                                                                        head(row)))
                                    : float4{infinity(), 0.f, infinity(), 0.f};
                    lse[half_] = stats.x, delta[half_] = stats.y;
                }
            }
        }
    }

    // Of rows [m0, m0 + count), count a power of two. A tile's rows are heads of the same tokens.
    LSM_DEVICE Bounds bounds(int m0, int count) const {
        Sequence const& sequence = s.place.sequence;
        int const shift = mask.shift(sequence.Tq, sequence.Tk), last = mask.key(sequence.Tk - 1);
        int t0 = s.place.token, t1 = s.place.token + work.tokens - 1;
        if (work.token_shift > 0 || count <= work.tokens) {
            t0 = token(m0), t1 = token(m0 + count - 1);
        }
        t1 = min(t1, sequence.Tq - 1);
        int left_min = mask.left, left_max = mask.left;
        if (mask.head_left != nullptr) {
            left_min = kNone, left_max = 0;
            for (int h = 0; h < work.heads && s.first_head + h < (s.key_head + 1) * work.group;
                 ++h) {
                int const left = mask.left_of(s.first_head + h);
                left_min = min(left_min, left), left_max = max(left_max, left);
            }
        }
        return mask.bounds(t0 + shift, t1 + shift, left_min, left_max, last);
    }

    // ---- Steps ----

    LSM_DEVICE void load(int step) {
        Sequence const& sequence = s.place.sequence;
        Stage& to = s.stage[step % 2];
        auto const at = [&](Rows const& x) {
            T const* const base = element<T>(x, s.batch, sequence.k0, s.key_head);
            return [&, base](int column) -> T const* {
                int const key = steps.token(s.plan, step, column);
                return key < 0 || key >= sequence.Tk ? nullptr : base + key * x.time;
            };
        };
        load_tile_rows<T, D, N, kThreads>(p.k, to.keys, width_k(), at(p.k));
        load_tile_rows<T, D, N, kThreads>(p.v, to.values, width_v(), at(p.v));
        cp_async_commit();
    }

    // Whether no row of this warp sees a key of the step.
    LSM_DEVICE bool skips(int step) const {
        for (int c = 0; c < steps.each; ++c) {
            Unit const unit = s.plan.at(step * steps.each + c);
            if (unit.first < 0 || (unites() && (unit.tag & s.tokens[warp()]) == 0)) continue;
            if (mask.kind(s.seen[warp()], mask.key(unit.first),
                          mask.key(unit.first + steps.size() - 1)) != Kind::skip)
                return false;
        }
        return true;
    }

    // f(score in units of log2 or -inf, slope) for every element.
    template <bool kBare, class F>
    LSM_DEVICE void bend(int step, Accumulators<N> (&x)[MT], F f) {
        float const by = work.scale * kLog2e;
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                int const at = lane_row(m, half_);
                Row const row = s.rows[at];
                int const bit = unites() ? work.token_of(at) : -1;
                LSM_UNROLL
                for (int j = 0; j < N / 16; ++j) {
                    Unit const unit = steps.unit(s.plan, step, 16 * j);
                    bool const real = unit.first >= 0 && (bit < 0 || (unit.tag >> bit & 1) != 0);
                    int const x0 =
                        mask.key(unit.first + (16 * j & (steps.size() - 1)) + lane() % 4 * 2);
                    float bias = 0.f;
                    if (!kBare && p.lists.bias != nullptr && unit.first >= 0)
                        bias = work.bias(s.blocks.entry + unit.tag);
                    LSM_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        int const position = x0 + (8 * (i / 2) + i % 2) * mask.key_stride;
                        int const n = 2 * j + i / 2, e = 2 * half_ + i % 2;
                        float value = x[m][n][e] * by, slope = 1.f;
                        if constexpr (!kBare) {
                            Score const bent =
                                score<true>(work, s.heads[at], x[m][n][e], row.p - position, bias);
                            value = bent.s * kLog2e, slope = bent.slope;
                        }
                        f(m, n, e, real && mask.sees(row, position) ? value : -infinity(), slope);
                    }
                }
            }
        }
    }

    template <bool kBent>
    LSM_DEVICE void step_forward(int step) {
        Stage const& tiles = s.stage[step % 2];
        Accumulators<N> x[MT];
        relate<T, D, N, MT>(rows_of<D>(s.q, warp() * MT * 16), columns_of<D>(tiles.keys), width_k(),
                            x);
        float by = work.scale * kLog2e;
        if constexpr (kBent) {
            auto const keep = [&](int m, int n, int e, float value, float) { x[m][n][e] = value; };
            kPlain || work.plain ? bend<true>(step, x, keep) : bend<kPlain>(step, x, keep);
            by = 1.f;
        }
        Operands<N> weights[MT];
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            float fade[2];
            bool moved = false;
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                float highest = kLowest;
                LSM_UNROLL
                for (int n = 0; n < N / 8; ++n)
                    highest = fmaxf(highest, fmaxf(x[m][n][2 * half_], x[m][n][2 * half_ + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
                float const before = most[m][half_], now = fmaxf(before, highest * by);
                moved |= now > before;
                fade[half_] = exp2_approx(before - now);
                most[m][half_] = now;
                float total = 0.f;
                LSM_UNROLL
                for (int n = 0; n < N / 8; ++n) {
                    LSM_UNROLL
                    for (int e = 2 * half_; e < 2 * half_ + 2; ++e) {
                        x[m][n][e] = exp2_approx(x[m][n][e] * by - now);
                        total += x[m][n][e];
                    }
                }
                sum[m][half_] = sum[m][half_] * fade[half_] + total;
            }
            pack_weights<T, N>(x[m], weights[m]);
            if (__any_sync(0xffffffffu, moved)) {
                LSM_UNROLL
                for (int n = 0; n < D / 8; ++n) {
                    sums[m][n][0] *= fade[0], sums[m][n][1] *= fade[0];
                    sums[m][n][2] *= fade[1], sums[m][n][3] *= fade[1];
                }
            }
        }
        gather<T, D, N, MT>(weights, rows_of<D>(tiles.values, 0), width_v(), sums);
    }

    template <bool kBent>
    LSM_DEVICE void step_backward(int step) {
        Stage const& tiles = s.stage[step % 2];
        Accumulators<N> x[MT], grad[MT];
        relate<T, D, N, MT>(rows_of<D>(s.q, warp() * MT * 16), columns_of<D>(tiles.keys), width_k(),
                            x);
        relate<T, D, N, MT>(rows_of<D>(s.grad_o, warp() * MT * 16), columns_of<D>(tiles.values),
                            width_v(), grad);
        if constexpr (kBent) {
            auto const gradient = [&](int m, int n, int e, float value, float slope) {
                x[m][n][e] =
                    exp2_approx(value - lse[e / 2]) * (grad[m][n][e] - delta[e / 2]) * slope;
            };
            work.plain ? bend<true>(step, x, gradient) : bend<false>(step, x, gradient);
        } else {
            float const by = work.scale * kLog2e;
            LSM_UNROLL
            for (int n = 0; n < N / 8; ++n) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e)
                    x[0][n][e] =
                        exp2_approx(x[0][n][e] * by - lse[e / 2]) * (grad[0][n][e] - delta[e / 2]);
            }
        }
        Operands<N> weights[MT];
        pack_weights<T, N>(x[0], weights[0]);
        gather<T, D, N, MT>(weights, rows_of<D>(tiles.keys, 0), width_k(), sums);
    }

    // Stage `step` is here for everybody, and the one before it is not needed any more.
    LSM_DEVICE void advance(int step, int count) {
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < count) load(step + 1);
    }

    template <bool kBent>
    LSM_DEVICE void attend(int step) {
        if (s.idle[warp()] || (kBent && skips(step))) return;
        if constexpr (kBackward) {
            step_backward<kBent>(step);
        } else {
            step_forward<kBent>(step);
        }
    }

    // ---- Plans ----

    LSM_DEVICE Kind look_at(int block, int sub, Unit& unit) const {
        if (block < 0 || block > kNone / work.block_k) return Kind::skip;
        unit.first = block * work.block_k + sub * steps.size();
        if (unit.first >= s.place.sequence.Tk) return Kind::skip;
        Kind const kind =
            mask.kind(s.tile, mask.key(unit.first), mask.key(unit.first + steps.size() - 1));
        return kind == Kind::full && !work.plain ? Kind::partial : kind;
    }

    LSM_DEVICE void plan_row() {
        int const subs = work.block_k / steps.size();
        fill_plan(s.plan, s.blocks.count * subs, [&](int i, Unit& unit) {
            unit.tag = i / subs;
            return look_at(s.blocks[i / subs], i % subs, unit);
        });
    }

    // A list per token: their union, each unit with the tokens that have it.
    LSM_DEVICE void plan_union() {
        int const tokens = min(work.tokens, s.place.sequence.Tq - s.place.token);
        int const everybody = static_cast<int>(0xffffffffu >> (32 - tokens));
        merge_plan(s.plan, s.lists[lane()], s.merged[lane()], work.block_k / steps.size(),
                   [&](int block, int sub, Unit& unit) {
                       Kind const kind = look_at(block, sub, unit);
                       return kind == Kind::full && unit.tag != everybody ? Kind::partial : kind;
                   });
    }

    // ---- Results ----

    LSM_DEVICE void finish() {
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            float by[2] = {work.scale, work.scale};
            if constexpr (!kBackward) {
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    int const at = lane_row(m, half_);
                    bool const real = exists(at);
                    float total = sum[m][half_], highest = most[m][half_];
                    total += __shfl_xor_sync(0xffffffffu, total, 1);
                    total += __shfl_xor_sync(0xffffffffu, total, 2);
                    float fade = 1.f;
                    if (p.sink_logits != nullptr && real) {
                        float const sink =
                            load_global(static_cast<float const*>(p.sink_logits) + head(at)) *
                            kLog2e;
                        float const now = fmaxf(highest, sink);
                        fade = exp2_approx(highest - now);
                        total = total * fade + exp2_approx(sink - now);
                        highest = now;
                    }
                    by[half_] = total == 0.f ? 0.f : fade / total;
                    if (lane() % 4 == 0 && real)
                        store_global(
                            static_cast<float*>(p.lse) +
                                per_head(work, s.batch, s.place.sequence.q0 + token(at), head(at)),
                            total == 0.f ? -infinity() : (highest + log2f(total)) / kLog2e);
                }
            }
            __syncwarp();
            store_tile_rows<T, D>(s.q, (warp() * MT + m) * 16, kBackward ? width_k() : width_v(),
                                  sums[m], by[0], by[1],
                                  [&](int row) { return row_of(kBackward ? p.dq : p.o, row); });
        }
    }

    // By one warp: what the tile attends to.
    LSM_DEVICE void start_plan() {
        Sequence const& sequence = s.place.sequence;
        Bounds const tile = bounds(0, kRows);
        if (unites()) {
            bool const real = lane() < work.tokens && s.place.token + lane() < sequence.Tq;
            s.lists[lane()] =
                real ? list_blocks(work, sequence, s.first_head, s.place.token + lane())
                     : Blocks{nullptr, 0, 0, 0, 0};
            s.merged[lane()] = 0;
        }
        if (lane() != 0) return;
        s.tile = tile;
        s.plan.next = 0;
        if (!unites())
            s.blocks = work.lists
                           ? list_blocks(work, sequence, s.first_head, s.place.token / work.block_q)
                           : visible_keys(work, sequence, tile);
    }

    LSM_DEVICE void run() {
        if (s.place.unused) return;
        if (s.place.poison) return poison();
        start_rows();
        if (lane() == 0) {
            int const m0 = warp() * MT * 16;
            s.seen[warp()] = bounds(m0, 16 * MT);
            bool idle = true;
            u32 tokens = 0;
            for (int m = m0; m < m0 + 16 * MT; ++m) {
                idle &= !exists(m);
                if (unites()) tokens |= 1u << work.token_of(m);
            }
            s.idle[warp()] = idle, s.tokens[warp()] = tokens;
        }
        if (warp() == 0) start_plan();
        LSM_UNROLL_BY(1)
        do {
            __syncthreads();  // the last part is done with
            if (warp() == 0) unites() ? plan_union() : plan_row();
            __syncthreads();
            go_through(*this, s.plan, steps.each);
        } while (s.plan.more);
        cp_async_wait<0>();
        __syncthreads();  // q, if there was no step at all
        finish();
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks) tensor_rows(Work work) {
    RowsKernel<Config>(work).run();
}

}  // namespace lsm::sparse_attn
