// Where every token has a list of its own and scores are plain, a tile has more queries than a product takes at a time: a
// block meets those alone that have it on their lists, packed side by side. What neighbours do not share costs nothing, and
// keys are read once for all of them.
#pragma once

#include "sparse_attn_room.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kTileLanes = int(kTokenLanes), kTileTokens = int(kTokensOfTile);

template <class T>
class TokensTile : public TileRoom<T> {
    using Room = TileRoom<T>;
    using Room::p_, Room::task_, Room::block_k_, Room::keys_, Room::tokens_;

  public:
    using Room::W, Room::Room;

    void take(Arena<T>& arena) { Room::take(arena, kTileLanes); }

    void start(int64_t token) {
        this->place(token);
        this->read_queries(T(p_.scale));
        for (int t = 0; t < tokens_; ++t) {
            seen_[t] =
                keys_seen(p_.mask, token + t + this->shift(), task_.head, task_.keys, INFINITY);
            auto const list = this->list_of(token + t);
            entry_[t] = list.begin, last_[t] = list.end;
            next_[t] = listed(t);
        }
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

    void read_keys() { Room::read_keys(first_, size_); }

    // f() for as many of the queries that have the block as fit side by side, until all were there.
    template <class F>
    void over_packs(F const& f) {
        int const heads = int(task_.heads), most = kLaneCount / heads;
        for (begin_ = 0; begin_ < members_; begin_ = end_) {
            end_ = min_of(begin_ + most, members_);
            count_ = (end_ - begin_) * heads;
            partial_ = false;
            for (int n = begin_; n < end_; ++n) partial_ = partial_ || hides(here_[n]);
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
    void pack(T* numbers, T const* from) const {
        for (int n = 0; n < vectors() * W; ++n) numbers[n] = n < count_ ? from[lane(n)] : T(0);
    }

    // Scores [keys][queries], -inf where a query does not see a key.
    void scores(T* S, T const* turned) const {
        multiply<false>(S, kLaneCount, keys_, this->K(), turned, kLaneCount, size_, vectors(), p_.K,
                        false);
        for (int n = begin_; n < end_ && partial_; ++n) {
            Seen const& seen = here_[n];
            if (!hides(seen)) continue;
            T* const s = S + (n - begin_) * task_.heads;
            for (int64_t j = seen.sink_end; j < size_; ++j)
                for (int64_t h = 0; h < task_.heads && (j < seen.begin || j >= seen.end); ++h)
                    s[j * kLaneCount + h] = T(-INFINITY);
        }
    }

    int64_t key() const { return first_; }  // of the sequence
    int64_t size() const { return size_; }
    int count() const { return count_; }  // of those packed
    int vectors() const { return (count_ + W - 1) / W; }
    int lane(int n) const {
        return int(member_[begin_ + n / task_.heads] * task_.heads + n % task_.heads);
    }
    bool partial() const { return partial_; }  // some of them does not see some key

  private:
    bool hides(Seen const& seen) const {
        return seen.sink_end < size_ && (seen.begin > 0 || seen.end < size_);
    }
    int32_t listed(int t) const {
        int32_t const block = entry_[t] < last_[t] ? p_.lists.index[entry_[t]] : -1;
        return block < 0 ? INT32_MAX : block;
    }

    // Of the tile.
    Seen seen_[kTileTokens];
    int64_t entry_[kTileTokens], last_[kTileTokens];
    int32_t next_[kTileTokens];  // block of each token's list

    // Of the block: tokens that have it and see some of it.
    int64_t first_, size_;
    int members_, member_[kTileTokens];
    Seen here_[kTileTokens];
    // Of those the ones that are packed.
    int begin_, end_, count_;
    bool partial_;
};

template <class T>
class AttnTokensForward {
  public:
    static constexpr int W = kLanes<T>;

    AttnTokensForward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch)
        : p_(p), task_(task), arena_(scratch), tile_(p, task) {
        tile_.take(arena_);
        arena_.take_each(kLaneCount * tile_.K(), queries_, turned_);
        parts_ = arena_.take(kLaneCount * tile_.V());
        output_ = arena_.take(kTileLanes * tile_.V());
        scores_ = arena_.take(p.lists.block_k * kLaneCount);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            start_softmax();
            while (tile_.next()) {
                tile_.read_keys();
                tile_.over_packs([&] {
                    tile_.pack(queries_, turned_, tile_.queries(), tile_.K());
                    score();
                    add_values();
                });
            }
            finish();
        }
    }

  private:
    void start_softmax() {
        for (int i = 0; i < tile_.lanes(); ++i) start_row(p_, tile_.head(i), most_[i], sum_[i]);
        std::memset(output_, 0, size_t(tile_.lanes() * tile_.V()) * sizeof(T));
    }

    // Weights [keys][queries], and by how much what came before fades.
    void score() {
        tile_.scores(scores_, turned_);
        int const count = tile_.count();
        T most[kLaneCount], sum[kLaneCount];
        tile_.pack(most, most_), tile_.pack(sum, sum_);
        for (int v = 0; v < tile_.vectors(); ++v) {
            Vector<T> top = load(most + v * W), total = load(sum + v * W), highest;
            store(fade_ + v * W, soften(scores_ + v * W, tile_.size(), T(1), T(softmax_slack(p_)),
                                        top, total, highest));
            store(most + v * W, top), store(sum + v * W, total);
            heavy_[v] = weighs<T>(p_, highest - top, count - v * W);
        }
        for (int n = 0; n < count; ++n)
            most_[tile_.lane(n)] = most[n], sum_[tile_.lane(n)] = sum[n];
    }

    void add_values() {
        int64_t const V = tile_.V();
        int const count = tile_.count(), vectors = tile_.vectors();
        bool const finite = !tile_.partial() || all_finite(tile_.values(), tile_.size() * V);
        std::memset(parts_, 0, size_t(count * V) * sizeof(T));
        for (int v = 0; v < vectors;) {
            int const begin = v;
            while (v < vectors && heavy_[v]) ++v;
            int const first = begin * W, last = v * W < count ? v * W : count;
            if (last > first)
                add_weighed<true, true>(finite, parts_ + first * V, V, scores_ + first, kLaneCount,
                                        tile_.values(), V, last - first, V / W, tile_.size());
            if (v == begin) ++v;
        }
        for (int n = 0; n < count; ++n) {
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
        }
        tile_.write_outputs(output_, most_, sum_);
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    TokensTile<T> tile_;
    T *queries_, *turned_;  // of those packed: [queries][K], [K][queries]
    T *scores_, *parts_;    // [keys][queries], [queries][V]
    T* output_;             // of the tile: [queries][V]
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
          tile_(p, task),
          dk_(static_cast<T*>(sums.dk)),
          dv_(static_cast<T*>(sums.dv)),
          d_sink_(static_cast<T*>(sums.sink_logits)) {
        tile_.take(arena_);
        arena_.take_each(p.lists.block_k * kLaneCount, weights_, grads_);
        arena_.take_each(kTileLanes * tile_.V(), grad_o_);
        arena_.take_each(kTileLanes * tile_.K(), dq_);
        arena_.take_each(kLaneCount * tile_.K(), queries_, turned_, part_);
        arena_.take_each(kLaneCount * tile_.V(), packed_grad_o_, grad_o_turned_);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            read_gradients();
            while (tile_.next()) {
                tile_.read_keys();
                tile_.over_packs([&] { block(); });
            }
            tile_.write_gradients(dq_);
        }
    }

  private:
    void read_gradients() {
        tile_.read_gradients(grad_o_, lse_, dot_, d_sink_, packed_grad_o_);
        finite_grads_ = all_finite(grad_o_, tile_.lanes() * tile_.V());
        finite_queries_ = all_finite(tile_.queries(), tile_.lanes() * tile_.K());
        std::memset(dq_, 0, size_t(tile_.lanes() * tile_.K()) * sizeof(T));
    }

    void block() {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size();
        int const count = tile_.count();
        bool const full = !tile_.partial();
        T lse[kLaneCount], dot[kLaneCount];
        tile_.pack(lse, lse_), tile_.pack(dot, dot_);
        tile_.pack(queries_, turned_, tile_.queries(), K);
        tile_.pack(packed_grad_o_, grad_o_turned_, grad_o_, V);
        tile_.scores(weights_, turned_);
        multiply<false>(grads_, kLaneCount, tile_.values(), V, grad_o_turned_, kLaneCount, keys,
                        tile_.vectors(), p_.V, false);
        for (int v = 0; v < tile_.vectors(); ++v) softmax(v, load(lse + v * W), load(dot + v * W));
        add_weighed<false>(full || finite_grads_, dv_ + tile_.key() * V, V, weights_, kLaneCount,
                           packed_grad_o_, V, keys, V / W, count);
        add_weighed<false>(full || finite_queries_, dk_ + tile_.key() * K, K, grads_, kLaneCount,
                           queries_, K, keys, K / W, count);
        std::memset(part_, 0, size_t(count * K) * sizeof(T));
        add_weighed<true, true>(full || all_finite(tile_.keys(), keys * K), part_, K, grads_,
                                kLaneCount, tile_.keys(), K, count, K / W, keys);
        for (int n = 0; n < count; ++n) {
            T* const dq = dq_ + tile_.lane(n) * K;
            for (int64_t c = 0; c < K; c += W)
                store(dq + c, load(dq + c) + load(part_ + n * K + c) * T(p_.scale));
        }
    }

    // Scores to weights and dP to dS.
    void softmax(int v, Vector<T> lse, Vector<T> dot) {
        Vector<T> const none = {}, hidden = splat(T(-INFINITY));
        for (int64_t j = 0; j < tile_.size(); ++j) {
            int64_t const at = j * kLaneCount + v * W;
            Vector<T> const s = load(weights_ + at);
            Vector<T> const weight = s == hidden ? none : at_most_one(exp(s - lse));
            store(weights_ + at, weight);
            store(grads_ + at, s == hidden ? none : weight * (load(grads_ + at) - dot));
        }
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    TokensTile<T> tile_;
    T *dk_, *dv_, *d_sink_;
    T *grad_o_, *dq_;                                         // of the tile
    T *queries_, *turned_, *packed_grad_o_, *grad_o_turned_;  // of those packed
    T *weights_, *grads_, *part_;
    bool finite_grads_, finite_queries_;
    T lse_[kTileLanes], dot_[kTileLanes];
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
