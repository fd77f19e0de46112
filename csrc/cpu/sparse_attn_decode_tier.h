// Decode attention for one instruction set (see chunk_tier.h for what the including file has chosen): a few queries
// against part of a cache, chunk of keys by chunk of keys with a running softmax; and the merge of the parts.
#pragma once

#include "arena.h"
#include "numbers.h"
#include "sparse_attn_decode_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// Keys of a chunk, whose rows are widened once for all queries.
constexpr int64_t kChunk = 32;

template <class T>
int64_t padded(int64_t columns) {
    return panels(columns, kLanes<T>) * kLanes<T>;
}

template <class T>
struct DecodeScratch {
    DecodeScratch(SparseAttnParams const& p, void* memory) : arena(memory) {
        int64_t const rows = p.Tq * (p.Hq / p.Hkv), K = padded<T>(p.K), V = padded<T>(p.V);
        q = arena.take(rows * K), o = arena.take(rows * V);
        arena.take_each(rows, top, sum);
        keys = arena.take(kChunk * K), values = arena.take(kChunk * V);
        scores = arena.take(rows * kChunk);
    }
    Arena<T> arena;
    T *q, *o;          // [rows][K padded], [rows][V padded]
    T *top, *sum;      // [rows]: running maximum and sum
    T *keys, *values;  // [kChunk][K padded], [kChunk][V padded]
    T* scores;         // [rows][kChunk]
};

template <class T, class Element>
void widen_row(T* to, Element const* from, int64_t columns, T scale = 1) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, widen(from + c) * scale);
    if (c < columns) store(to + c, widen_first<T>(from + c, columns - c) * scale);
}

template <class T, class Element>
class DecodeWalk {
  public:
    static constexpr int W = kLanes<T>;

    DecodeWalk(SparseAttnParams const& p, DecodeTask const& task, void* scratch)
        : p_(p),
          task_(task),
          s_(p, scratch),
          K_(padded<T>(p.K)),
          V_(padded<T>(p.V)),
          heads_(task.h1 - task.h0),
          rows_((task.t1 - task.t0) * heads_),
          first_position_(p.mask.offset + (p.mask.align_end ? task.keys - p.Tq : 0)) {}

    void run(T* o, T* lse) {
        for (int64_t r = 0; r < rows_; ++r) {
            widen_row(s_.q + r * K_, at(p_.q, task_.batch, query(r), head(r)), p_.K, T(p_.scale));
            s_.top[r] = -INFINITY, s_.sum[r] = 0;
        }
        for (int64_t i = 0; i < rows_ * V_; i += W) store(s_.o + i, Vector<T>{});
        for (int64_t i = task_.first; i < task_.last; i += kChunk)
            chunk(i, min_of(kChunk, task_.last - i));
        for (int64_t r = 0; r < rows_; ++r) {
            int64_t const t = query(r), h = head(r);
            T const sum = s_.sum[r], part = sum == 0 ? 0 : 1 / sum;
            T* const to = o + ((task_.batch * p_.Tq + t) * p_.Hq + h) * p_.V;
            for (int64_t c = 0; c < p_.V; ++c) to[c] = s_.o[r * V_ + c] * part;
            lse[(task_.batch * p_.Hq + h) * p_.Tq + t] =
                sum == 0 ? T(-INFINITY) : s_.top[r] + std::log(sum);
        }
    }

  private:
    int64_t query(int64_t row) const { return task_.t0 + row / heads_; }
    int64_t head(int64_t row) const { return task_.h0 + row % heads_; }

    static Element const* at(Rows const& x, int64_t batch, int64_t time, int64_t head) {
        return static_cast<Element const*>(x.data) + batch * x.batch + time * x.time +
               head * x.head;
    }
    Element const* cached(Rows const& x, int64_t key) const {
        if (p_.block_table == nullptr) return at(x, task_.batch, key, task_.kv_head);
        int64_t const page = p_.block_table[task_.batch * p_.max_pages + key / p_.page_size];
        return at(x, page, key % p_.page_size, task_.kv_head);
    }

    int64_t visited(int64_t i) const {
        int64_t const block = p_.lists.block_k;
        return task_.list != nullptr ? task_.list[i / block] * block + i % block
                                     : task_.visits.key(i);
    }

    // Asks for a chunk ahead of its use: a head's rows lie too far apart for the hardware.
    LSM_INLINE void prefetch(int64_t first, int64_t count) const {
        for (int64_t i = first; i < first + count; ++i) {
            int64_t const key = visited(i);
            if (key >= task_.keys) break;
            char const *const k = reinterpret_cast<char const*>(cached(p_.k, key)),
                              *const v = reinterpret_cast<char const*>(cached(p_.v, key));
            for (int64_t line = 0; line < p_.K * int64_t(sizeof(Element)); line += 64)
                __builtin_prefetch(k + line);
            for (int64_t line = 0; line < p_.V * int64_t(sizeof(Element)); line += 64)
                __builtin_prefetch(v + line);
        }
    }

    // Visits [first, first + count).
    void chunk(int64_t first, int64_t count) {
        int64_t keys[kChunk], live = 0, entries[kChunk];
        for (int64_t i = first; i < first + count; ++i) {
            int64_t const key = visited(i);
            if (key >= task_.keys) break;  // the end of the last block
            entries[live] = i / p_.lists.block_k, keys[live++] = key;
        }
        if (live == 0) return;
        for (int64_t n = 0; n < live; ++n) {
            widen_row(s_.keys + n * K_, cached(p_.k, keys[n]), p_.K);
            widen_row(s_.values + n * V_, cached(p_.v, keys[n]), p_.V);
        }
        for (int64_t n = live; n < panels(live, W) * W; ++n)
            for (int64_t c = 0; c < K_; c += W) store(s_.keys + n * K_ + c, Vector<T>{});
        prefetch(first + count, min_of(kChunk, task_.last - first - count));
        for (int64_t r = 0; r < rows_; ++r) score(r, live);
        adjust(keys, entries, live);
        for (int64_t r = 0; r < rows_; ++r) accumulate(r, live);
    }

    // As many keys at a time as a vector has lanes.
    void score(int64_t r, int64_t live) {
        T const* const q = s_.q + r * K_;
        for (int64_t n = 0; n < live; n += W) {
            Vector<T> sum[W] = {};
            T const* const k = s_.keys + n * K_;
            for (int64_t c = 0; c < K_; c += W) {
                Vector<T> const x = load(q + c);
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) sum[i] += x * load(k + i * K_ + c);
            }
            store(s_.scores + r * kChunk + n, sum_each<T>(sum));
        }
    }

    // What is added to the products, and -inf for the keys that a query does not see.
    void adjust(int64_t const* keys, int64_t const* entries, int64_t live) {
        AttnMask const& m = p_.mask;
        bool const bounded =
            m.causal || m.left >= 0 || m.head_left != nullptr || m.right >= 0 || m.dilation != 1;
        bool const changed = p_.softcap != 0 || p_.lists.bias != nullptr ||
                             p_.alibi_slopes != nullptr || p_.ramp != nullptr;
        if (!changed) {
            if (!bounded) return;
            // The usual case: every query sees every key of the chunk.
            bool const only_causal =
                m.left < 0 && m.head_left == nullptr && m.right < 0 && m.dilation == 1;
            int64_t const last = attn_position(m, keys[live - 1]);
            if (only_causal && attn_sees(m, -1, first_position_ + task_.t0, last)) return;
        }
        for (int64_t r = 0; r < rows_; ++r) {
            int64_t const h = head(r), position = first_position_ + query(r);
            int64_t const left = m.head_left != nullptr ? m.head_left[h] : m.left;
            T* const scores = s_.scores + r * kChunk;
            for (int64_t n = 0; n < live; ++n) {
                int64_t const x = attn_position(m, keys[n]);
                if (!attn_sees(m, left, position, x)) {
                    scores[n] = -INFINITY;
                    continue;
                }
                T s = scores[n];
                T const distance = T(position > x ? position - x : x - position);
                if (p_.softcap != 0) s = T(p_.softcap) * std::tanh(s / T(p_.softcap));
                if (p_.lists.bias != nullptr)
                    s += static_cast<T const*>(p_.lists.bias)[task_.list_at + entries[n]];
                if (p_.alibi_slopes != nullptr)
                    s -= static_cast<T const*>(p_.alibi_slopes)[h] * distance;
                if (p_.ramp != nullptr) {
                    T const R = T(p_.ramp_length);
                    T const open = (R + static_cast<T const*>(p_.ramp)[h] - distance) / R;
                    s = open >= 1 ? s : open > 0 ? s + std::log(open) : T(-INFINITY);
                }
                scores[n] = s;
            }
        }
    }

    void accumulate(int64_t r, int64_t live) {
        T* const p = s_.scores + r * kChunk;
        T* const o = s_.o + r * V_;
        T top = s_.top[r];
        for (int64_t n = 0; n < live; ++n) top = p[n] <= top ? top : p[n];  // NaN too
        if (top == -INFINITY) return;
        for (int64_t n = live; n < panels(live, W) * W; ++n) p[n] = -INFINITY;
        Vector<T> sum{};
        for (int64_t n = 0; n < live; n += W) {
            Vector<T> const e = exp(load(p + n) - top);
            store(p + n, e), sum += e;
        }
        T const keep = std::exp(s_.top[r] - top);
        s_.top[r] = top, s_.sum[r] = s_.sum[r] * keep + sum_lanes<T>(sum);
        constexpr int N = 8;
        int64_t c = 0;
        for (; c + N * W <= V_; c += N * W) add_values<N>(o + c, p, s_.values + c, live, keep);
        for (; c < V_; c += W) add_values<1>(o + c, p, s_.values + c, live, keep);
    }

    template <int N>
    LSM_INLINE void add_values(T* o, T const* p, T const* values, int64_t live, T keep) {
        Vector<T> sum[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sum[i] = load(o + i * W) * keep;
        for (int64_t n = 0; n < live; ++n) {
            if (p[n] == 0) continue;  // not 0 times inf, of a key that the query does not see
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sum[i] += p[n] * load(values + n * V_ + i * W);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) store(o + i * W, sum[i]);
    }

    SparseAttnParams const& p_;
    DecodeTask const& task_;
    DecodeScratch<T> s_;
    int64_t K_, V_, heads_, rows_, first_position_;
};

int64_t decode_scratch_bytes(SparseAttnParams const& p) {
    return with_accumulator(
        p.dtype, [&](auto zero) { return DecodeScratch<decltype(zero)>(p, nullptr).arena.used(); });
}

void decode(SparseAttnParams const& p, DecodeTask const& task, void* o, void* lse, void* scratch) {
    with_types(p.dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        DecodeWalk<T, decltype(element)>(p, task, scratch)
            .run(static_cast<T*>(o), static_cast<T*>(lse));
    });
}

// ---- Parts of one softmax ----

// One row: a token's head. Where parts lie, and their weights in the softmax.
template <class T>
class MergeRow {
  public:
    static constexpr int W = kLanes<T>;

    MergeRow(MergeParams const& p, int64_t row)
        : p_(p), row_(row), h_(row % p.H), t_(row / p.H % p.T), b_(row / p.H / p.T) {}

    int64_t scores_at(int64_t part) const { return ((part * p_.B + b_) * p_.H + h_) * p_.T + t_; }
    int64_t values_at(int64_t part) const { return (part * p_.B * p_.T * p_.H + row_) * p_.V; }
    T score(int64_t part) const { return static_cast<T const*>(p_.lse_parts)[scores_at(part)]; }

    template <class Element>
    Element* of(Rows const& x) const {
        return static_cast<Element*>(x.data) + b_ * x.batch + t_ * x.time + h_ * x.head;
    }

    // Parts in their order, a vector of columns at a time.
    template <class Part, class Element>
    void merge() const {
        T const sink =
            p_.sink_logits != nullptr ? static_cast<T const*>(p_.sink_logits)[h_] : T(-INFINITY);
        T top = sink;
        for (int64_t i = 0; i < p_.parts; ++i) top = score(i) > top ? score(i) : top;
        T sum = top == -INFINITY ? T(0) : std::exp(sink - top);
        for (int64_t i = 0; i < p_.parts; ++i)
            if (score(i) != -INFINITY) sum += std::exp(score(i) - top);
        T const lse = sum == 0 ? T(-INFINITY) : top + std::log(sum);
        static_cast<T*>(p_.lse)[scores_at(0)] = lse;
        Element* const o = of<Element>(p_.o);
        constexpr int N = 8;
        for (int64_t first = 0; first < p_.V; first += N * W) {
            Vector<T> y[N] = {};
            for (int64_t i = 0; i < p_.parts; ++i) {
                if (score(i) == -INFINITY) continue;
                Part const* const x = static_cast<Part const*>(p_.o_parts) + values_at(i);
                T const weight = std::exp(score(i) - top) / sum;
                for (int n = 0; n < N; ++n)
                    if (int64_t const c = first + n * W; c < p_.V)
                        y[n] += weight * row_piece(x + c, p_.V - c);
            }
            for (int n = 0; n < N; ++n)
                if (int64_t const c = first + n * W; c < p_.V) store_piece(o + c, y[n], p_.V - c);
        }
    }

    // do_i = w_i do;  dlse_i = w_i (do . (o_i - o) + dlse)
    template <class Part, class Element>
    void backward() const {
        T const lse = static_cast<T const*>(p_.lse)[scores_at(0)];
        T const dlse =
            p_.grad_lse == nullptr ? T(0) : static_cast<T const*>(p_.grad_lse)[scores_at(0)];
        Element const *const o = of<Element>(p_.o), *const grad = of<Element>(p_.grad_o);
        for (int64_t i = 0; i < p_.parts; ++i) {
            bool const empty = score(i) == -INFINITY;
            T const weight = empty ? T(0) : std::exp(score(i) - lse);
            Part const* const x = static_cast<Part const*>(p_.o_parts) + values_at(i);
            Part* const dx = static_cast<Part*>(p_.do_parts) + values_at(i);
            Vector<T> product{};
            for (int64_t c = 0; c < p_.V; c += W) {
                int64_t const rest = p_.V - c;
                Vector<T> const g = row_piece(grad + c, rest);
                if (!empty) product += g * (row_piece(x + c, rest) - row_piece(o + c, rest));
                store_piece(dx + c, weight * g, rest);
            }
            static_cast<T*>(p_.dlse_parts)[scores_at(i)] =
                empty ? T(0) : weight * (sum_lanes<T>(product) + dlse);
        }
    }

  private:
    template <class Element>
    static Vector<T> row_piece(Element const* x, int64_t rest) {
        return rest >= W ? widen(x) : widen_first<T>(x, rest);
    }
    template <class Element>
    static void store_piece(Element* x, Vector<T> y, int64_t rest) {
        if (rest >= W) {
            narrow(x, y);
        } else {
            narrow_first<T>(x, y, rest);
        }
    }

    MergeParams const& p_;
    int64_t row_, h_, t_, b_;
};

// f(row, Part{}, Element{}) for every row.
template <class F>
void for_each_row(MergeParams const& p, int64_t first, int64_t last, F const& f) {
    with_types(p.dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        for (int64_t row = first; row < last; ++row) {
            MergeRow<T> const merge(p, row);
            if (p.part_dtype == Dtype::f32 || sizeof(T) == 8) {
                f(merge, T{}, element);
            } else {
                f(merge, element, element);
            }
        }
    });
}

void merge(MergeParams const& p, int64_t first, int64_t last) {
    for_each_row(p, first, last, [](auto const& row, auto part, auto element) {
        row.template merge<decltype(part), decltype(element)>();
    });
}

void merge_bwd(MergeParams const& p, int64_t first, int64_t last) {
    for_each_row(p, first, last, [](auto const& row, auto part, auto element) {
        row.template backward<decltype(part), decltype(element)>();
    });
}

}  // namespace

constinit SparseAttnDecodeKernels const sparse_attn_decode_kernels{decode_scratch_bytes, decode,
                                                                   merge, merge_bwd};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
