// A tile of queries, whatever multiplies it: which rows it has, what they see, what they attend to, and the softmax of
// their scores.
#pragma once

#include "kernels/sparse_attn/repair.cuh"
#include "kernels/sparse_attn/tensor.cuh"

namespace lsm::sparse_attn {

// Warps have MT x 16 rows each, a strip, and every `Together` of them, a group, take a step or leave it together. Of a
// block's threads the first have rows. With `Split` that many warps have the same strip: each makes all of its scores, and
// adds up `Sums` of the columns of its results.
template <class Config>
struct QueryTile {
    using T = typename Config::T;
    static constexpr int D = Config::D, MT = Config::MT, N = Config::N, Warps = Config::Warps;
    static constexpr int Split = Config::Split, Sums = Config::Sums;
    static constexpr int kThreads = 32 * Warps, kRows = 16 * MT * Warps / Split;
    static constexpr int kGroups = Warps / Config::Together;
    static constexpr bool kBackward = Config::Backward, kPlain = Config::Plain;

    // What the loop over keys does not touch lies in shared memory: it has no registers to spare.
    struct Shared {
        Row rows[kRows];
        Head heads[kRows];
        Plan plan;
        Place place;
        int batch, key_head, first_head;
        Bounds tile, seen[kGroups];  // of all rows, of each group's
        u32 tokens[kGroups];         // with `unite`, that each group has
        bool idle[kGroups];          // no rows
        Blocks blocks;               // of the tile, or with `unite` of each token
        Blocks lists[32];
        int merged[32];
        u32 odd[Split > 1 ? Warps : 1][2];
        float bias[kBackward ? Warps : 1][kBackward ? kPlan : 1];  // gradients, of each unit
    };

    Work const& work;
    SparseAttnParams const& p;
    Shared& s;
    Mask const& mask;
    Steps const steps;
    float most[MT][2], sum[MT][2];  // running maximum in units of log2, sum of this lane
    float sums[MT][Sums / 8][4];
    float lse[2], delta[2], ramp[2];  // backward, MT = 1; the ramp's gradient of this lane

    LSM_DEVICE QueryTile(Work const& work_, Shared& shared)
        : work(work_), p(work_.p), s(shared), mask(work_.mask), steps(work_.block_k, N) {
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

    // ---- Rows ----

    LSM_DEVICE bool unites() const { return Config::Unites && work.unite; }
    LSM_DEVICE static int lane() { return threadIdx.x % 32; }
    LSM_DEVICE static int warp() { return threadIdx.x / 32; }
    LSM_DEVICE static int group() { return warp() / Config::Together; }
    LSM_DEVICE static int strip() { return warp() / Split; }
    LSM_DEVICE static int first_column() { return warp() % Split * Sums; }  // of its results
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
        return (strip() * MT + m) * 16 + lane() / 4 + 8 * half_;
    }

    LSM_DEVICE void poison() {
        Rows const& to = kBackward ? p.dq : p.o;
        int const columns = kBackward ? width_k() : width_v();
        u32 const nans = pack_as<T>(nan_value(), nan_value());
        for (int m = warp(); m < kRows; m += Warps) {
            if (!exists(m, p.Tq)) continue;
            T* const row = element<T>(to, s.batch, token(m), head(m));
            for (int c = 2 * lane(); c < columns; c += 64)
                store_global(reinterpret_cast<u32*>(row + c), nans);
            float* const number = kBackward ? work.ramp_parts : static_cast<float*>(p.lse);
            if (number != nullptr && lane() == 0)
                store_global(number + per_head(work, s.batch, token(m), head(m)), nan_value());
        }
    }

    LSM_DEVICE void start_rows() {
        Sequence const& sequence = s.place.sequence;
        int const shift = mask.shift(sequence.Tq, sequence.Tk), last = mask.key(sequence.Tk - 1);
        for (int m = threadIdx.x; m < kRows; m += kThreads) {
            bool const real = exists(m);
            s.rows[m] = real ? mask.row(token(m) + shift, mask.left_of(head(m)), last)
                             : Row{0, -kFar, 0, 0};
            s.heads[m] = real ? Head::of(work, head(m)) : Head{0.f, 0.f};
        }
        if (threadIdx.x % (32 * Config::Together) == 0) look_at_group();
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) {
            LSM_UNROLL
            for (int i = 0; i < Sums / 2; ++i) sums[m][i / 4][i % 4] = 0.f;
            LSM_UNROLL
            for (int half_ = 0; half_ < 2; ++half_) {
                // beside the maximum of a row that does not exist no key weighs anything
                most[m][half_] = exists(lane_row(m, half_)) ? kLowest : -kLowest;
                sum[m][half_] = 0.f;
            }
        }
        if constexpr (kBackward) load_stats();
    }

    LSM_DEVICE void load_stats() {
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            int const row = lane_row(0, half_);
            float4 const stats =
                exists(row) ? load_global(work.stats + per_head(work, s.batch,
                                                                s.place.sequence.q0 + token(row),
                                                                head(row)))
                            : float4{infinity(), 0.f, infinity(), 0.f};
            lse[half_] = stats.x > kOddLse ? stats.x : nan_value();
            delta[half_] = stats.y;
            ramp[half_] = 0.f;
        }
    }

    LSM_DEVICE void look_at_group() {
        constexpr int kCount = kRows / kGroups;
        int const m0 = group() * kCount;
        s.seen[group()] = bounds(m0, kCount);
        bool idle = true;
        u32 tokens = 0;
        for (int m = m0; m < m0 + kCount; ++m) {
            idle &= !exists(m);
            if (unites()) tokens |= 1u << work.token_of(m);
        }
        s.idle[group()] = idle, s.tokens[group()] = tokens;
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

    // ---- Plans, by one warp ----

    // What the tile attends to.
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

    LSM_DEVICE void plan_part() { unites() ? plan_union() : plan_row(); }

    // ---- Steps ----

    // Whether no row of this group of warps sees a key of the step.
    LSM_DEVICE bool skips(int step) const {
        for (int c = 0; c < steps.each; ++c) {
            Unit const unit = s.plan.at(step * steps.each + c);
            if (unit.first < 0 || (unites() && (unit.tag & s.tokens[group()]) == 0)) continue;
            if (mask.kind(s.seen[group()], mask.key(unit.first),
                          mask.key(unit.first + steps.size() - 1)) != Kind::skip)
                return false;
        }
        return true;
    }

    // f(score in units of log2 or -inf, slope, ramp's slope) for every element.
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
                        float value = x[m][n][e] * by, slope = 1.f, ramp = 0.f;
                        if constexpr (!kBare) {
                            Score const bent =
                                score<true>(work, s.heads[at], x[m][n][e], row.p - position, bias);
                            value = bent.s * kLog2e, slope = bent.slope, ramp = bent.ramp;
                        }
                        f(m, n, e, real && mask.sees(row, position) ? value : -infinity(), slope,
                          ramp);
                    }
                }
            }
        }
    }

    // Products to scores in units of log2, or -inf.
    LSM_DEVICE void bend_scores(int step, Accumulators<N> (&x)[MT]) {
        auto const keep = [&](int m, int n, int e, float value, float, float) {
            x[m][n][e] = value;
        };
        kPlain || work.plain ? bend<true>(step, x, keep) : bend<kPlain>(step, x, keep);
    }

    // Scores, which are units of log2 / by, to weights, against the maximum of now. `fade` is what earlier ones are to be
    // multiplied with; whether any changes.
    LSM_DEVICE bool soften(int m, Accumulators<N>& x, float by, float (&fade)[2]) {
        bool moved = false;
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            float highest = kLowest;
            LSM_UNROLL
            for (int n = 0; n < N / 8; ++n)
                highest = fmaxf(highest, fmaxf(x[n][2 * half_], x[n][2 * half_ + 1]));
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
                    x[n][e] = exp2_approx(x[n][e] * by - now);
                    total += x[n][e];
                }
            }
            sum[m][half_] = sum[m][half_] * fade[half_] + total;
        }
        return moved;
    }

    // Whether some weight of the warp's rows is large enough for the values to count.
    LSM_DEVICE bool weighs(Accumulators<N> const& weights) const {
        float most_ = 0.f;
        LSM_UNROLL
        for (int n = 0; n < N / 8; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) most_ = fmaxf(most_, weights[n][e]);
        }
        return __any_sync(0xffffffffu, most_ > work.least_weight);
    }

    LSM_DEVICE void fade_sums(int m, float const (&fade)[2]) {
        LSM_UNROLL
        for (int n = 0; n < Sums / 8; ++n) {
            sums[m][n][0] *= fade[0], sums[m][n][1] *= fade[0];
            sums[m][n][2] *= fade[1], sums[m][n][3] *= fade[1];
        }
    }

    // ---- Gradients ----

    // Products of queries and keys, and of dO and values, to dS in place of the former. `wait`: for the latter.
    template <bool kBent, class Wait>
    LSM_DEVICE void differentiate(int step, Accumulators<N> (&x)[MT], Accumulators<N> (&grad)[MT],
                                  Wait wait) {
        if constexpr (kBent) {
            wait();
            float all[N / 16] = {};
            auto const gradient = [&](int m, int n, int e, float value, float slope, float bend) {
                bool const hidden = value == -infinity();
                float const ds =
                    hidden ? 0.f : exp2_approx(value - lse[e / 2]) * (grad[m][n][e] - delta[e / 2]);
                x[m][n][e] = hidden ? 0.f : ds * slope;
                all[n / 2] += ds;
                ramp[e / 2] += bend == 0.f ? 0.f : ds * bend;
            };
            if (work.plain) {
                bend<true>(step, x, gradient);
            } else {
                bend<false>(step, x, gradient);
                if (work.bias_parts != nullptr && first_column() == 0) keep_bias(step, all);
            }
        } else {
            float const by = work.scale * kLog2e;
            LSM_UNROLL
            for (int i = 0; i < N / 2; ++i) {
                float& e = x[0][i / 4][i % 4];
                e = exp2_approx(e * by - lse[i / 2 % 2]);
            }
            wait();
            LSM_UNROLL
            for (int i = 0; i < N / 2; ++i)
                x[0][i / 4][i % 4] *= grad[0][i / 4][i % 4] - delta[i / 2 % 2];
        }
    }

    // Sums over this warp's rows, of each unit of the step.
    LSM_DEVICE void keep_bias(int step, float (&all)[N / 16]) {
        LSM_UNROLL
        for (int j = 0; j < N / 16; ++j) {
            int const column = 16 * j, within = column & (steps.size() - 1);
            float sum = warp_sum(all[j]);
            int const unit = step * steps.each + column / steps.size();
            if (lane() != 0 || unit >= kPlan) continue;
            float* const to = &s.bias[warp()][unit];
            *to = within == 0 ? sum : *to + sum;
        }
    }
    LSM_DEVICE bool biased() const { return kBackward && work.bias_parts != nullptr; }
    // Before a part of the plan, for warps that leave a step out.
    LSM_DEVICE void clear_bias() {
        for (int i = threadIdx.x; biased() && i < Warps * kPlan; i += kThreads)
            s.bias[i / kPlan][i % kPlan] = 0.f;
    }
    LSM_DEVICE void store_bias() const {
        store_bias_sums<Warps, kThreads>(work, s.plan, s.bias, s.place.token, s.key_head,
                                         s.first_head, s.blocks.entry);
    }

    LSM_DEVICE void store_ramp() const {
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            float sum = ramp[half_];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            int const row = lane_row(0, half_);
            if (lane() % 4 == 0 && exists(row) && first_column() == 0)
                store_global(
                    work.ramp_parts +
                        per_head(work, s.batch, s.place.sequence.q0 + token(row), head(row)),
                    sum);
        }
    }

    // ---- What is not finite ----

    // Of each half of 16 rows the lanes whose sums are not finite though the row's softmax is.
    LSM_DEVICE void find_odd(int m, float const (&softmax)[2], u32 (&odd)[2]) const {
        float zero[2] = {0.f, 0.f};
        LSM_UNROLL
        for (int n = 0; n < Sums / 8; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) zero[e / 2] += sums[m][n][e] * 0.f;
        }
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            bool const known = softmax[half_] == softmax[half_];
            odd[half_] = __ballot_sync(0xffffffffu,
                                       zero[half_] != 0.f && known && exists(lane_row(m, half_)));
        }
    }

    // Of warps that share a strip the first repairs what any of them found, after all have stored.
    LSM_DEVICE void share_odd(u32 (&odd)[2]) {
        if (lane() == 0) s.odd[warp()][0] = odd[0], s.odd[warp()][1] = odd[1];
        __syncthreads();
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {
            odd[half_] = 0;
            for (int w = 0; w < Split && first_column() == 0; ++w)
                odd[half_] |= s.odd[warp() + w][half_];
        }
    }

    // These rows, four lanes each, after they were stored.
    LSM_DEVICE void repair(int m, u32 const (&odd)[2]) const {
        if ((odd[0] | odd[1]) == 0) return;
        __syncwarp();
        LSM_UNROLL_BY(1)
        for (int r = 0; r < 16; ++r) {
            int const row = (strip() * MT + m) * 16 + r;
            if (((r < 8 ? odd[0] : odd[1]) >> 4 * (r % 8) & 15) != 0)
                repair_row<kBackward, lane_columns(D)>(work, s.place.sequence, s.batch, s.key_head,
                                                       head(row), token(row));
        }
    }

    // ---- Results ----

    // lse of this lane's rows; what their sums are to be multiplied with.
    LSM_DEVICE void finish_softmax(int m, float (&by)[2]) const {
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
                    load_global(static_cast<float const*>(p.sink_logits) + head(at)) * kLog2e;
                float const now = fmaxf(highest, sink);
                fade = exp2_approx(highest - now);
                total = total * fade + exp2_approx(sink - now);
                highest = now;
            }
            by[half_] = total == 0.f ? 0.f : fade / total;
            if (lane() % 4 == 0 && real && first_column() == 0)
                store_global(static_cast<float*>(p.lse) +
                                 per_head(work, s.batch, s.place.sequence.q0 + token(at), head(at)),
                             total == 0.f ? -infinity() : (highest + log2f(total)) / kLog2e);
        }
    }
};

}  // namespace lsm::sparse_attn
