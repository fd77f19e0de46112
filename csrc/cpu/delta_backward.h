// Backward over the tokens of one value head, slots last to first. G is the gradient of the state
// after a slot, d_write that of its rows, r and e its erased value and row:
//   d_value = G^T write,  d_write = G value,  d_q = S dO
//   dr = -beta d_value (or the gradient of the value written along b),  d_erase = S dr
//   G <- decay (G + e dr^T), or decay G + e dr^T where r is read before the decay
//   d log decay = decay Σ S G by row, of the S and G on either side of the decay
// A forward pass keeps the state before every block; each block is run again for the states its
// slots erase from.
#pragma once

#include "delta_forward.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// dO and q of a slot join G; what its values get from that.
template <class Rule, int N, class T>
LSM_INLINE void enter_slot(T* G, int64_t K, SlotRows<T> const& x, Vector<T> const (&grad_o)[N],
                           Vector<T> (&d_values)[Rule::kWrites][N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 2
    for (int w = 0; w < Rule::kWrites; ++w) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) d_values[w][n] = Vector<T>{};
    }
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> sum[Rule::kWrites][N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
            SlotRow<T, Rule::kWrites> const own(x, i);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> const g = load(G + (i * N + n) * W) + own.q * grad_o[n];
                store(G + (i * N + n) * W, g);
#pragma GCC unroll 2
                for (int w = 0; w < Rule::kWrites; ++w) sum[w][n] += own.write[w] * g;
            }
        }
#pragma GCC unroll 2
        for (int w = 0; w < Rule::kWrites; ++w) add_panels<T>(d_values[w], sum[w]);
    }
}

// Gradients of a slot's rows, lanes not yet summed: [K][W] each.
template <class T>
struct RowSums {
    T *q, *erase, *decay, *write[2];
};

// Leaves a slot with G and enters the one before it. S is what the slot erases from; d_values come
// as the slot's own, of which dr is made, and go as those of the one before.
template <class Rule, int N, class T>
LSM_INLINE void retreat(T* G, T const* S, int64_t K, SlotRows<T> const& x,
                        SlotRows<T> const& before, RowSums<T> const& sums,
                        Vector<T> const (&values)[Rule::kWrites][N], Vector<T> const (&dr)[N],
                        Vector<T> const (&grad_o)[N], Vector<T> const (&grad_o_before)[N],
                        Vector<T> (&d_values)[Rule::kWrites][N]) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 2
    for (int w = 0; w < Rule::kWrites; ++w) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) d_values[w][n] = Vector<T>{};
    }
    for (int64_t first = 0; first < K; first += kSumRows) {
        Vector<T> sum[Rule::kWrites][N] = {};
        for (int64_t i = first; i < min_of(first + kSumRows, K); ++i) {
            SlotRow<T, Rule::kWrites> const own(x, i), earlier(before, i);
            Vector<T> d_q{}, d_erase{}, d_decay{}, d_write[Rule::kWrites] = {};
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector<T> const s = load(S + (i * N + n) * W);
                Vector<T> g = load(G + (i * N + n) * W);
                d_q += s * grad_o[n];
                d_erase += s * dr[n];
#pragma GCC unroll 2
                for (int w = 0; w < Rule::kWrites; ++w) d_write[w] += g * values[w][n];
                if constexpr (Rule::kErasesDecayed) {
                    g += own.erase * dr[n];
                    if constexpr (Rule::kDecays) {
                        d_decay += s * g;
                        g *= own.decay;
                    }
                } else {
                    if constexpr (Rule::kDecays) {
                        d_decay += s * g;
                        g *= own.decay;
                    }
                    g += own.erase * dr[n];
                }
                g += earlier.q * grad_o_before[n];
                store(G + (i * N + n) * W, g);
#pragma GCC unroll 2
                for (int w = 0; w < Rule::kWrites; ++w) sum[w][n] += earlier.write[w] * g;
            }
            store(sums.q + i * W, d_q);
            if constexpr (Rule::kOwnErase) {
                store(sums.erase + i * W, d_erase);
            } else {
                d_write[0] += d_erase;
            }
#pragma GCC unroll 2
            for (int w = 0; w < Rule::kWrites; ++w) store(sums.write[w] + i * W, d_write[w]);
            if constexpr (Rule::kDecays) store(sums.decay + i * W, d_decay);
        }
#pragma GCC unroll 2
        for (int w = 0; w < Rule::kWrites; ++w) add_panels<T>(d_values[w], sum[w]);
    }
}

// Sums of the lanes of rows [i, i + W).
template <class T>
LSM_INLINE Vector<T> row_sums(T const* sums, int64_t i) {
    constexpr int W = kLanes<T>;
    Vector<T> rows[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) rows[j] = load(sums + (i + j) * W);
    return sum_each<T>(rows);
}

// The same, of all of them together, in lanes that are still to be added up.
template <class T>
LSM_INLINE Vector<T> row_total(T const* sums, int64_t i) {
    constexpr int W = kLanes<T>;
    Vector<T> even{}, odd{};
#pragma GCC unroll 8
    for (int j = 0; j < W; j += 2) {
        even += load(sums + (i + j) * W);
        odd += load(sums + (i + j + 1) * W);
    }
    return even + odd;
}

template <class T>
LSM_INLINE void add_to(T* p, Vector<T> x) {
    store(p, load(p) + x);
}

template <class T, class Rule>
class DeltaBackward {
    using Tokens = DeltaTokens<T, Rule>;
    using Row = typename Tokens::Row;

  public:
    DeltaBackward(DeltaParams const& p, DeltaTask const& task, void* scratch)
        : p_(p),
          task_(task),
          arena_(scratch),
          tokens_(p, task, arena_),
          rows_grad_o_(tokens_.value_rows(p.grad_o, 1)),
          rows_dq_(key_gradient(p.dq, 1)),
          rows_dk_(key_gradient(p.dk, p.n)),
          rows_d_erase_(key_gradient(p.derase, p.n)),
          rows_d_write_(key_gradient(p.dwrite, p.n)),
          rows_dg_(p.dg, p.gate_dtype, task.batch, task.head, tokens_.tokens(1),
                   p.decay == Decay::key ? p.K : 1),
          rows_dv_(tokens_.value_rows(p.dv, p.n)),
          rows_d_beta_(tokens_.beta_rows(p.dbeta)),
          per_channel_decay_(p.decay == Decay::key),
          state_(p.K * tokens_.value_width) {
        int64_t const slots = tokens_.slots(), keys = slots * tokens_.key_width;
        arena_.take_each(slots * tokens_.value_width, grad_o_, kept_, dv_, d_beta_);
        arena_.take_each(keys, dq_, d_erase_, d_decay_, d_write_[0], d_write_[1]);
        nothing_ = arena_.take(tokens_.key_width);
        arena_.take_each(tokens_.key_width * W, sums_.q, sums_.erase, sums_.decay, sums_.write[0],
                         sums_.write[1]);
        G_ = arena_.take(state_);
        slot_states_ = arena_.take(slots * p.K * min_of(tokens_.value_width, kMaxPanels * W));
        checkpoints_ = arena_.take(state_ * (tokens_.blocks() + 1));
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        clear();
        read_state_tiles<kMaxPanels>(checkpoints_, task_.state_begin, p_.V, p_.K, p_.V);
        read_state_tiles<kMaxPanels>(G_, task_.grad_end, p_.V, p_.K, p_.V);
        int64_t const blocks = tokens_.blocks();
        for (int64_t b = 0; b + 1 < blocks; ++b) keep_next_state(b);
        for (int64_t b = blocks - 1; b >= 0; --b) {
            read(b);
            for_each_tile([&](auto tile, int64_t p) { gradients<decltype(tile)::value>(b, p); });
            write(b);
        }
        write_state_tiles<kMaxPanels>(task_.grad_begin, G_, p_.V, p_.K, p_.V);
    }

  private:
    static constexpr int W = kLanes<T>, kMaxPanels = 4;

    Row key_gradient(lsm::Rows const& rows, int64_t per_token) const {
        return {rows, p_.key_grad_dtype, task_.batch, task_.head, tokens_.tokens(per_token), p_.K};
    }

    template <class F>
    LSM_INLINE void for_each_tile(F const& f) const {
        for_each_state_tile<T, kMaxPanels>(p_.K, panels(p_.V, W), f);
    }

    void clear() {
        tokens_.clear();
        Tokens::fill(grad_o_, tokens_.slots() * tokens_.value_width, T(0));
        Tokens::fill(nothing_, tokens_.key_width, T(0));
        for (T* sums : {sums_.q, sums_.erase, sums_.decay, sums_.write[0], sums_.write[1]}) {
            Tokens::fill(sums, tokens_.key_width * W, T(0));
        }
    }

    void keep_next_state(int64_t block) {
        int64_t const slots = tokens_.read(block);
        for_each_tile([&](auto tile, int64_t p) {
            constexpr int N = decltype(tile)::value;
            T const* S = checkpoints_ + block * state_ + p * p_.K * W;
            T* const next = checkpoints_ + (block + 1) * state_ + p * p_.K * W;
            Vector<T> r[N];
            read_erased<Rule>(next, S, N * W, p_.K, tokens_.rows(0), r);
            for (int64_t s = 0; s < slots; ++s) {
                if (p == 0) tokens_.prefetch((block + 1) * tokens_.slots() + s);
                write_slot<N>(next, next, s, p * W, r);
            }
        });
    }

    template <int N>
    LSM_INLINE void write_slot(T* dst, T const* src, int64_t s, int64_t column, Vector<T> (&r)[N]) {
        int64_t const at = s * tokens_.value_width + column;
        Vector<T> none[N], values[Rule::kWrites][N];
        keep<Rule>(kept_ + at, tokens_.v + at, r);
        values_of<Rule>(values, kept_ + at, tokens_.v + at, tokens_.beta + at);
        advance<Rule, N, false, true, Rule::kDecays>(dst, src, N * W, p_.K, tokens_.rows(s),
                                                     tokens_.rows(s + 1), values, none, r);
    }

    void read(int64_t block) {
        slots_ = tokens_.read(block);
        for (int64_t t = 0; t < slots_ / tokens_.n; ++t) {
            int64_t const i = block * tokens_.block_tokens + t;
            rows_grad_o_.read(grad_o_ + tokens_.last_slot(t) * tokens_.value_width, i);
        }
        for (T* rows : {dq_, d_erase_, d_decay_, d_write_[0], d_write_[1]}) {
            Tokens::fill(rows, slots_ * tokens_.key_width, T(0));
        }
    }

    template <int N>
    void gradients(int64_t block, int64_t panel) {
        int64_t const column = panel * W, size = p_.K * N * W;
        {
            Vector<T> r[N];
            read_erased<Rule>(slot_states_, checkpoints_ + block * state_ + panel * p_.K * W, N * W,
                              p_.K, tokens_.rows(0), r);
            for (int64_t s = 0; s + 1 < slots_; ++s) {
                write_slot<N>(slot_states_ + (s + 1) * size, slot_states_ + s * size, s, column, r);
            }
            int64_t const at = (slots_ - 1) * tokens_.value_width + column;
            keep<Rule>(kept_ + at, tokens_.v + at, r);
        }
        T* const G = G_ + panel * p_.K * W;
        Vector<T> grad_o[N], before[N], values[Rule::kWrites][N], d_values[Rule::kWrites][N], dr[N];
        load_panels(grad_o, grad_o_ + (slots_ - 1) * tokens_.value_width + column);
        enter_slot<Rule>(G, p_.K, tokens_.rows(slots_ - 1), grad_o, d_values);
        for (int64_t s = slots_ - 1; s >= 0; --s) {
            int64_t const at = s * tokens_.value_width + column;
            if (column == 0) {
                tokens_.prefetch((block - 1) * tokens_.slots() + s);
                rows_grad_o_.prefetch((block - 1) * tokens_.block_tokens + tokens_.token_of(s));
            }
            values_of<Rule>(values, kept_ + at, tokens_.v + at, tokens_.beta + at);
            value_gradients<N>(at, d_values, dr);
            SlotRows<T> x_before{nothing_, nothing_, nothing_, {nothing_, nothing_}};
            if (s > 0) x_before = tokens_.rows(s - 1);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                before[n] = s == 0 ? Vector<T>{} : load(grad_o_ + at - tokens_.value_width + n * W);
            }
            retreat<Rule, N>(G, slot_states_ + s * size, p_.K, tokens_.rows(s), x_before, sums_,
                             values, dr, grad_o, before, d_values);
            add_row_gradients<N>(s, values, grad_o);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) grad_o[n] = before[n];
        }
    }

    // dv and dbeta of a slot, and dr.
    template <int N>
    LSM_INLINE void value_gradients(int64_t at, Vector<T> const (&d_values)[Rule::kWrites][N],
                                    Vector<T> (&dr)[N]) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            int64_t const i = at + n * W;
            if constexpr (Rule::kHasBeta) {
                Vector<T> const dv = d_values[0][n] * load(tokens_.beta + i);
                store(dv_ + i, dv);
                store(d_beta_ + i, d_values[0][n] * load(kept_ + i));
                dr[n] = -dv;
            } else {
                store(dv_ + i, d_values[1][n]);
                dr[n] = d_values[0][n];
            }
        }
    }

    // S above is the state before the writes: dq lacks their share, write (value . dO).
    template <int N>
    LSM_INLINE void add_row_gradients(int64_t s, Vector<T> const (&values)[Rule::kWrites][N],
                                      Vector<T> const (&grad_o)[N]) {
        SlotRows<T> const x = tokens_.rows(s);
        T own[Rule::kWrites];
        for (int w = 0; w < Rule::kWrites; ++w) {
            Vector<T> sum{};
            for (int n = 0; n < N; ++n) sum += values[w][n] * grad_o[n];
            own[w] = sum_lanes<T>(sum);
        }
        bool const has_output = tokens_.has_output(s);
        for (int64_t i = 0, at = s * tokens_.key_width; i < tokens_.key_width; i += W) {
            constexpr bool kDecaysLater = Rule::kDecays && !Rule::kErasesDecayed;
            if (has_output) {
                Vector<T> dq = row_sums(sums_.q, i);
                if constexpr (kDecaysLater) dq *= load(x.decay + i);
                for (int w = 0; w < Rule::kWrites; ++w) dq += own[w] * load(x.write[w] + i);
                add_to(dq_ + at + i, dq);
            }
            for (int w = 0; w < Rule::kWrites; ++w) {
                add_to(d_write_[w] + at + i, row_sums(sums_.write[w], i));
            }
            if constexpr (Rule::kOwnErase) add_to(d_erase_ + at + i, row_sums(sums_.erase, i));
            if constexpr (Rule::kDecays) {
                Vector<T> d_decay =
                    per_channel_decay_ ? row_sums(sums_.decay, i) : row_total(sums_.decay, i);
                if constexpr (kDecaysLater) d_decay *= load(x.decay + i);
                add_to(d_decay_ + at + i, d_decay);
            }
        }
    }

    void write(int64_t block) {
        int64_t const first = block * tokens_.block_tokens;
        for (int64_t t = 0; t < slots_ / tokens_.n; ++t) {
            rows_dq_.write(dq_ + tokens_.last_slot(t) * tokens_.key_width, first + t, T(p_.scale));
            if (Rule::kDecays && p_.dg.data != nullptr) {
                T* const row = d_decay_ + t * tokens_.n * tokens_.key_width;
                if (p_.decay == Decay::scalar) sum_row(row, tokens_.key_width);
                rows_dg_.write(row, first + t);
            }
        }
        for (int64_t s = 0, i = first * tokens_.n; s < slots_; ++s, ++i) {
            int64_t const key = s * tokens_.key_width, value = s * tokens_.value_width;
            rows_dk_.write(d_write_[Rule::kWrites - 1] + key, i);
            if constexpr (Rule::kOwnErase) rows_d_erase_.write(d_erase_ + key, i);
            if constexpr (Rule::kWrites == 2) rows_d_write_.write(d_write_[0] + key, i);
            rows_dv_.write(dv_ + value, i);
            if constexpr (Rule::kHasBeta) {
                if (!p_.beta_per_channel) sum_row(d_beta_ + value, tokens_.value_width);
                rows_d_beta_.write(d_beta_ + value, i);
            }
        }
    }

    // The sum goes to the first place.
    static void sum_row(T* row, int64_t count) {
        Vector<T> sum{};
        for (int64_t i = 0; i < count; i += W) sum += load(row + i);
        row[0] = sum_lanes<T>(sum);
    }

    DeltaParams const& p_;
    DeltaTask const& task_;
    Arena<T> arena_;
    Tokens tokens_;
    Row rows_grad_o_, rows_dq_, rows_dk_, rows_d_erase_, rows_d_write_, rows_dg_, rows_dv_,
        rows_d_beta_;
    bool per_channel_decay_;
    int64_t state_, slots_ = 0;
    T *grad_o_, *kept_, *dv_, *d_beta_;                     // [slots][V]; kept_: v - r, or r
    T *dq_, *d_erase_, *d_decay_, *d_write_[2], *nothing_;  // [slots][K]
    RowSums<T> sums_;
    T* G_;
    T* slot_states_;  // of a tile: what each slot erases from
    T* checkpoints_;  // states before each block
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
