// A tile of keys, whatever multiplies it: which queries have it on their lists, what they weigh, and where its sums go.
#pragma once

#include "kernels/sparse_attn/tensor.cuh"

namespace lsm::sparse_attn {

// Warps have 16 keys each, a strip, and every `Together` of them, a group, take a step or leave it together. With `Split`
// that many warps have the same strip, and add up a part of the columns of its results.
template <class Config>
struct TileOfKeys {
    using T = typename Config::T;
    static constexpr int D = Config::D, N = Config::N, Warps = Config::Warps;
    static constexpr int Split = Config::Split, Together = Config::Together;
    static constexpr int kThreads = 32 * Warps, kRows = 16 * Warps / Split;
    static constexpr int KSums = Config::KSums, VSums = Config::VSums;
    static constexpr bool kKeys = Config::Wants != Want::values,
                          kValues = Config::Wants != Want::keys;

    // Of a step's queries.
    struct Numbers {
        float4 stats[N];
        Row rows[N];
        float bias[Warps][N];  // of each warp's block, in units of log2
    };
    // What the loop over queries does not touch lies in shared memory: it has no registers to spare.
    struct Shared {
        Plan plan;
        KeyTile tile;
        int head, left;  // whose queries it is, and how far they look back
        Head bent;
        Blocks blocks;        // of queries; with lists, how many
        int2 const* entries;  // and where
        i64 first_row;        // of the sequence's lists for this head
    };

    Work const& work;
    SparseAttnParams const& p;
    Shared& s;
    Mask const& mask;
    Steps const steps;
    float dk[1][kKeys ? KSums / 8 : 1][4];
    float dv[1][kValues ? VSums / 8 : 1][4];

    // Tile `index`; one thread of those that have it `says` where it is.
    LSM_DEVICE TileOfKeys(Work const& work_, Shared& shared, int index, bool says)
        : work(work_), p(work_.p), s(shared), mask(work_.mask), steps(work_.block_q, N) {
        KeyTile const tile = locate_keys(work, kRows, index);
        if (says) s.tile = tile;
        __syncthreads();
    }

    LSM_DEVICE static int lane() { return threadIdx.x % 32; }
    LSM_DEVICE static int warp() { return threadIdx.x / 32; }
    LSM_DEVICE static int strip() { return warp() / Split; }
    LSM_DEVICE static int part() { return warp() % Split; }  // of the strip's columns
    LSM_DEVICE static int group_strip() { return warp() / Together * (Together / Split); }
    LSM_DEVICE int width_k() const { return static_cast<int>(p.K); }
    LSM_DEVICE int width_v() const { return static_cast<int>(p.V); }
    // Of a strip: which of a section's blocks it is in, where its first key is.
    LSM_DEVICE int member(int strip) const {
        int first = 16 * strip;  // in its section
        if constexpr (kRows < 64) first += s.tile.place.token & (work.inverse.section_k - 1);
        return work.lists ? first / work.block_k : 0;
    }
    LSM_DEVICE int position(int strip) const { return mask.key(s.tile.place.token + 16 * strip); }
    LSM_DEVICE T* row_of(Rows const& x, int r) const {
        int const key = s.tile.place.token + r;
        return key < s.tile.place.sequence.Tk
                   ? element<T>(x, s.tile.batch, s.tile.place.sequence.k0 + key, s.tile.key_head)
                   : nullptr;
    }

    LSM_DEVICE void poison() {
        u32 const nans = pack_as<T>(nan_value(), nan_value());
        for (i64 key = s.tile.place.token + warp();
             key < min(p.Tk, static_cast<i64>(s.tile.place.token + kRows)); key += Warps) {
            if constexpr (kKeys)
                for (int c = 2 * lane(); c < width_k(); c += 64)
                    store_global(reinterpret_cast<u32*>(
                                     element<T>(p.dk, s.tile.batch, key, s.tile.key_head) + c),
                                 nans);
            if constexpr (kValues)
                for (int c = 2 * lane(); c < width_v(); c += 64)
                    store_global(reinterpret_cast<u32*>(
                                     element<T>(p.dv, s.tile.batch, key, s.tile.key_head) + c),
                                 nans);
        }
    }

    LSM_DEVICE int shift() const {
        return mask.shift(s.tile.place.sequence.Tq, s.tile.place.sequence.Tk);
    }
    LSM_DEVICE int last() const { return mask.key(s.tile.place.sequence.Tk - 1); }

    LSM_DEVICE void start_sums() {
        if constexpr (kKeys) {
            LSM_UNROLL
            for (int i = 0; i < KSums / 2; ++i) dk[0][i / 4][i % 4] = 0.f;
        }
        if constexpr (kValues) {
            LSM_UNROLL
            for (int i = 0; i < VSums / 2; ++i) dv[0][i / 4][i % 4] = 0.f;
        }
    }

    // ---- Plans, by one warp ----

    LSM_DEVICE void start_plan(int head) {
        Sequence const& sequence = s.tile.place.sequence;
        Inverse const& inverse = work.inverse;
        if (lane() == 0) {
            s.head = head;
            s.left = mask.left_of(head);
            s.bent = Head::of(work, head);
            s.plan.next = 0;
            if (work.lists) {
                // Of several pieces this block's; the first ones have one more of what is left.
                Entries const those =
                    section_entries(work, s.tile.batch, head,
                                    sequence.section0 + s.tile.place.token / inverse.section_k);
                int const piece = s.tile.piece, pieces = s.tile.pieces;
                int const each = those.count / pieces, left = those.count % pieces;
                s.first_row =
                    (static_cast<i64>(s.tile.batch) * p.lists.heads + work.list_head(head)) *
                        p.lists.rows +
                    sequence.row0;
                s.entries = those.at + piece * each + min(piece, left);
                s.blocks.count = each + (piece < left ? 1 : 0);
            } else {
                s.blocks = visible_queries(work, sequence, s.left, mask.key(s.tile.place.token),
                                           last_key());
            }
        }
        __syncwarp();
    }
    LSM_DEVICE int last_key() const {
        return mask.key(min(s.tile.place.token + kRows, s.tile.place.sequence.Tk) - 1);
    }

    LSM_DEVICE void plan_queries() {
        int const subs = work.block_q / steps.size(), per = work.inverse.section_k / work.block_k;
        int const everything = work.lists ? (1 << per) - 1 : 1, Tq = s.tile.place.sequence.Tq;
        fill_plan(s.plan, s.blocks.count * subs, [&](int i, Unit& unit) {
            int2 const entry =
                work.lists ? load_global(s.entries + i / subs) : int2{s.blocks[i / subs], 1};
            unit = {entry.x * work.block_q + i % subs * steps.size(), entry.y};
            if (unit.first >= Tq) return Kind::skip;
            int const p0 = unit.first + shift(),
                      p1 = min(unit.first + steps.size(), Tq) - 1 + shift();
            Kind const kind = mask.kind(mask.bounds(p0, p1, s.left, s.left, last()),
                                        mask.key(s.tile.place.token), last_key());
            bool const whole = work.plain && (unit.tag & 15) == everything;
            return kind == Kind::full && !whole ? Kind::partial : kind;
        });
    }

    // ---- Steps ----

    // Query of a step's column, below 0 if none.
    LSM_DEVICE int token(int step, int column) const {
        int const t = steps.token(s.plan, step, column);
        return t < 0 || t >= s.tile.place.sequence.Tq ? -1 : t;
    }
    LSM_DEVICE Row row(int token) const {
        return token < 0 ? Row{0, -kFar, 0, 0} : mask.row(token + shift(), s.left, last());
    }
    LSM_DEVICE float4 const* stats_of(int token) const {
        return work.stats + per_head(work, s.tile.batch, s.tile.place.sequence.q0 + token, s.head);
    }
    // Of a column that is no query: weighs nothing.
    LSM_DEVICE static float4 no_stats() { return {-kOddLse / 2, 0.f, 0.f, 0.f}; }
    LSM_DEVICE float bias(int step, int column, int member) const {
        Unit const unit = steps.unit(s.plan, step, column);
        if (p.lists.bias == nullptr || unit.first < 0 || !has(unit.tag, member)) return 0.f;
        i64 const row = s.first_row + (unit.first >> (31 - __clz(work.block_q)));
        i64 const entry = p.lists.row_ptr == nullptr ? row * p.lists.capacity
                                                     : load_global(p.lists.row_ptr + row);
        return work.bias(entry + unit.tag / 16 + __popc(unit.tag & ((1 << member) - 1))) * kLog2e;
    }

    LSM_DEVICE static bool has(int tag, int member) { return (tag >> member & 1) != 0; }

    // Whether this group of warps has no key.
    LSM_DEVICE bool idle() const {
        return s.tile.place.token + 16 * group_strip() >= s.tile.place.sequence.Tk;
    }
    // Whether no key of this group of warps is seen by a query of the step.
    LSM_DEVICE bool skips(int step) const {
        constexpr int kStrips = Together / Split;
        int const first = group_strip(), past = first + kStrips;
        int const x0 = position(first), x1 = position(past) - mask.key_stride;
        int const members = (2 << member(past - 1)) - (1 << member(first));
        for (int c = 0; c < steps.each; ++c) {
            Unit const unit = s.plan.at(step * steps.each + c);
            if (unit.first < 0 || (unit.tag & members) == 0) continue;
            int const p0 = unit.first + shift();
            int const p1 = min(unit.first + steps.size(), s.tile.place.sequence.Tq) - 1 + shift();
            if (mask.kind(mask.bounds(p0, p1, s.left, s.left, last()), x0, x1) != Kind::skip)
                return false;
        }
        return true;
    }

    // Which of this lane's accumulators are pairs that count, a bit each, in order.
    LSM_DEVICE u32 seen(int step, Numbers const& numbers) const {
        static_assert(N <= 64);
        u32 bits = 0;
        LSM_UNROLL_BY(1)
        for (int n = 0; n < N / 8; ++n) {
            LSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const column = 8 * n + lane() % 4 * 2 + i;
                Row const row = numbers.rows[column];
                bool const real = has(steps.unit(s.plan, step, column).tag, member(strip()));
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    int const x = position(strip()) + (lane() / 4 + 8 * half_) * mask.key_stride;
                    if (real && mask.sees(row, x)) bits |= 1u << (4 * n + 2 * half_ + i);
                }
            }
        }
        return bits;
    }

    // Products of keys and queries to weights, those of values and dO to dS.
    template <bool kBent>
    LSM_DEVICE void weigh(u32 seen, Numbers const& numbers, Accumulators<N>& x,
                          Accumulators<N>& grad) {
        if constexpr (kBent) {
            work.plain ? weigh_as<true, true>(seen, numbers, x, grad)
                       : weigh_as<true, false>(seen, numbers, x, grad);
        } else {
            weigh_as<false, true>(seen, numbers, x, grad);
        }
    }
    template <bool kBent, bool kPlain>
    LSM_DEVICE void weigh_as(u32 seen, Numbers const& numbers, Accumulators<N>& x,
                             Accumulators<N>& grad) {
        float const by = work.scale * kLog2e;
        LSM_UNROLL
        for (int n = 0; n < N / 8; ++n) {
            LSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const column = 8 * n + lane() % 4 * 2 + i;
                float2 stats = *reinterpret_cast<float2 const*>(&numbers.stats[column]);
                int p = 0;
                if constexpr (!kPlain) {
                    stats.x -= numbers.bias[warp()][column];
                    p = numbers.rows[column].p - position(strip());
                }
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    float& e = x[n][2 * half_ + i];
                    float value = e * by, slope = 1.f;
                    if constexpr (!kPlain) {
                        int const distance = p - (lane() / 4 + 8 * half_) * mask.key_stride;
                        Score const bend = score<true>(work, s.bent, e, distance, 0.f);
                        value = bend.s * kLog2e, slope = bend.slope;
                    }
                    if constexpr (kBent)
                        value = (seen >> (4 * n + 2 * half_ + i) & 1) != 0 ? value : -infinity();
                    e = exp2_approx(value - stats.x);
                    if constexpr (kKeys) {
                        float& d = grad[n][2 * half_ + i];
                        d = e * (d - stats.y) * slope;
                    }
                }
            }
        }
    }

    // ---- Results ----

    // Through the tiles of keys and values, of layouts Keys and Values, which nobody needs any more; of one of several
    // pieces its sums in fp32.
    template <class Keys, class Values>
    LSM_DEVICE void store(char* keys, char* values) {
        if (s.tile.pieces > 1) return leave();
        if constexpr (kKeys)
            store_tile_rows<T, Keys>(
                keys, 16 * strip(), width_k(), dk[0], work.scale, work.scale,
                [&](int r) { return row_of(p.dk, r); }, part() * KSums);
        if constexpr (kValues)
            store_tile_rows<T, Values>(
                values, 16 * strip(), width_v(), dv[0], 1.f, 1.f,
                [&](int r) { return row_of(p.dv, r); }, part() * VSums);
    }

    LSM_DEVICE void leave() {
        int const width = width_k() + width_v();
        float* const to =
            work.slots +
            (s.tile.slot + static_cast<i64>(s.tile.piece) * work.section_tiles) * kRows * width;
        auto const store = [&]<int Count>(float const(&x)[Count][4], int first, int columns,
                                          float by) {
            LSM_UNROLL
            for (int n = 0; n < Count; ++n) {
                int const c = 8 * (part() * Count + n) + lane() % 4 * 2;
                if (c >= columns) continue;
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    float* const row = to + (16 * strip() + lane() / 4 + 8 * half_) * width + first;
                    store_global(reinterpret_cast<float2*>(row + c),
                                 {x[n][2 * half_] * by, x[n][2 * half_ + 1] * by});
                }
            }
        };
        if constexpr (kKeys) store(dk[0], 0, width_k(), work.scale);
        if constexpr (kValues) store(dv[0], width_k(), width_v(), 1.f);
    }
};

}  // namespace lsm::sparse_attn
