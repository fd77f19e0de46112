// The delta engine takes the recurrence as it is written, a token at a time: every value column is a
// recurrence of its own, so columns are lanes, and a tile of them stays in the first-level cache.
// One pass over a tile writes a slot's values, reads its output, and reads what the next slot will
// erase. Nothing is rearranged: repeated keys, keys of any norm, resets and reflections are as exact
// as their arithmetic.
//
// Slots are micro-steps: n of them make a token. The first decays, the last has an output.
//
// The forward decays the state itself only now and then: it keeps S / f, with f [K] the decays since then, and takes f
// to the rows of q, erase and write instead, K numbers where the state has K V.
#pragma once

#include "arena.h"
#include "delta_kernels.h"
#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// What a slot does to the state. Rows are per key channel, values per column:
//   S <- decay S,  r = S^T erase   (or r from the undecayed state),  S <- S + Σ write value^T
template <Transition kTransition, bool kWithDecay>
struct DeltaRule {
    static constexpr bool kDecays = kWithDecay;
    static constexpr bool kErasesDecayed = kTransition == Transition::householder;
    static constexpr bool kOwnErase = kTransition != Transition::householder;  // else it is k
    static constexpr bool kHasBeta = kTransition != Transition::dplr;
    // beta (v - r) along k; or r along b and v along k.
    static constexpr int kWrites = kTransition == Transition::dplr ? 2 : 1;
};

// Rows of K channels of one slot, or their gradients.
template <class T>
struct SlotRows {
    T *q, *erase, *decay;
    T* write[2];
};

// One channel of them, read before the columns: a compiler that cannot tell rows from states would read it again after
// every store.
template <class T, int kWrites>
struct SlotRow {
    LSM_INLINE SlotRow(SlotRows<T> const& x, int64_t i)
        : q(x.q[i]), erase(x.erase[i]), decay(x.decay[i]) {
#pragma GCC unroll 2
        for (int w = 0; w < kWrites; ++w) write[w] = x.write[w][i];
    }
    T q, erase, decay, write[kWrites];
};

// Slots read at a time; with more per token, one token. With a state that fits in the first-level cache fewer, so that
// their rows stay beside it.
inline constexpr int kDeltaBlock = 16, kDeltaBlockOfSmallState = 8;

// A block of tokens of one value head: rows of the accumulation type, zero beyond K and V.
template <class T, class Rule>
class DeltaTokens {
  public:
    using Row = HeadRows<T, 1>;
    static constexpr int W = kLanes<T>;

    // `divided`: rows are those of S / f.
    DeltaTokens(DeltaParams const& p, DeltaTask const& task, Arena<T>& arena,
                int64_t block_slots = kDeltaBlock, bool divided = false)
        : n(p.n),
          block_tokens(block_length(block_slots, task.end - task.begin)),
          key_width(panels(p.K, W) * W),
          value_width(panels(task.v_end - task.v_begin, W) * W),
          divided_(divided && Rule::kDecays),
          scale_(T(p.scale)),
          per_channel_beta_(p.beta_per_channel),
          per_channel_decay_(p.decay == Decay::key),
          p_(p),
          task_(task),
          q_(key_rows(p.q, 1)),
          k_(key_rows(p.k, n)),
          erase_(key_rows(p.erase, n)),
          write_(key_rows(p.write, n)),
          g_(p.g, p.gate_dtype, task.batch, task.head, tokens(1), per_channel_decay_ ? p.K : 1),
          v_(value_rows(p.v, n)),
          beta_(beta_rows(p.beta)) {
        arena.take_each((slots() + 1) * key_width, q, k, erase, write, decay);  // one to end with
        arena.take_each(slots() * value_width, v, beta);
        arena.take_each(key_width, factor_, kept_factor_);
        decays_state_ = arena.take(slots() + 1);
    }

    // Rows no token fills: those of slots that do not decay or have no output.
    void clear() {
        fill(q, (slots() + 1) * key_width, T(0));
        if (Rule::kDecays) fill(decay, (slots() + 1) * key_width, T(1));
        fill(factor_, key_width, T(1));
    }

    int64_t slots() const { return block_tokens * n; }
    int64_t blocks() const { return ceil_div(task_.end - task_.begin, block_tokens); }
    Span tokens(int64_t slots_per_token) const {
        return {task_.begin * slots_per_token, task_.end * slots_per_token};
    }

    // Returns a block's slots. After them comes a row that changes nothing or, to go on with the
    // next block, what that one's first slot erases.
    int64_t read(int64_t block, bool goes_on = false) {
        int64_t const first = block * block_tokens;
        int64_t const count = min_of(block_tokens, task_.end - task_.begin - first);
        int64_t const s = count * n, i = first * n;
        q_.read_rows(q + (n - 1) * key_width, n * key_width, first, count, scale_);
        k_.read_rows(k, key_width, i, s);
        v_.read_rows(v, value_width, i, s);
        if constexpr (Rule::kOwnErase) erase_.read_rows(erase, key_width, i, s);
        if constexpr (Rule::kWrites == 2) write_.read_rows(write, key_width, i, s);
        if constexpr (Rule::kHasBeta) read_betas(i, s);
        if constexpr (Rule::kDecays) read_gates(0, first, count);
        if (divided_) {
            for (int64_t j = 0; j < s; ++j) divide(j, i + j);
        } else if constexpr (Rule::kDecays) {
            for (int64_t t = 0; t < count; ++t) exp_gates(decay + t * n * key_width);
        }
        Row const& erased = Rule::kOwnErase ? erase_ : k_;
        T* const rows = Rule::kOwnErase ? erase : k;
        if (goes_on && block + 1 < blocks()) {
            int64_t const next = i + s;
            erased.read_rows(rows + s * key_width, key_width, next, 1);
            if constexpr (Rule::kDecays) read_gates(s, first + count, 1);
            if (divided_ && !Rule::kErasesDecayed) multiply_erase(s);
            if (divided_ && Rule::kErasesDecayed) {  // f decays again with the next block
                for (int64_t c = 0; c < key_width; c += W)
                    store(kept_factor_ + c, load(factor_ + c));
                decay_factor(s, next);
                multiply_erase(s);
                std::swap(factor_, kept_factor_);
            }
        } else {
            fill(rows + s * key_width, key_width, T(0));
            if constexpr (Rule::kDecays) fill(decay + s * key_width, key_width, T(1));
        }
        return s;
    }

    // Asks for slot i ahead of its use and between the arithmetic of others: more requests at once
    // than a core keeps open would wait for each other.
    LSM_INLINE void prefetch(int64_t i) const {
        int64_t const token = token_of(i);
        if (i - token * n == n - 1) {
            q_.prefetch(token);
            if (Rule::kDecays && per_channel_decay_) g_.prefetch(token);
        }
        k_.prefetch(i), v_.prefetch(i);
        if constexpr (Rule::kOwnErase) erase_.prefetch(i);
        if constexpr (Rule::kWrites == 2) write_.prefetch(i);
    }

    // Whether a slot's decay row is for the state; where it is not, f has it.
    bool decays_state(int64_t slot) const {
        return Rule::kDecays && (!divided_ || decays_state_[slot] != 0);
    }
    int64_t last_slot(int64_t token) const { return token * n + n - 1; }
    // Without the time of a division where it is none.
    int64_t token_of(int64_t slot) const { return n == 1 ? slot : slot / n; }
    bool has_output(int64_t slot) const { return last_slot(token_of(slot)) == slot; }
    SlotRows<T> rows(int64_t slot) const {
        int64_t const at = slot * key_width;
        if constexpr (Rule::kWrites == 2) {
            return {q + at, erase + at, decay + at, {write + at, k + at}};
        } else {
            bool const own = Rule::kOwnErase || divided_;
            return {q + at, (own ? erase : k) + at, decay + at, {k + at, nullptr}};
        }
    }

    Row key_rows(lsm::Rows const& rows, int64_t per_token) const {
        return {rows, p_.dtype, task_.batch, task_.head / (p_.HV / p_.H), tokens(per_token), p_.K};
    }
    Row value_rows(lsm::Rows const& rows, int64_t per_token) const {
        return {rows,         p_.dtype,          task_.batch,
                task_.head,   tokens(per_token), task_.v_end - task_.v_begin,
                task_.v_begin};
    }
    Row beta_rows(lsm::Rows const& rows) const {
        return {rows,
                p_.beta_dtype,
                task_.batch,
                task_.head,
                tokens(n),
                per_channel_beta_ ? task_.v_end - task_.v_begin : 1,
                per_channel_beta_ ? task_.v_begin : 0};
    }

    static void fill(T* row, int64_t count, T value) {
        for (int64_t i = 0; i < count; i += W) store(row + i, Vector<T>{} + value);
    }

    int64_t n, block_tokens, key_width, value_width;
    T *q, *k, *erase, *write, *decay, *v, *beta;  // erase, write, decay, beta: where Rule has them

  private:
    // In tokens: no more than there are.
    int64_t block_length(int64_t slots, int64_t tokens) const {
        int64_t const length = min_of(slots / n, tokens);
        return length > 1 ? length : 1;
    }
    static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

    // Of tokens [i, i + count), whose first slot is `slot`: log decays, one or one per channel.
    void read_gates(int64_t slot, int64_t i, int64_t count) const {
        T* row = decay + slot * key_width;
        if (per_channel_decay_) return g_.read_rows(row, n * key_width, i, count);
        for (int64_t t = 0; t < count; ++t, row += n * key_width) row[0] = g_.first_of(i + t);
    }
    // f(c, decays of channels [c, c + W)), from such a row.
    template <class F>
    LSM_INLINE void for_each_decay(T const* row, F const& f) const {
        if (per_channel_decay_) {
            for (int64_t c = 0; c < key_width; c += W) f(c, exp(load(row + c)));
        } else {
            Vector<T> const a = exp(Vector<T>{} + row[0]);
            for (int64_t c = 0; c < key_width; c += W) f(c, a);
        }
    }
    void exp_gates(T* row) const {
        for_each_decay(row, [&](int64_t c, Vector<T> a) { store(row + c, a); });
    }

    // Slot `slot`, the i-th of its sequence, decays f; or, where f leaves its range, the state by what f was. So do the
    // first slot and the last one that decays, before and after which the state is S.
    void decay_factor(int64_t slot, int64_t i) {
        int64_t const token = token_of(i);
        T* const row = decay + slot * key_width;
        decays_state_[slot] = T(0);
        if (token * n != i) return;
        bool const within = decay_within(row);
        if (within && i != 0 && token + 1 != task_.end - task_.begin) return;
        for (int64_t c = 0; c < key_width; c += W) store(row + c, load(factor_ + c));
        fill(factor_, key_width, T(1));
        decays_state_[slot] = T(1);
    }
    void multiply_erase(int64_t slot) {
        T* const own = erase + slot * key_width;
        T const* const erased = Rule::kErasesDecayed ? k + slot * key_width : own;
        for (int64_t c = 0; c < key_width; c += W)
            store(own + c, load(erased + c) * load(factor_ + c));
    }
    void divide(int64_t slot, int64_t i) {
        if constexpr (!Rule::kErasesDecayed) multiply_erase(slot);
        decay_factor(slot, i);
        int64_t const at = slot * key_width, width = key_width;
        T const* const f = factor_;
        T *const own_q = q + at, *const own_k = k + at, *const own_erase = erase + at;
        T* const own_write = write + at;
        for (int64_t c = 0; c < width; c += W) {
            Vector<T> const x = load(f + c), key = load(own_k + c);
            store(own_q + c, load(own_q + c) * x);
            if constexpr (Rule::kErasesDecayed) store(own_erase + c, key * x);
            store(own_k + c, key / x);
            if constexpr (Rule::kWrites == 2) store(own_write + c, load(own_write + c) / x);
        }
    }
    // Whether f, decayed by a row of gates, is neither too small nor too large to divide by, nor NaN.
    bool decay_within(T const* row) {
        constexpr T kLeast = T(0x1p-32), kMost = T(0x1p32);
        Vector<T> const zero{}, one = zero + 1;
        Vector<T> outside{};
        for_each_decay(row, [&](int64_t c, Vector<T> a) {
            Vector<T> const x = load(factor_ + c) * a;
            store(factor_ + c, x);
            outside += x >= kLeast ? (x <= kMost ? zero : one) : one;
        });
        return sum_lanes<T>(outside) == T(0);
    }

    void read_betas(int64_t i, int64_t count) const {
        if (per_channel_beta_) return beta_.read_rows(beta, value_width, i, count);
        for (int64_t s = 0; s < count; ++s)
            fill(beta + s * value_width, value_width, beta_.first_of(i + s));
    }

    T *factor_, *kept_factor_, *decays_state_;  // f, and 1 for slots that decay the state
    bool divided_;
    T scale_;
    bool per_channel_beta_, per_channel_decay_;
    DeltaParams const& p_;
    DeltaTask const& task_;
    Row q_, k_, erase_, write_, g_, v_, beta_;
};

// Tiles of a state: N panels of columns from panel p on, [K][N W] at S + p K W.

template <int kValue>
struct Panels {
    static constexpr int value = kValue;
};

// Panels of K rows that leave half of the first-level cache free, 4 at most.
inline int64_t panels_that_fit(int64_t K) {
    int64_t const fit = (int64_t(20) << 10) / (K * kVectorBytes);
    return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// f(Panels<N>, p) for tiles as wide as that, and no wider than kWidest.
template <class T, int kWidest, class F>
LSM_INLINE void for_each_state_tile(int64_t K, int64_t column_panels, F const& f) {
    int64_t const widest = panels_that_fit(K);
    int64_t p = 0;
    if constexpr (kWidest >= 4) {
        for (; widest >= 4 && p + 4 <= column_panels; p += 4) f(Panels<4>{}, p);
    }
    for (; widest >= 2 && p + 2 <= column_panels; p += 2) f(Panels<2>{}, p);
    for (; p < column_panels; ++p) f(Panels<1>{}, p);
}

// Whether a state of V columns can be worked on where it lies in memory.
template <class T>
bool fits_as_it_lies(int64_t K, int64_t V) {
    constexpr int W = kLanes<T>;
    return V % W == 0 && V / W <= panels_that_fit(K);
}

template <int kWidest, class T>
void read_state_tiles(T* dst, void const* src, int64_t stride, int64_t K, int64_t V) {
    constexpr int W = kLanes<T>;
    for_each_state_tile<T, kWidest>(K, panels(V, W), [&](auto tile, int64_t p) {
        constexpr int64_t kWidth = decltype(tile)::value * W;
        size_t const bytes = size_t(min_of(kWidth, V - p * W)) * sizeof(T);
        T* out = dst + p * K * W;
        if (src == nullptr || bytes < kWidth * sizeof(T)) {
            std::memset(out, 0, size_t(K * kWidth) * sizeof(T));
        }
        if (src == nullptr) return;
        T const* row = static_cast<T const*>(src) + p * W;
        for (int64_t k = 0; k < K; ++k) std::memcpy(out + k * kWidth, row + k * stride, bytes);
    });
}

template <int kWidest, class T>
void write_state_tiles(void* dst, T const* src, int64_t stride, int64_t K, int64_t V) {
    constexpr int W = kLanes<T>;
    if (dst == nullptr) return;
    for_each_state_tile<T, kWidest>(K, panels(V, W), [&](auto tile, int64_t p) {
        constexpr int64_t kWidth = decltype(tile)::value * W;
        size_t const bytes = size_t(min_of(kWidth, V - p * W)) * sizeof(T);
        T* row = static_cast<T*>(dst) + p * W;
        for (int64_t k = 0; k < K; ++k) {
            std::memcpy(row + k * stride, src + p * K * W + k * kWidth, bytes);
        }
    });
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
