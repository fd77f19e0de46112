// Inside one block of tokens: the products of decays that join its tokens to each other and to the
// state before and after it. Every decay factor is a product of the block's own exp(g), never a
// quotient, so resets (a = 0) and strong gates are exact. With A(j, t) = a_{j+1} ... a_t:
//   queries to the block's start  q_t A(-1, t)      keys to its end  k_j A(j, last)
//   scores  P[t][j] = Σ_c q_t k_j A(j, t),  j <= t
#pragma once

#include "tiles.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kPairs = kBlock * (kBlock + 1) / 2;

// Bump allocation inside a thread's scratch; with a null base it only counts.
template <class T>
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
    T* take(int64_t count) {
        char* p = base_ == nullptr ? nullptr : base_ + used_;
        used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(p);
    }
    template <class... Pointers>
    void take_each(int64_t count, Pointers&... pointers) {
        ((pointers = take(count)), ...);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// k_j A(j, last) into keys, A(-1, last) into total, for one panel.
template <class T>
LSM_INLINE void keys_to_end(T* keys, T* total, T const* k, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> suffix = Vector<T>{} + T(1);
#pragma GCC unroll 8
    for (int j = kBlock - 1; j >= 0; --j) {
        store(keys + j * W, load(k + j * W) * suffix);
        suffix *= load(a + j * W);
    }
    store(total, suffix);
}

// q_t A(-1, t) into queries, A(-1, last) into total, for one panel.
template <class T>
LSM_INLINE void queries_to_start(T* queries, T* total, T const* q, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> prefix = Vector<T>{} + T(1);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
        prefix *= load(a + t * W);
        store(queries + t * W, load(q + t * W) * prefix);
    }
    store(total, prefix);
}

// Adds one panel's share of the scores, lanes not yet summed, pairs (t, j) in the order of t, then
// j.
template <class T>
LSM_INLINE void add_scores(T* pairs, T const* q, T const* k, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> key[kBlock];
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
        Vector<T> const q_t = load(q + t * W), a_t = load(a + t * W);
        key[t] = load(k + t * W);
#pragma GCC unroll 8
        for (int j = 0; j <= t; ++j) {
            if (j < t) key[j] *= a_t;
            T* const pair = pairs + (t * (t + 1) / 2 + j) * W;
            store(pair, load(pair) + q_t * key[j]);
        }
    }
}

template <class T>
LSM_INLINE void scores(T* P, T* pairs, T const* q, T const* k, T const* a, int64_t key_panels) {
    constexpr int W = kLanes<T>;
    for (int i = 0; i < kPairs; ++i) store(pairs + i * W, Vector<T>{});
    for (int64_t p = 0; p < key_panels; ++p) {
        int64_t const at = p * kBlock * W;
        add_scores(pairs, q + at, k + at, a + at);
    }
    for (int t = 0; t < kBlock; ++t) {
        for (int j = 0; j <= t; ++j) {
            P[t * kBlock + j] = sum_lanes<T>(load(pairs + (t * (t + 1) / 2 + j) * W));
        }
    }
}

// D[t][j] = x_t · y_j, j <= t.
template <class T>
LSM_INLINE void causal_dots(T* D, T const* x, T const* y, int64_t column_panels) {
    constexpr int W = kLanes<T>;
    for (int t = 0; t < kBlock; ++t) {
        for (int j = 0; j <= t; ++j) {
            Vector<T> sum{};
            for (int64_t p = 0; p < column_panels; ++p) {
                sum += load(x + (p * kBlock + t) * W) * load(y + (p * kBlock + j) * W);
            }
            D[t * kBlock + j] = sum_lanes<T>(sum);
        }
    }
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
