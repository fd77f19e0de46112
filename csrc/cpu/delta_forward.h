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

// What the first slot of a block erases: r = S^T erase. dst may be src; rows are `stride` apart in both.
template <class Rule, int N, class T>
LSM_INLINE void read_erased(T* dst, T const* src, int64_t stride, int64_t K, SlotRows<T> const& x,
                            Vector<T> (&r)[N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) r[n] = Vector<T>{};
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> sum[N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
            T const erase = x.erase[i], decay = x.decay[i];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> s = load(src + i * stride + n * W);
                if constexpr (Rule::kDecays && Rule::kErasesDecayed) s *= decay;
                sum[n] += erase * s;
                store(dst + i * stride + n * W, s);
            }
        }
        add_panels<T>(r, sum);
    }
}

// A slot writes its values and reads its output; r is what the next one erases, if there is one.
// kDecays: by the decay row of the slot that decays here, this one or the next. dst may be src.
template <class Rule, int N, bool kOutputs, bool kGoesOn, bool kDecays, class T>
LSM_INLINE void advance(T* dst, T const* src, int64_t stride, int64_t K, SlotRows<T> const& x,
                        SlotRows<T> const& next, Vector<T> const (&values)[Rule::kWrites][N],
                        Vector<T> (&o)[N], Vector<T> (&r)[N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) o[n] = r[n] = Vector<T>{};
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> read[N] = {}, erased[N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
            SlotRow<T, Rule::kWrites> const own(x, i), after(next, i);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> s = load(src + i * stride + n * W);
                if constexpr (kDecays && !Rule::kErasesDecayed) s *= own.decay;
#pragma GCC unroll 2
                for (int w = 0; w < Rule::kWrites; ++w) s += own.write[w] * values[w][n];
                if constexpr (kOutputs) read[n] += own.q * s;
                if constexpr (kGoesOn) {
                    if constexpr (kDecays && Rule::kErasesDecayed) s *= after.decay;
                    erased[n] += after.erase * s;
                }
                store(dst + i * stride + n * W, s);
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
          columns_(task.v_end - task.v_begin),
          in_place_(task.state_end != nullptr && columns_ == p.V && fits_as_it_lies<T>(p.K, p.V)),
          arena_(scratch),
          tokens_(p, task, arena_,
                  fits_as_it_lies<T>(p.K, columns_) ? kDeltaBlockOfSmallState : kDeltaBlock, true),
          rows_o_(tokens_.value_rows(p.o, 1)) {
        o_ = arena_.take(tokens_.slots() * tokens_.value_width);
        arena_.take_each(tokens_.value_width, kept_, erased_);
        S_ = arena_.take(p.K * tokens_.value_width);
        if (in_place_) S_ = static_cast<T*>(task.state_end);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        read_state();
        tokens_.clear();
        for (int64_t b = 0; b < tokens_.blocks(); ++b) {
            int64_t const slots = tokens_.read(b, true);
            for_each_state_tile<T, kWidest>(p_.K, panels(columns_, W), [&](auto tile, int64_t p) {
                constexpr int N = decltype(tile)::value;
                T* const S = S_ + p * W * (in_place_ ? 1 : p_.K);
                outputs<N>(S, in_place_ ? p_.V : N * W, p * W, b, slots);
            });
            for (int64_t t = 0; t < slots / tokens_.n; ++t) {
                rows_o_.write(o_ + tokens_.last_slot(t) * tokens_.value_width,
                              b * tokens_.block_tokens + t);
            }
        }
        if (!in_place_) {
            write_state_tiles<kWidest>(at_column(static_cast<T*>(task_.state_end)), S_, p_.V, p_.K,
                                       columns_);
        }
    }

  private:
    static constexpr int W = kLanes<T>;
    // Of four panels, the stores of a channel and its sums over K compete.
    static constexpr int kWidest = 2;

    template <class State>
    State* at_column(State* state) const {
        return state == nullptr ? nullptr : state + task_.v_begin;
    }

    void read_state() {
        T const* const begin = static_cast<T const*>(task_.state_begin);
        if (!in_place_) {
            read_state_tiles<kWidest>(S_, at_column(begin), p_.V, p_.K, columns_);
        } else if (begin == nullptr) {
            std::memset(S_, 0, size_t(p_.K * p_.V) * sizeof(T));
        } else if (begin != S_) {
            std::memcpy(S_, begin, size_t(p_.K * p_.V) * sizeof(T));
        }
    }

    template <int N>
    void outputs(T* S, int64_t stride, int64_t column, int64_t block, int64_t slots) {
        Vector<T> o[N], r[N], values[Rule::kWrites][N];
        if (block == 0) {
            read_erased<Rule>(S, S, stride, p_.K, tokens_.rows(0), r);
        } else {
            load_panels(r, erased_ + column);
        }
        auto const take_slot = [&](auto goes_on, int64_t s) {
            constexpr bool kGoesOn = decltype(goes_on)::value;
            int64_t const at = s * tokens_.value_width + column;
            keep<Rule>(kept_, tokens_.v + at, r);
            values_of<Rule>(values, kept_, tokens_.v + at, tokens_.beta + at);
            auto const pass = [&](auto decays) {
                advance<Rule, N, true, kGoesOn, decltype(decays)::value>(
                    S, S, stride, p_.K, tokens_.rows(s), tokens_.rows(s + 1), values, o, r);
            };
            if constexpr (Rule::kDecays && (kGoesOn || !Rule::kErasesDecayed)) {
                if (tokens_.decays_state(Rule::kErasesDecayed ? s + 1 : s)) {
                    pass(std::true_type{});
                } else {
                    pass(std::false_type{});
                }
            } else {
                pass(std::false_type{});
            }
            store_panels(o_ + at, o);
        };
        bool const ends = block + 1 == tokens_.blocks();
        int64_t s = 0;
        for (; s + ends < slots; ++s) {
            if (column == 0) {
                tokens_.prefetch((block + 1) * tokens_.slots() + s);
                rows_o_.prefetch(block * tokens_.block_tokens + tokens_.token_of(s));
            }
            take_slot(std::true_type{}, s);
        }
        if (ends) {
            take_slot(std::false_type{}, s);
        } else {
            store_panels(erased_ + column, r);
        }
    }

    DeltaParams const& p_;
    DeltaTask const& task_;
    int64_t columns_;
    bool in_place_;  // the state is worked on where it lies in memory
    Arena<T> arena_;
    DeltaTokens<T, Rule> tokens_;
    typename DeltaTokens<T, Rule>::Row rows_o_;
    T *S_, *o_, *kept_, *erased_;  // erased_: what the next block erases first
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
