// Forward over the tokens of one value head (the recurrence: params/delta.h, delta_tokens.h).
// Single-threaded: the scheduler deals out heads and value columns.
#pragma once

#include "delta_tokens.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

template <class T, int N>
LSM_INLINE void load_panels(Vector<T> (&x)[N], T const* p) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = load(p + n * kLanes<T>);
}

template <class T, int N>
LSM_INLINE void store_panels(T* p, Vector<T> const (&x)[N]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(p + n * kLanes<T>, x[n]);
}

inline constexpr int kSumRows = 32;  // of K, added up before they join the others: rounds less

template <class T, int N>
LSM_INLINE void add_panels(Vector<T> (&x)[N], Vector<T> const (&y)[N]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] += y[n];
}

// What the first slot of a block erases: r = S^T erase. dst may be src.
template <class Rule, int N, class T>
LSM_INLINE void read_erased(T* dst, T const* src, int64_t K, SlotRows<T> const& x,
                            Vector<T> (&r)[N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) r[n] = Vector<T>{};
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> sum[N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> s = load(src + (i * N + n) * W);
                if constexpr (Rule::kDecays && Rule::kErasesDecayed) s *= x.decay[i];
                sum[n] += x.erase[i] * s;
                store(dst + (i * N + n) * W, s);
            }
        }
        add_panels<T>(r, sum);
    }
}

// A slot writes its values and reads its output; r is what the next one erases. dst may be src.
template <class Rule, int N, bool kOutputs, class T>
LSM_INLINE void advance(T* dst, T const* src, int64_t K, SlotRows<T> const& x,
                        SlotRows<T> const& next, Vector<T> const (&values)[Rule::kWrites][N],
                        Vector<T> (&o)[N], Vector<T> (&r)[N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) o[n] = r[n] = Vector<T>{};
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> read[N] = {}, erased[N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> s = load(src + (i * N + n) * W);
                if constexpr (Rule::kDecays && !Rule::kErasesDecayed) s *= x.decay[i];
#pragma GCC unroll 2
                for (int w = 0; w < Rule::kWrites; ++w) s += x.write[w][i] * values[w][n];
                if constexpr (kOutputs) read[n] += x.q[i] * s;
                if constexpr (Rule::kDecays && Rule::kErasesDecayed) s *= next.decay[i];
                erased[n] += next.erase[i] * s;
                store(dst + (i * N + n) * W, s);
            }
        }
        add_panels<T>(o, read);
        add_panels<T>(r, erased);
    }
}

// What a slot writes, from what it erases. kept: v - r, or r where there is no beta.
template <class Rule, int N, class T>
LSM_INLINE void values_of(Vector<T> (&values)[Rule::kWrites][N], T const* kept, T const* v,
                          T const* beta) {
    load_panels(values[0], kept);
    if constexpr (Rule::kHasBeta) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) values[0][n] *= load(beta + n * kLanes<T>);
    } else {
        load_panels(values[1], v);
    }
}

template <class Rule, int N, class T>
LSM_INLINE void keep(T* kept, T const* v, Vector<T> const (&r)[N]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        constexpr int W = kLanes<T>;
        store(kept + n * W, Rule::kHasBeta ? load(v + n * W) - r[n] : r[n]);
    }
}

template <class T, class Rule>
class DeltaForward {
  public:
    DeltaForward(DeltaParams const& p, DeltaTask const& task, void* scratch)
        : p_(p),
          task_(task),
          arena_(scratch),
          tokens_(p, task, arena_),
          rows_o_(tokens_.value_rows(p.o, 1)) {
        o_ = arena_.take(tokens_.slots() * tokens_.value_width);
        kept_ = arena_.take(tokens_.value_width);
        S_ = arena_.take(p.K * tokens_.value_width);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        int64_t const columns = task_.v_end - task_.v_begin;
        tokens_.clear();
        read_state_tiles(S_, at_column(static_cast<T const*>(task_.state_begin)), p_.V, p_.K,
                         columns);
        for (int64_t b = 0; b < tokens_.blocks(); ++b) {
            int64_t const slots = tokens_.read(b, 1);
            for_each_state_tile<T>(p_.K, panels(columns, W), [&](auto tile, int64_t p) {
                outputs<decltype(tile)::value>(S_ + p * p_.K * W, p * W, slots);
            });
            for (int64_t t = 0; t < slots / tokens_.n; ++t) {
                rows_o_.write(o_ + tokens_.last_slot(t) * tokens_.value_width,
                              b * tokens_.block_tokens + t);
            }
        }
        write_state_tiles(at_column(static_cast<T*>(task_.state_end)), S_, p_.V, p_.K, columns);
    }

  private:
    static constexpr int W = kLanes<T>;

    template <class State>
    State* at_column(State* state) const {
        return state == nullptr ? nullptr : state + task_.v_begin;
    }

    template <int N>
    void outputs(T* S, int64_t column, int64_t slots) {
        Vector<T> o[N], r[N], values[Rule::kWrites][N];
        read_erased<Rule>(S, S, p_.K, tokens_.rows(0), r);
        for (int64_t s = 0; s < slots; ++s) {
            int64_t const at = s * tokens_.value_width + column;
            keep<Rule>(kept_, tokens_.v + at, r);
            values_of<Rule>(values, kept_, tokens_.v + at, tokens_.beta + at);
            advance<Rule, N, true>(S, S, p_.K, tokens_.rows(s), tokens_.rows(s + 1), values, o, r);
            store_panels(o_ + at, o);
        }
    }

    DeltaParams const& p_;
    DeltaTask const& task_;
    Arena<T> arena_;
    DeltaTokens<T, Rule> tokens_;
    typename DeltaTokens<T, Rule>::Row rows_o_;
    T *S_, *o_, *kept_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
