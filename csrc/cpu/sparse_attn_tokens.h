// The forward where every token has a list of its own and scores are plain: a block meets those queries alone that have it
// on their lists, packed side by side. What neighbours do not share costs nothing.
#pragma once

#include "sparse_attn_tile.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

template <class T>
class AttnTokensForward {
  public:
    static constexpr int W = kLanes<T>;

    static bool takes(SparseAttnParams const& p) {
        return p.lists.index != nullptr && p.lists.block_q == 1 && p.lists.bias == nullptr &&
               p.softcap == 0 && p.alibi_slopes == nullptr && p.ramp == nullptr &&
               p.mask.dilation == 1;
    }

    AttnTokensForward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch)
        : p_(p), task_(task), arena_(scratch), tile_(p, task) {
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
                pack();
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

    // The queries that have the block and see some of it, turned.
    void pack() {
        int64_t const K = tile_.K(), size = tile_.size();
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
        for (int n = 0; n < count_; ++n)
            std::memcpy(queries_ + n * K, tile_.queries() + lane_[n] * K, size_t(K) * sizeof(T));
        std::memset(queries_ + count_ * K, 0, size_t((vectors_ * W - count_) * K) * sizeof(T));
        turn(turned_, kLaneCount, queries_, K, vectors_ * W, K);
    }

    // Weights [keys][queries], and by how much what came before fades.
    void score() {
        int64_t const size = tile_.size();
        multiply<false>(scores_, kLaneCount, tile_.keys(), tile_.K(), turned_, kLaneCount, size,
                        vectors_, p_.K, false);
        for (int n = 0; n < count_ && partial_; ++n) {
            Seen const& seen = seen_[n];
            for (int64_t j = seen.sink_end; j < size; ++j)
                if (j < seen.begin || j >= seen.end) scores_[j * kLaneCount + n] = T(-INFINITY);
        }
        T most[kLaneCount] = {}, sum[kLaneCount] = {};
        for (int n = 0; n < count_; ++n) most[n] = most_[lane_[n]], sum[n] = sum_[lane_[n]];
        for (int v = 0; v < vectors_; ++v) {
            Vector<T> top = load(most + v * W), total = load(sum + v * W), highest;
            store(fade_ + v * W, soften(scores_ + v * W, size, top, total, highest));
            store(most + v * W, top), store(sum + v * W, total);
            heavy_[v] = weighs<T>(p_, highest, top, count_ - v * W);
        }
        for (int n = 0; n < count_; ++n) most_[lane_[n]] = most[n], sum_[lane_[n]] = sum[n];
    }

    void add_values() {
        int64_t const V = tile_.V();
        bool const finite = !partial_ || tile_.finite_values();
        std::memset(parts_, 0, size_t(count_ * V) * sizeof(T));
        for (int v = 0; v < vectors_;) {
            int const begin = v;
            while (v < vectors_ && heavy_[v]) ++v;
            int const first = begin * W, last = v * W < count_ ? v * W : count_;
            if (last > first)
                add_weighed<true, true>(finite, parts_ + first * V, V, scores_ + first, kLaneCount,
                                        tile_.values(), V, last - first, V / W, tile_.size());
            if (v == begin) ++v;
        }
        for (int n = 0; n < count_; ++n) {
            T* const o = output_ + lane_[n] * V;
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
    T *queries_, *turned_;  // of those packed: [queries][K], [K][queries]
    T *scores_, *parts_;    // [keys][queries], [queries][V]
    T* output_;             // of the tile: [queries][V]
    T most_[kLaneCount], sum_[kLaneCount];

    // Of the block: who is packed, what they see.
    int count_, vectors_;
    bool partial_;
    int lane_[kLaneCount];
    Seen seen_[kLaneCount];
    T fade_[kLaneCount];
    bool heavy_[kLaneCount / W];  // vectors of queries for which the values count
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
