// Rows of q and k, and of their gradients, where a state is made of features of them
// (policy/features.h): a block's features are made in scratch and never leave it. Tokens lie in
// lanes while channels are multiplied.
#pragma once

#include "chunk_block.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Rows as they are.
template <class T, int C>
struct PlainRows {
    PlainRows(ChunkParams const&, Arena<T>&) {}

    void read(HeadRows<T, C> const& rows, T* channels, T*, int64_t block, T scale = 1) const {
        rows.read(channels, block, scale);
    }
    void write(HeadRows<T, C> const& rows, T const* gradient, T const*, int64_t block,
               T scale = 1) const {
        rows.write(gradient, block, scale);
    }
};

template <class T, int C>
class FeatureRows {
  public:
    FeatureRows(ChunkParams const& p, Arena<T>& arena)
        : features_(p.features), channels_(p.channels), panels_(panels(p.K, W)) {
        if (features_ == Features::none) return;
        int64_t const width = (panels(channels_, W) + 1) * W;  // with room for a constant
        arena.take_each(width * W, x_, dx_);
        flat_ = arena.take(panels_ * W * W);
        d_raw_ = arena.take(panels(channels_, W) * C * W);
    }

    // A block of rows, times scale, and their features.
    void read(HeadRows<T, C> const& rows, T* features, T* raw, int64_t block, T scale = 1) const {
        rows.read(raw, block, scale);
        if (features_ == Features::none) return;
        for (int first = 0; first < C; first += W) {
            read_factors(raw, first);
            multiply();
            for (int64_t p = 0; p < panels_; ++p) {
                Vector<T> tile[W];
                for (int l = 0; l < W; ++l) tile[l] = load(flat_ + (p * W + l) * W);
                transpose<T>(tile);
                for (int l = 0; l < W; ++l) store(features + (p * C + first + l) * W, tile[l]);
            }
        }
    }

    // Gradients of rows, times scale, from those of their features.
    void write(HeadRows<T, C> const& rows, T const* gradient, T const* raw, int64_t block,
               T scale = 1) const {
        if (features_ == Features::none) return rows.write(gradient, block, scale);
        for (int first = 0; first < C; first += W) {
            read_factors(raw, first);
            for (int64_t p = 0; p < panels_; ++p) {
                Vector<T> tile[W];
                for (int l = 0; l < W; ++l) tile[l] = load(gradient + (p * C + first + l) * W);
                transpose<T>(tile);
                for (int l = 0; l < W; ++l) store(flat_ + (p * W + l) * W, tile[l]);
            }
            differentiate();
            for (int64_t p = 0; p < panels(channels_, W); ++p) {
                Vector<T> tile[W];
                for (int l = 0; l < W; ++l) tile[l] = load(dx_ + (shift() + p * W + l) * W);
                transpose<T>(tile);
                for (int l = 0; l < W; ++l) store(d_raw_ + (p * C + first + l) * W, tile[l]);
            }
        }
        rows.write(d_raw_, block, scale);
    }

  private:
    static constexpr int W = kLanes<T>;

    int64_t shift() const { return factors_of(features_, 0); }  // 1 where a constant is in front

    // What is multiplied, of W tokens.
    void read_factors(T const* raw, int first) const {
        if (shift() == 1) store(x_, splat(T(1)));
        for (int64_t p = 0; p < panels(channels_, W); ++p) {
            Vector<T> tile[W];
            for (int l = 0; l < W; ++l) tile[l] = load(raw + (p * C + first + l) * W);
            transpose<T>(tile);
            for (int l = 0; l < W; ++l) store(x_ + (shift() + p * W + l) * W, tile[l]);
        }
    }

    // Of factor i with itself.
    T own_weight(int64_t i) const { return i < shift() ? 1 : T(diagonal_weight(features_)); }

    void multiply() const {
        int64_t const n = factors_of(features_, channels_);
        T const weight = T(pair_weight(features_));
        T* out = flat_;
        for (int64_t i = 0; i < n; ++i) {
            Vector<T> const x = load(x_ + i * W);
            store(out, own_weight(i) * x * x);
            out += W;
            for (int64_t j = i + 1; j < n; ++j, out += W) store(out, weight * x * load(x_ + j * W));
        }
        for (; out < flat_ + panels_ * W * W; out += W) store(out, Vector<T>{});
    }

    void differentiate() const {
        int64_t const n = factors_of(features_, channels_), width = panels(channels_, W) + 1;
        T const weight = T(pair_weight(features_));
        std::memset(dx_, 0, size_t(width * W * W) * sizeof(T));
        T const* d = flat_;
        for (int64_t i = 0; i < n; ++i) {
            Vector<T> const x = weight * load(x_ + i * W);
            Vector<T> sum = (2 * own_weight(i)) * load(d) * load(x_ + i * W), others{};
            d += W;
            for (int64_t j = i + 1; j < n; ++j, d += W) {
                others += load(d) * load(x_ + j * W);
                store(dx_ + j * W, load(dx_ + j * W) + load(d) * x);
            }
            store(dx_ + i * W, load(dx_ + i * W) + sum + weight * others);
        }
    }

    Features features_;
    int64_t channels_, panels_;       // of q and k; of features
    T *x_ = nullptr, *dx_ = nullptr;  // [factors][W]: tokens in lanes
    T* flat_ = nullptr;               // [features][W]
    T* d_raw_ = nullptr;              // block panels
};

// Dots of a block's readers and writers, and what features make of them.
template <int C, class T>
LSM_INLINE void pair_dots(BlockSide<T> const& s) {
    causal_dots<C>(s.pairs, s.raw_reader, s.raw_writer, s.raw_panels);
    if (s.features == Features::none) return;
    bool const taylor = s.features == Features::taylor;
    for (int i = 0; i < C * C; i += kLanes<T>) {
        Vector<T> const x = load(s.pairs + i);
        store(s.pairs + i, taylor ? T(0.5) * x * x + x + T(1) : x * x);
    }
}

// Of one token, for a step: x has zeros where channels end, up to whole vectors, and a constant in
// front if features need one. Writes up to a vector more than there are features.
template <class T>
void make_features(T* out, T const* x, Features features, int64_t channels) {
    constexpr int W = kLanes<T>;
    int64_t const n = factors_of(features, channels), all = features_of(features, channels);
    T* const end = out + all;
    for (int64_t i = 0; i < n; ++i) {
        T const scaled = T(pair_weight(features)) * x[i];
        for (int64_t j = i; j < n; j += W) store(out + j - i, scaled * load(x + j));
        bool const constant = features == Features::taylor && i == 0;
        out[0] = (constant ? T(1) : T(diagonal_weight(features))) * x[i] * x[i];
        out += n - i;
    }
    for (; out < end; ++out) *out = 0;
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
