// A tile of queries and the blocks of keys they see. Queries lie in lanes, so that a softmax is element-wise over keys;
// keys and values lie in rows as in memory, so that nothing but queries is turned.
#pragma once

#include "sparse_attn_pairs.h"
#include "sparse_attn_room.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// A run of lane vectors.
struct Run {
    int begin, end;
};

template <class T>
class AttnTile : public TileRoom<T> {
    using Room = TileRoom<T>;
    using Room::p_, Room::task_, Room::block_k_, Room::K_, Room::V_, Room::queries_, Room::keys_,
        Room::values_, Room::token_, Room::tokens_, Room::lanes_;

  public:
    using Room::W, Room::head;
    static constexpr int kVectors = kLaneCount / W;

    AttnTile(SparseAttnParams const& p, SparseAttnTask const& task, bool backward)
        : Room(p, task),
          backward_(backward),
          pairs_(takes_pairs<T>(p, backward)),
          packed_(pairs_ && !backward) {}

    void take(Arena<T>& arena) {
        if (packed_) packs_.take(arena, p_, K_, V_);
        Room::take(arena, kLaneCount);
        turned_ = arena.take(K_ * kLaneCount);
        if (!pairs_) return;
        int64_t const depth = pair_depth(block_k_), columns = max_of(K_, V_);
        rows_of_pairs_ = arena.take(max_of(kLaneCount * columns, depth * V_) / 2);
        if (backward_) return;
        arena.take_each(depth / 2 * kLaneCount, weight_pairs_);
    }

    void start(int64_t token) {
        this->place(token);
        vectors_ = (lanes_ + W - 1) / W;
        if (pairs_) turn_pairs(turned_, p_.q, p_.K);
        if (!pairs_ || backward_) {
            std::memset(queries_, 0, size_t(vectors_ * W * K_) * sizeof(T));
            this->read_queries(T(1));
        }
        if (!pairs_) turn(turned_, kLaneCount, queries_, K_, vectors_ * W, K_);
        find_bounds();
        find_lists();
    }

    // The next block that any query sees: false after the last one.
    bool next() {
        for (;;) {
            if (!next_block()) return false;
            first_ = block_ * block_k_;
            count_ = min_of(block_k_, task_.keys - first_);
            if (visible()) return true;
        }
    }

    // Keys and values of the block, of which [from, from + size()) are seen by any. Pairs need numbers only where values
    // might not be finite.
    void read_keys() {
        if (!pairs_ || partial()) read_numbers();
    }
    void read_numbers() { Room::read_keys(key(), pairs_size()); }

    // Whether scores are still to be multiplied with the scale: no other term wants them scaled.
    bool plain() const {
        return p_.softcap == 0 && p_.lists.bias == nullptr && p_.alibi_slopes == nullptr &&
               p_.ramp == nullptr && p_.scale > kLeastScale;
    }
    T score_scale() const { return plain() ? T(p_.scale) : T(1); }

    // Scores of the block, [size()][lanes], -inf where a query does not see a key; with a softcap `capped` keeps
    // tanh(s / softcap), if it is not null.
    void scores(T* S, T* capped) const {
        over_runs([&](Run run) {
            T* const to = S + run.begin * W;
            T const* const queries = turned_ + run.begin * W;
            int64_t const vectors = run.end - run.begin;
            void const* const keys = packed_ ? key_rows_ : this->row_of(p_.k, key());
            multiply_rows_of(keys, packed_ ? p_.K : p_.k.time, keys_, p_.K, to, queries, vectors);
            for (int64_t j = 0; j < size_ && !plain(); ++j)
                for (int64_t i = j * kLaneCount; i < j * kLaneCount + vectors * W; i += W)
                    store(to + i, load(to + i) * T(p_.scale));
            for (int v = run.begin; v < run.end; ++v) {
                if (p_.softcap > 0) cap(S, capped, v);
                if (p_.lists.bias != nullptr) add_bias(S, v);
                if (p_.alibi_slopes != nullptr) add_slope(S, v);
                if (p_.ramp != nullptr) add_ramp(S, v);
                if (!full_[v]) mask(S, v);
            }
        });
    }

    // Of the block's values and a matrix that lies as the queries do once turned: [size()][lanes], for vectors of lanes.
    void value_products(T* to, T const* turned, Run lanes) const {
        int64_t const at = lanes.begin * W;
        multiply_rows_of(this->row_of(p_.v, key()), p_.v.time, values_, p_.V, to + at, turned + at,
                         lanes.end - lanes.begin);
    }

    // Of the block, for scores and add_paired_values: keys in rows, values [V][keys / 2].
    void pack() {
        if (!packed_) return;
        // The whole block, if the keys that are seen begin with a pair of it and end with what products take at once.
        bool const whole = from_ % 2 == 0 && from_ + pair_depth(size_) <= pair_depth(count_);
        int64_t const first = whole ? first_ : key(), count = whole ? count_ : size_;
        auto const [pack, filled] = packs_.of(task_, whole ? block_ : -1);
        int64_t const row = K_ / 2;
        T* const values = pack + block_k_ * row;
        value_pairs_of_row_ = pair_depth(count) / 2;
        key_rows_ = pack + (key() - first) * row, value_pairs_ = values + (key() - first) / 2;
        if (filled) return;
        for (int64_t j = 0; j < count; ++j)
            std::memcpy(pack + j * row, this->row_of(p_.k, first + j), size_t(row) * sizeof(T));
        pair_rows(rows_of_pairs_, V_, count,
                  [&](int64_t j) { return this->row_of(p_.v, first + j); });
        turn(values, value_pairs_of_row_, rows_of_pairs_, V_, value_pairs_of_row_, V_);
    }

    // Where soften leaves a vector's weights for add_paired_values.
    T* weight_pairs(int v) const { return weight_pairs_ + v * W; }

    // O[c][lane] += sum over keys of their values times the weights S[key][lane], for vectors of lanes ...
    void add_values(T* O, T const* S, Run lanes, bool finite) const {
        int64_t const at = lanes.begin * W, vectors = lanes.end - lanes.begin;
        add_weighed<true>(finite, O + at, kLaneCount, values_, V_, S + at, kLaneCount, p_.V,
                          vectors, size_);
    }
    // ... or the weights that are there in pairs.
    void add_paired_values(T* O, Run lanes) const {
        int64_t const at = lanes.begin * W, vectors = lanes.end - lanes.begin;
        int64_t const depth = pair_depth(size_);
        for (int64_t j = (size_ + 1) / 2; j < depth / 2; ++j)
            std::memset(weight_pairs_ + j * kLaneCount + at, 0, size_t(vectors * W) * sizeof(T));
        multiply_by_pairs(O + at, kLaneCount, value_pairs_, value_pairs_of_row_ * 4,
                          weight_pairs_ + at, kLaneCount, p_.V, vectors, depth, true);
    }

    // Rows of the tile in memory as products want them on their right: over their columns, [columns / 2][lanes] ...
    void turn_pairs(T* to, Rows const& rows, int64_t columns) {
        int64_t const row = columns / 2;
        std::memset(rows_of_pairs_, 0, size_t(vectors_ * W * row) * sizeof(T));
        for (int i = 0; i < lanes_; ++i)
            std::memcpy(rows_of_pairs_ + i * row, this->row(rows, i), size_t(row) * sizeof(T));
        turn(to, kLaneCount, rows_of_pairs_, row, vectors_ * W, row);
    }
    // ... or over the lanes, [lanes / 2][columns].
    void pair_lanes(T* to, Rows const& rows, int64_t columns) const {
        pair_rows(to, columns, lanes_, [&](int64_t i) { return this->row(rows, int(i)); });
    }

    bool pairs() const { return pairs_; }

    template <class F>
    void over_runs(F const& f) const {
        for (int r = 0; r < runs_; ++r) f(run_[r]);
    }

    // Whether vectors of the whole tile are in runs, whatever its number of queries.
    bool every_lane() const { return runs_ == 1 && run_[0].begin == 0 && run_[0].end == kVectors; }

    // f(entry of the lists, first lane, last lane) for every row of the lists that has the block.
    template <class F>
    void over_entries(F const& f) const {
        for (int r = 0; r < rows_; ++r)
            if (member_[r])
                f(entry_[r], r * lanes_of_row_, min_of((r + 1) * lanes_of_row_, lanes_));
    }

    // |p - x| of the queries of vector v and key j of the block.
    Vector<T> distance(int v, int64_t j) const {
        Vector<T> const d = load(relative_ + v * W) - T((from_ + j) * p_.mask.key_stride);
        return d < T(0) ? -d : d;
    }
    // The ramp before it is clamped.
    Vector<T> ramp(int v, int64_t j) const {
        T const length = T(p_.ramp_length);
        return (length + load(ramp_ + v * W) - distance(v, j)) / length;
    }

    // Whether some query does not see some key of the block.
    bool partial() const {
        bool some = false;
        over_runs([&](Run run) {
            for (int v = run.begin; v < run.end; ++v) some = some || !full_[v];
        });
        return some || p_.ramp != nullptr;
    }
    bool finite_keys() const { return all_finite(keys_, size_ * K_); }
    bool finite_values() const { return all_finite(values_, pairs_size() * V_); }
    bool finite_queries() const { return all_finite(queries_, vectors_ * W * K_); }

    int64_t key() const { return first_ + from_; }  // of the sequence
    int64_t size() const { return size_; }
    // With the keys of the block that products of pairs meet with weights of 0.
    int64_t pairs_size() const {
        return packed_ ? min_of(count_ - from_, pair_depth(size_)) : size_;
    }
    int vectors() const { return vectors_; }

  private:
    // C[key][lane] = keys' rows, of bf16 a `stride` apart or as numbers, times B, which lies as those are.
    void multiply_rows_of(void const* rows, int64_t stride, T const* numbers, int64_t columns, T* C,
                          T const* B, int64_t vectors) const {
        if (pairs_)
            return multiply_by_pairs(C, kLaneCount, rows, stride * 2, B, kLaneCount, size_, vectors,
                                     columns, false);
        multiply<false>(C, kLaneCount, numbers, panels(columns, W) * W, B, kLaneCount, size_,
                        vectors, columns, false);
    }
    T const* number(void const* per_head, int64_t h) const {
        return static_cast<T const*>(per_head) + h;
    }

    void find_bounds() {
        AttnMask const& m = p_.mask;
        int64_t const shift = this->shift();
        extent_ = {0, task_.keys, 0};
        sinks_most_ = 0, begin_most_ = 0, end_least_ = task_.keys;
        for (int i = 0; i < vectors_ * W; ++i) {
            int const of = min_of(i, lanes_ - 1);  // lanes without a query take after the last one
            int64_t const h = head(of), p = token_ + of / task_.heads + shift;
            double reach = INFINITY;
            if (p_.alibi_slopes != nullptr) slope_[i] = *number(p_.alibi_slopes, h);
            if (p_.ramp != nullptr) {
                ramp_[i] = *number(p_.ramp, h);
                reach = p_.ramp_length + double(ramp_[i]);
            }
            position_[i] = p;
            if (m.dilation > 1) phase_[i] = T(p - floor_div(p, m.dilation) * m.dilation);
            Seen const s = seen_[i] = keys_seen(m, p, h, task_.keys, reach);
            extent_.begin = min_of(extent_.begin, s.begin);
            extent_.end = max_of(extent_.end, s.end);
            sinks_most_ = max_of(sinks_most_, s.sink_end);
            begin_most_ = max_of(begin_most_, s.begin);
            end_least_ = min_of(end_least_, s.end);
        }
        extent_.sink_end = sinks_most_;
    }

    void find_lists() {
        BlockLists const& lists = p_.lists;
        block_ = -1;
        if (lists.index == nullptr) {
            rows_ = 0;
            return;
        }
        int64_t const tokens = min_of(lists.block_q, tokens_of_tile(p_));
        rows_ = int((tokens_ + tokens - 1) / tokens);
        lanes_of_row_ = int(tokens * task_.heads);
        for (int r = 0; r < rows_; ++r) {
            auto const list = this->list_of(token_ + r * tokens);
            entry_[r] = list.begin - 1, last_[r] = list.end;
            member_[r] = true;  // so that next_block advances it
        }
    }

    // The smallest block beyond the last one in any row's list.
    bool next_block() {
        if (p_.lists.index == nullptr) {
            ++block_;
            int64_t const sink_blocks = (extent_.sink_end + block_k_ - 1) / block_k_;
            if (block_ >= sink_blocks) block_ = max_of(block_, extent_.begin / block_k_);
            return block_ * block_k_ < max_of(extent_.end, extent_.sink_end);
        }
        int64_t least = INT64_MAX;
        for (int r = 0; r < rows_; ++r) {
            if (member_[r]) ++entry_[r];
            if (int64_t const block = listed(r); block >= 0) least = min_of(least, block);
        }
        for (int r = 0; r < rows_; ++r) member_[r] = least != INT64_MAX && listed(r) == least;
        block_ = least;
        return least != INT64_MAX;
    }
    int64_t listed(int r) const { return entry_[r] < last_[r] ? p_.lists.index[entry_[r]] : -1; }

    // Which vectors of queries see any key of the block, and whether they see all; false if none does.
    bool visible() {
        bool const dilated = p_.mask.dilation > 1;
        bool every = true;
        for (int r = 0; r < rows_; ++r) every = every && member_[r];
        for (int i = 0; i < vectors_ * W; ++i)
            relative_[i] = T(position_[i] - first_ * p_.mask.key_stride - p_.mask.key_length + 1);
        if (every && !dilated && begin_most_ <= first_ && first_ + count_ <= end_least_) {
            run_[0] = {0, vectors_};
            runs_ = 1, from_ = 0, size_ = count_;
            for (int v = 0; v < vectors_; ++v) full_[v] = true;
            return true;
        }
        int64_t from = count_, to = 0;
        bool any[kVectors];
        for (int v = 0; v < vectors_; ++v) {
            any[v] = false, full_[v] = !dilated;
            for (int i = v * W; i < (v + 1) * W; ++i) {
                bool const in = rows_ == 0 || member_[min_of(i / lanes_of_row_, rows_ - 1)];
                auto const relative = [&](int64_t key) {
                    return in ? clamped(key - first_, 0, count_) : 0;
                };
                int64_t const sink = relative(seen_[i].sink_end);
                int64_t const begin = relative(seen_[i].begin), end = relative(seen_[i].end);
                sink_end_[i] = T(sink), begin_[i] = T(begin), end_[i] = T(end);
                full_[v] = full_[v] && (sink == count_ || (begin == 0 && end == count_));
                if (sink > 0) from = 0, to = max_of(to, sink);
                if (end > begin) from = min_of(from, begin), to = max_of(to, end);
                any[v] = any[v] || sink > 0 || end > begin;
            }
        }
        from_ = from, size_ = to - from, runs_ = 0;
        for (int v = 0; v < vectors_; ++v) {
            if (!any[v]) continue;
            if (runs_ > 0 && run_[runs_ - 1].end == v) {
                run_[runs_ - 1].end = v + 1;
            } else {
                run_[runs_++] = {v, v + 1};
            }
        }
        return runs_ > 0;
    }

    void mask(T* S, int v) const {
        AttnMask const& m = p_.mask;
        Vector<T> const sink = load(sink_end_ + v * W), begin = load(begin_ + v * W),
                        end = load(end_ + v * W), phase = load(phase_ + v * W);
        Vector<T> const hidden = splat(T(-INFINITY));
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            T const at = T(from_ + j);
            Vector<T> x = load(s);
            Vector<T> near = begin <= at ? x : hidden;
            near = at < end ? near : hidden;
            if (m.dilation > 1) {
                int64_t const pos = (first_ + from_ + j) * m.key_stride + m.key_length - 1;
                near = phase == T(pos % m.dilation) ? near : hidden;
            }
            store(s, at < sink ? x : near);
        }
    }

    void cap(T* S, T* capped, int v) const {
        T const size = T(p_.softcap);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            Vector<T> const x = hyperbolic_tangent(load(s) / size);
            if (capped != nullptr) store(capped + j * kLaneCount + v * W, x);
            store(s, x * size);
        }
    }

    void add_bias(T* S, int v) const {
        T bias[kLaneCount] = {};
        over_entries([&](int64_t entry, int begin, int end) {
            for (int i = begin; i < end; ++i) bias[i] = *number(p_.lists.bias, entry);
        });
        Vector<T> const b = load(bias + v * W);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            store(s, load(s) + b);
        }
    }

    void add_slope(T* S, int v) const {
        Vector<T> const slope = load(slope_ + v * W);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            store(s, load(s) - slope * distance(v, j));
        }
    }

    void add_ramp(T* S, int v) const {
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            Vector<T> const factor = ramp(v, j);
            Vector<T> x = load(s);
            for (int i = 0; i < W; ++i) {
                if (factor[i] >= T(1)) continue;
                x[i] = factor[i] > T(0) ? x[i] + std::log(factor[i]) : T(-INFINITY);
            }
            store(s, x);
        }
    }

    bool const backward_, pairs_, packed_;
    T* turned_;  // queries [K][lanes], or pairs of them [K / 2][lanes]
    T *rows_of_pairs_, *weight_pairs_;
    PackedBlocks<T> packs_;

    // Of the tile.
    int vectors_;
    Seen seen_[kLaneCount], extent_;  // of each query, and of all together
    int64_t position_[kLaneCount], sinks_most_, begin_most_, end_least_;
    T slope_[kLaneCount], ramp_[kLaneCount], phase_[kLaneCount];
    int rows_, lanes_of_row_ = 1;
    int64_t entry_[kLaneCount], last_[kLaneCount];
    bool member_[kLaneCount];

    // Of the block.
    int64_t block_, first_, count_, from_, size_;
    void const* key_rows_;  // packed
    T* value_pairs_;        // packed
    int64_t value_pairs_of_row_;
    T relative_[kLaneCount];  // positions, from that of the block's first key
    T sink_end_[kLaneCount], begin_[kLaneCount], end_[kLaneCount];
    bool full_[kVectors];
    Run run_[kVectors];
    int runs_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
