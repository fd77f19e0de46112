// Where every token has a list of its own and scores are plain, a block meets those queries alone that have it on their
// lists, packed side by side. What neighbours do not share costs nothing.
#pragma once

#include "sparse_attn_tile.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

template <class T>
class PackedQueries {
  public:
    static constexpr int W = kLanes<T>;

    static bool takes(SparseAttnParams const& p) {
        return p.lists.index != nullptr && p.lists.block_q == 1 && p.lists.bias == nullptr &&
               p.softcap == 0 && p.alibi_slopes == nullptr && p.ramp == nullptr &&
               p.mask.dilation == 1;
    }

    explicit PackedQueries(AttnTile<T> const& tile) : tile_(tile) {}

    // Those that have the block and see some of it.
    void choose() {
        int64_t const size = tile_.size();
        count_ = 0, partial_ = false;
        tile_.over_entries([&](int64_t, int begin, int end) {
            for (int i = begin; i < end; ++i) {
                Seen const seen = tile_.seen(i);
                if (seen.sink_end == 0 && seen.begin == seen.end) continue;
                partial_ |= seen.sink_end < size && (seen.begin > 0 || seen.end < size);
                seen_[count_] = seen, lane_[count_++] = i;
            }
        });
        vectors_ = (count_ + W - 1) / W;
    }

    // Their rows of the tile's `from`, and these turned, in whole vectors.
    void take(T* rows, T* turned, T const* from, int64_t columns) const {
        for (int n = 0; n < count_; ++n)
            std::memcpy(rows + n * columns, from + lane_[n] * columns, size_t(columns) * sizeof(T));
        std::memset(rows + count_ * columns, 0,
                    size_t((vectors_ * W - count_) * columns) * sizeof(T));
        turn(turned, kLaneCount, rows, columns, vectors_ * W, columns);
    }
    void take(T* numbers, T const* from) const {
        for (int n = 0; n < vectors_ * W; ++n) numbers[n] = n < count_ ? from[lane_[n]] : T(0);
    }

    // Scores [keys][queries], -inf where a query does not see a key.
    void scores(T* S, T const* turned, SparseAttnParams const& p) const {
        int64_t const size = tile_.size();
        multiply<false>(S, kLaneCount, tile_.keys(), tile_.K(), turned, kLaneCount, size, vectors_,
                        p.K, false);
        for (int n = 0; n < count_ && partial_; ++n) {
            Seen const& seen = seen_[n];
            for (int64_t j = seen.sink_end; j < size; ++j)
                if (j < seen.begin || j >= seen.end) S[j * kLaneCount + n] = T(-INFINITY);
        }
    }

    int count() const { return count_; }
    int vectors() const { return vectors_; }
    int lane(int n) const { return lane_[n]; }  // of the tile
    // Whether some of them does not see some key.
    bool partial() const { return partial_; }

  private:
    AttnTile<T> const& tile_;
    int count_, vectors_;
    bool partial_;
    int lane_[kLaneCount];
    Seen seen_[kLaneCount];
};

template <class T>
class AttnTokensForward {
  public:
    static constexpr int W = kLanes<T>;

    AttnTokensForward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch)
        : p_(p), task_(task), arena_(scratch), tile_(p, task), packed_(tile_) {
        tile_.take(arena_);
        arena_.take_each(kLaneCount * tile_.K(), queries_, turned_);
        arena_.take_each(kLaneCount * tile_.V(), parts_, output_);
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
                packed_.choose();
                packed_.take(queries_, turned_, tile_.queries(), tile_.K());
                score();
                add_values();
            }
            finish();
        }
    }

  private:
    void start_softmax() {
        tile_.start_softmax(tile_.lanes(), most_, sum_);
        std::memset(output_, 0, size_t(tile_.lanes() * tile_.V()) * sizeof(T));
    }

    // Weights [keys][queries], and by how much what came before fades.
    void score() {
        packed_.scores(scores_, turned_, p_);
        int const count = packed_.count();
        T most[kLaneCount], sum[kLaneCount];
        packed_.take(most, most_), packed_.take(sum, sum_);
        for (int v = 0; v < packed_.vectors(); ++v) {
            Vector<T> top = load(most + v * W), total = load(sum + v * W), highest;
            store(fade_ + v * W, soften(scores_ + v * W, tile_.size(), top, total, highest));
            store(most + v * W, top), store(sum + v * W, total);
            heavy_[v] = weighs<T>(p_, highest, top, count - v * W);
        }
        for (int n = 0; n < count; ++n)
            most_[packed_.lane(n)] = most[n], sum_[packed_.lane(n)] = sum[n];
    }

    void add_values() {
        int64_t const V = tile_.V();
        int const count = packed_.count(), vectors = packed_.vectors();
        bool const finite = !packed_.partial() || tile_.finite_values();
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
            T* const o = output_ + packed_.lane(n) * V;
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
            tile_.access().write(tile_.row(p_.o, i), o, p_.V);
            static_cast<T*>(p_.lse)[tile_.scalar(i)] =
                sum_[i] == 0 ? T(-INFINITY) : most_[i] + std::log(sum_[i]);
        }
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    AttnTile<T> tile_;
    PackedQueries<T> packed_;
    T *queries_, *turned_;  // of those packed: [queries][K], [K][queries]
    T *scores_, *parts_;    // [keys][queries], [queries][V]
    T* output_;             // of the tile: [queries][V]
    T most_[kLaneCount], sum_[kLaneCount];

    // Of the block and the queries that are packed.
    T fade_[kLaneCount];
    bool heavy_[kLaneCount / W];  // vectors for which the values count
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
