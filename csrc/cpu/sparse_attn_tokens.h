// Where every token has a list of its own and scores are plain, a tile has more queries than a product takes at a time: a
// block meets those alone that have it on their lists, packed side by side. What neighbours do not share costs nothing, and
// keys are read once for all of them.
#pragma once

#include "sparse_attn_pairs.h"
#include "sparse_attn_room.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kTileLanes = int(kTokenLanes), kTileTokens = int(kTokensOfTile);

template <class T>
class TokensTile : public TileRoom<T> {
    using Room = TileRoom<T>;
    using Room::p_, Room::task_, Room::block_k_, Room::K_, Room::V_, Room::queries_, Room::keys_,
        Room::tokens_, Room::lanes_;

  public:
    using Room::W;

    TokensTile(SparseAttnParams const& p, SparseAttnTask const& task, bool backward)
        : Room(p, task),
          pairs_(takes_pairs<T>(p, backward) && p.scale > kLeastScale),
          packed_(pairs_ && !backward) {}

    void take(Arena<T>& arena) {
        if (packed_) packs_.take(arena, p_, K_, V_);
        Room::take(arena, kTileLanes);
    }

    void start(int64_t token) {
        this->place(token);
        pairs_ ? copy_rows(queries_, p_.q, columns()) : this->read_queries(T(p_.scale));
        for (int t = 0; t < tokens_; ++t) {
            seen_[t] =
                keys_seen(p_.mask, token + t + this->shift(), task_.head, task_.keys, INFINITY);
            auto const list = this->list_of(token + t);
            entry_[t] = list.begin, last_[t] = list.end;
            next_[t] = listed(t);
        }
    }

    // Rows of the tile's queries as they are in memory, of pairs.
    void copy_rows(T* to, Rows const& rows, int64_t columns) const {
        for (int i = 0; i < lanes_; ++i)
            std::memcpy(to + i * columns, this->row(rows, i), size_t(columns) * sizeof(T));
    }

    // The next block that any query sees: false after the last one.
    bool next() {
        for (;;) {
            int32_t least = INT32_MAX;
            for (int t = 0; t < tokens_; ++t) least = min_of(least, next_[t]);
            if (least == INT32_MAX) return false;
            first_ = least * block_k_, size_ = min_of(block_k_, task_.keys - first_);
            members_ = 0;
            for (int t = 0; t < tokens_; ++t) {
                if (next_[t] != least) continue;
                ++entry_[t];
                next_[t] = listed(t);
                auto const relative = [&](int64_t key) { return clamped(key - first_, 0, size_); };
                Seen const seen{relative(seen_[t].sink_end), relative(seen_[t].begin),
                                relative(seen_[t].end)};
                if (seen.sink_end == 0 && seen.begin == seen.end) continue;
                here_[members_] = seen, member_[members_++] = t;
            }
            if (members_ > 0) return true;
        }
    }

    // Keys and values of the block: numbers, or pairs, and numbers where values might not be finite.
    void read_keys() {
        bool numbers = !pairs_;
        for (int n = 0; n < members_; ++n) numbers = numbers || hides(here_[n]);
        if (numbers) Room::read_keys(first_, size_);
        key_rows_ = this->row_of(p_.k, first_), key_bytes_ = p_.k.time * 2;
        if (!packed_) return;
        auto const [pack, filled] = packs_.of(task_, first_ / block_k_);
        key_rows_ = pack, key_bytes_ = K_ * 2, value_pairs_ = pack + block_k_ * columns();
        if (filled) return;
        for (int64_t j = 0; j < size_; ++j)
            std::memcpy(pack + j * columns(), this->row_of(p_.k, first_ + j),
                        size_t(columns()) * sizeof(T));
        pair_rows(value_pairs_, V_, size_,
                  [&](int64_t j) { return this->row_of(p_.v, first_ + j); });
    }

    // f() for as many of the queries that have the block as fit side by side, until all were there.
    template <class F>
    void over_packs(F const& f) {
        int const heads = int(task_.heads), most = kLaneCount / heads;
        for (begin_ = 0; begin_ < members_; begin_ = end_) {
            end_ = min_of(begin_ + most, members_);
            count_ = 0, partial_ = false;
            for (int n = begin_; n < end_; ++n) {
                for (int h = 0; h < heads; ++h) lane_[count_++] = member_[n] * heads + h;
                partial_ = partial_ || hides(here_[n]);
            }
            f();
        }
    }

    // Of those that are packed: their rows of the tile's `from`, and these turned, in whole vectors.
    void pack(T* rows, T* turned, T const* from, int64_t columns) const {
        int64_t const size = task_.heads * columns;
        for (int n = begin_; n < end_; ++n)
            std::memcpy(rows + (n - begin_) * size, from + member_[n] * size,
                        size_t(size) * sizeof(T));
        std::memset(rows + count_ * columns, 0,
                    size_t((vectors() * W - count_) * columns) * sizeof(T));
        turn(turned, kLaneCount, rows, columns, vectors() * W, columns);
    }
    // Of those packed, rows in memory as numbers.
    void read_packed(T* to, int64_t stride, Rows const& rows, int64_t columns) const {
        for (int n = 0; n < count_; ++n)
            this->access_.read(to + n * stride, this->row(rows, lane(n)), columns, T(1));
    }
    void pack(T* numbers, T const* from) const {
        for (int n = 0; n < vectors() * W; ++n) numbers[n] = n < count_ ? from[lane(n)] : T(0);
    }

    // Scores [keys][queries], -inf where a query does not see a key; of pairs, still to be multiplied with the scale.
    void scores(T* S, T const* turned) const {
        if (pairs_) {
            multiply_by_pairs(S, kLaneCount, key_rows_, key_bytes_, turned, kLaneCount, size_,
                              vectors(), K_, false);
        } else {
            multiply<false>(S, kLaneCount, keys_, K_, turned, kLaneCount, size_, vectors(), p_.K,
                            false);
        }
        for (int n = begin_; n < end_ && partial_; ++n) {
            Seen const& seen = here_[n];
            if (!hides(seen)) continue;
            T* const s = S + (n - begin_) * task_.heads;
            for (int64_t j = seen.sink_end; j < size_; ++j)
                for (int64_t h = 0; h < task_.heads && (j < seen.begin || j >= seen.end); ++h)
                    s[j * kLaneCount + h] = T(-INFINITY);
        }
    }

    // Of values and what is packed and turned as queries are: [keys][queries].
    void value_products(T* to, T const* turned) const {
        if (pairs_) {
            multiply_by_pairs(to, kLaneCount, this->row_of(p_.v, first_), p_.v.time * 2, turned,
                              kLaneCount, size_, vectors(), V_, false);
        } else {
            multiply<false>(to, kLaneCount, this->values_, V_, turned, kLaneCount, size_, vectors(),
                            p_.V, false);
        }
    }

    bool pairs() const { return pairs_; }
    T score_scale() const { return pairs_ ? T(p_.scale) : T(1); }
    // Of a row of queries(): pairs lie in room for a number.
    int64_t columns() const { return pairs_ ? K_ / 2 : K_; }
    T const* value_pairs() const { return value_pairs_; }  // [pair_depth(size()) / 2][V]

    int64_t key() const { return first_; }  // of the sequence
    int64_t size() const { return size_; }
    int count() const { return count_; }  // of those packed
    int vectors() const { return (count_ + W - 1) / W; }
    int lane(int n) const { return lane_[n]; }  // of those packed, in the tile
    bool partial() const { return partial_; }   // some of them does not see some key

  private:
    bool hides(Seen const& seen) const {
        return seen.sink_end < size_ && (seen.begin > 0 || seen.end < size_);
    }
    int32_t listed(int t) const {
        int32_t const block = entry_[t] < last_[t] ? p_.lists.index[entry_[t]] : -1;
        return block < 0 ? INT32_MAX : block;
    }

    bool const pairs_, packed_;
    PackedBlocks<T> packs_;

    // Of the tile.
    Seen seen_[kTileTokens];
    int64_t entry_[kTileTokens], last_[kTileTokens];
    int32_t next_[kTileTokens];  // block of each token's list

    // Of the block: tokens that have it and see some of it.
    int64_t first_, size_;
    void const* key_rows_;  // of pairs
    int64_t key_bytes_;     // from one to the next
    T* value_pairs_;        // packed
    int members_, member_[kTileTokens];
    Seen here_[kTileTokens];
    // Of those the ones that are packed.
    int begin_, end_, count_, lane_[kLaneCount];
    bool partial_;
};

template <class T>
class AttnTokensForward {
  public:
    static constexpr int W = kLanes<T>;

    AttnTokensForward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch)
        : p_(p), task_(task), arena_(scratch), tile_(p, task, false) {
        tile_.take(arena_);
        arena_.take_each(kLaneCount * tile_.columns(), queries_, turned_);
        parts_ = arena_.take(kLaneCount * tile_.V());
        output_ = arena_.take(kTileLanes * tile_.V());
        scores_ = arena_.take(p.lists.block_k * kLaneCount);
        if (tile_.pairs())
            arena_.take_each(pair_depth(p.lists.block_k) / 2 * kLaneCount, weight_pairs_,
                             weight_rows_);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        Tiles const tiles(tile_.pairs());
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            start_softmax();
            while (tile_.next()) {
                tile_.read_keys();
                tile_.over_packs([&] {
                    tile_.pack(queries_, turned_, tile_.queries(), tile_.columns());
                    bool const finite =
                        !tile_.partial() || all_finite(tile_.values(), tile_.size() * tile_.V());
                    bool const pairs = tile_.pairs() && finite;
                    score(pairs);
                    pairs ? add_paired_values() : add_values(finite);
                    merge();
                });
            }
            finish();
        }
    }

  private:
    void start_softmax() {
        for (int i = 0; i < tile_.lanes(); ++i) {
            start_row(p_, tile_.head(i), most_[i], sum_[i]);
            most_[i] /= tile_.score_scale();
        }
        std::memset(output_, 0, size_t(tile_.lanes() * tile_.V()) * sizeof(T));
    }

    // Weights [keys][queries], or pairs of keys, and by how much what came before fades.
    void score(bool pairs) {
        tile_.scores(scores_, turned_);
        int const count = tile_.count();
        T const scale = tile_.score_scale(), slack = T(softmax_slack(p_)) / scale;
        T most[kLaneCount], sum[kLaneCount];
        tile_.pack(most, most_), tile_.pack(sum, sum_);
        for (int v = 0; v < tile_.vectors(); ++v) {
            Vector<T> top = load(most + v * W), total = load(sum + v * W), highest;
            T* const s = scores_ + v * W;
            store(fade_ + v * W,
                  tile_.pairs() ? soften<true>(s, tile_.size(), scale, slack, top, total, highest,
                                               pairs ? weight_pairs_ + v * W : nullptr)
                                : soften(s, tile_.size(), scale, slack, top, total, highest));
            store(most + v * W, top), store(sum + v * W, total);
            heavy_[v] = weighs<T>(p_, (highest - top) * scale, count - v * W);
        }
        for (int n = 0; n < count; ++n)
            most_[tile_.lane(n)] = most[n], sum_[tile_.lane(n)] = sum[n];
    }

    // f(first query, last query) of those packed whose values count, in runs of vectors; zeros for the others.
    template <class F>
    void over_heavy(F const& f) {
        int64_t const V = tile_.V();
        for (int v = 0, end; v < tile_.vectors(); v = end) {
            for (end = v + 1; end < tile_.vectors() && heavy_[end] == heavy_[v];) ++end;
            if (heavy_[v]) {
                f(v * W, end * W);
            } else {
                std::memset(parts_ + v * W * V, 0, size_t((end - v) * W * V) * sizeof(T));
            }
        }
    }

    void add_values(bool finite) {
        int64_t const V = tile_.V();
        over_heavy([&](int first, int end) {
            int64_t const rows = min_of(end, tile_.count()) - first;
            std::memset(parts_ + first * V, 0, size_t(rows * V) * sizeof(T));
            add_weighed<true, true>(finite, parts_ + first * V, V, scores_ + first, kLaneCount,
                                    tile_.values(), V, rows, V / W, tile_.size());
        });
    }

    // Weights become rows of pairs, one for each query.
    void add_paired_values() {
        int64_t const V = tile_.V(), depth = pair_depth(tile_.size()), row = depth / 2;
        int64_t const lanes = tile_.vectors() * W;
        for (int64_t j = (tile_.size() + 1) / 2; j < row; ++j)
            std::memset(weight_pairs_ + j * kLaneCount, 0, size_t(lanes) * sizeof(T));
        turn(weight_rows_, row, weight_pairs_, kLaneCount, row, lanes);
        over_heavy([&](int first, int end) {
            multiply_by_pairs(parts_ + first * V, V, weight_rows_ + first * row, row * 4,
                              tile_.value_pairs(), V, end - first, V / W, depth, false);
        });
    }

    void merge() {
        int64_t const V = tile_.V();
        for (int n = 0; n < tile_.count(); ++n) {
            T* const o = output_ + tile_.lane(n) * V;
            for (int64_t c = 0; c < V; c += W)
                store(o + c, load(o + c) * fade_[n] + load(parts_ + n * V + c));
        }
    }

    void finish() {
        int64_t const V = tile_.V();
        for (int i = 0; i < tile_.lanes(); ++i) {
            T* const o = output_ + i * V;
            T const share = sum_[i] == 0 ? T(0) : T(1) / sum_[i];
            for (int64_t c = 0; c < V; c += W) store(o + c, load(o + c) * share);
            most_[i] *= tile_.score_scale();
        }
        tile_.write_outputs(output_, most_, sum_);
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    TokensTile<T> tile_;
    T *queries_, *turned_;            // of those packed: [queries][columns], [columns][queries]
    T *scores_, *parts_;              // [keys][queries], [queries][V]
    T *weight_pairs_, *weight_rows_;  // [keys / 2][queries], [queries][keys / 2]
    T* output_;                       // of the tile: [queries][V]
    T most_[kTileLanes], sum_[kTileLanes];
    T fade_[kLaneCount];          // of those packed
    bool heavy_[kLaneCount / W];  // vectors for which the values count
};

// With the formulas of AttnBackward.
template <class T>
class AttnTokensBackward {
  public:
    static constexpr int W = kLanes<T>;

    AttnTokensBackward(SparseAttnParams const& p, SparseAttnTask const& task,
                       SparseAttnSums const& sums, void* scratch)
        : p_(p),
          task_(task),
          arena_(scratch),
          tile_(p, task, true),
          dk_(static_cast<T*>(sums.dk)),
          dv_(static_cast<T*>(sums.dv)),
          d_sink_(static_cast<T*>(sums.sink_logits)) {
        tile_.take(arena_);
        int64_t const keys = p.lists.block_k, K = tile_.K(), V = tile_.V();
        arena_.take_each(keys * kLaneCount, weights_, grads_);
        grad_o_ = arena_.take(kTileLanes * V), dq_ = arena_.take(kTileLanes * K);
        arena_.take_each(kLaneCount * K, queries_, turned_, part_);
        arena_.take_each(kLaneCount * V, packed_grad_o_, grad_o_turned_);
        if (!tile_.pairs()) return;
        int64_t const pairs = pair_depth(keys) / 2;
        grad_o_rows_ = arena_.take(kTileLanes * V / 2);
        arena_.take_each(keys * kLaneCount / 2, weight_rows_, grad_rows_);
        arena_.take_each(pairs * kLaneCount, grad_pairs_, grads_by_query_);
        key_pairs_ = arena_.take(pairs * K);
        arena_.take_each(kLaneCount / 2 * max_of(K, V), query_pairs_, grad_o_pairs_);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        Tiles const tiles(tile_.pairs());
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            read_gradients();
            while (tile_.next()) {
                tile_.read_keys();
                if (tile_.pairs())
                    pair_rows(key_pairs_, tile_.K(), tile_.size(),
                              [&](int64_t j) { return tile_.row_of(p_.k, tile_.key() + j); });
                tile_.over_packs([&] { block(); });
            }
            tile_.write_gradients(dq_);
        }
    }

  private:
    void read_gradients() {
        int64_t const K = tile_.K(), V = tile_.V();
        tile_.read_gradients(grad_o_, lse_, dot_, d_sink_, packed_grad_o_);
        if (tile_.pairs()) tile_.copy_rows(grad_o_rows_, p_.grad_o, V / 2);
        finite_grads_ = all_finite(grad_o_, tile_.lanes() * V);
        finite_queries_ = tile_.pairs() ? all_finite_pairs(tile_.queries(), tile_.lanes() * K / 2)
                                        : all_finite(tile_.queries(), tile_.lanes() * K);
        std::memset(dq_, 0, size_t(tile_.lanes() * K) * sizeof(T));
    }

    void block() {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size();
        int const count = tile_.count();
        T lse[kLaneCount] = {}, dot[kLaneCount] = {};
        tile_.pack(lse, lse_), tile_.pack(dot, dot_);
        tile_.pack(queries_, turned_, tile_.queries(), tile_.columns());
        if (tile_.pairs()) {
            tile_.pack(packed_grad_o_, grad_o_turned_, grad_o_rows_, V / 2);
        } else {
            tile_.pack(packed_grad_o_, grad_o_turned_, grad_o_, V);
        }
        tile_.scores(weights_, turned_);
        tile_.value_products(grads_, grad_o_turned_);
        bool const full = !tile_.partial(),
                   finite_keys = full || all_finite(tile_.keys(), keys * K);
        if (tile_.pairs() && (full || (finite_keys && finite_grads_ && finite_queries_))) {
            for (int v = 0; v < pair_depth(count) / W; ++v)
                softmax<true>(v, load(lse + v * W), load(dot + v * W));
            add_by_pairs();
        } else {
            for (int v = 0; v < tile_.vectors(); ++v)
                softmax<false>(v, load(lse + v * W), load(dot + v * W));
            if (tile_.pairs()) {
                tile_.read_packed(queries_, K, p_.q, p_.K);
                tile_.read_packed(packed_grad_o_, V, p_.grad_o, p_.V);
            }
            add_weighed<false>(full || finite_grads_, dv_ + tile_.key() * V, V, weights_,
                               kLaneCount, packed_grad_o_, V, keys, V / W, count);
            add_weighed<false>(full || finite_queries_, dk_ + tile_.key() * K, K, grads_,
                               kLaneCount, queries_, K, keys, K / W, count);
            std::memset(part_, 0, size_t(count * K) * sizeof(T));
            add_weighed<true, true>(finite_keys, part_, K, grads_, kLaneCount, tile_.keys(), K,
                                    count, K / W, keys);
        }
        T const scale = T(p_.scale) / tile_.score_scale();
        for (int n = 0; n < count; ++n) {
            T* const dq = dq_ + tile_.lane(n) * K;
            for (int64_t c = 0; c < K; c += W)
                store(dq + c, load(dq + c) + load(part_ + n * K + c) * scale);
        }
    }

    // Scores to weights and dP to dS, which takes the scale that scores of pairs still lack; rows of bf16 for products of pairs,
    // 0 where there is no query.
    template <bool kRows>
    void softmax(int v, Vector<T> lse, Vector<T> dot) {
        Vector<T> const none = {}, hidden = splat(T(-INFINITY));
        Vector<T> beyond = none;
        for (int i = 0; i < W; ++i) beyond[i] = v * W + i < tile_.count() ? T(0) : T(1);
        T const scale = tile_.score_scale();
        for (int64_t j = 0; j < tile_.size(); ++j) {
            int64_t const at = j * kLaneCount + v * W;
            Vector<T> s = load(weights_ + at);
            if constexpr (kRows) s = beyond == none ? s : hidden;
            Vector<T> const w = tile_.pairs() ? rough_exp(s, scale, lse) : exp(s - lse);
            Vector<T> const weight = s == hidden ? none : at_most_one(w);
            Vector<T> const grad = s == hidden ? none : weight * (load(grads_ + at) - dot) * scale;
            if constexpr (kRows && std::is_same_v<T, float>) {
                narrow(reinterpret_cast<Bf16*>(weight_rows_) + at, weight);
                narrow(reinterpret_cast<Bf16*>(grad_rows_) + at, grad);
            } else {
                store(weights_ + at, weight), store(grads_ + at, grad);
            }
        }
    }

    // As AttnBackward does, over the queries that are packed.
    void add_by_pairs() {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size(), at = tile_.key();
        int64_t const count = tile_.count(), depth = pair_depth(count);
        auto const over_queries = [&](T* to, T const* rows, T* pairs, T const* packed,
                                      int64_t columns) {
            pair_rows(pairs, columns, count, [&](int64_t n) {
                return reinterpret_cast<Bf16 const*>(packed) + n * columns;
            });
            multiply_by_pairs(to + at * columns, columns, rows, kRowBytes, pairs, columns, keys,
                              columns / W, depth, true);
        };
        over_queries(dv_, weight_rows_, grad_o_pairs_, packed_grad_o_, V);
        over_queries(dk_, grad_rows_, query_pairs_, queries_, K);
        int64_t const pairs = pair_depth(keys) / 2, lanes = tile_.vectors() * W;
        pair_rows(grad_pairs_, lanes, keys, [&](int64_t j) {
            return reinterpret_cast<Bf16 const*>(grad_rows_) + j * kLaneCount;
        });
        turn(grads_by_query_, pairs, grad_pairs_, lanes, pairs, lanes);
        multiply_by_pairs(part_, K, grads_by_query_, pairs * 4, key_pairs_, K, lanes, K / W,
                          pairs * 2, false);
    }

    static constexpr int64_t kRowBytes = kLaneCount * 2;  // of rows in bf16

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    TokensTile<T> tile_;
    T *dk_, *dv_, *d_sink_;
    T *grad_o_, *dq_;                                         // of the tile
    T *queries_, *turned_, *packed_grad_o_, *grad_o_turned_;  // of those packed
    T *weights_, *grads_, *part_;
    // For products of pairs.
    T* grad_o_rows_;                   // of the tile
    T *weight_rows_, *grad_rows_;      // weights and grads in bf16
    T *grad_pairs_, *grads_by_query_;  // [keys / 2][queries], [queries][keys / 2]
    T* key_pairs_;                     // [keys / 2][K]
    T *query_pairs_, *grad_o_pairs_;   // [queries / 2][K or V]
    bool finite_grads_, finite_queries_;
    T lse_[kTileLanes], dot_[kTileLanes];
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
