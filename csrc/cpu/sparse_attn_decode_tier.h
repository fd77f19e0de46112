// Decode attention for one instruction set (see chunk_tier.h for what the including file has chosen): a few queries
// against part of a cache, chunk of keys by chunk of keys with a running softmax; and the merge of the parts.
#pragma once

#include "sparse_attn_decode_kernels.h"
#include "sparse_attn_room.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kChunk = 32;  // keys

template <class T>
int64_t padded(int64_t columns) {
    return panels(columns, kLanes<T>) * kLanes<T>;
}

template <class T>
struct DecodeScratch {
    DecodeScratch(SparseAttnParams const& p, void* memory) : arena(memory) {
        int64_t const rows = p.Tq * (p.Hq / p.Hkv), K = padded<T>(p.K), V = padded<T>(p.V);
        q = arena.take(rows * K), o = arena.take(rows * V);
        arena.take_each(rows, top, sum, keep);
        keys = arena.take(kChunk * K), values = arena.take(kChunk * V);
        scores = arena.take(rows * kChunk);
    }
    Arena<T> arena;
    T *q, *o;             // [rows][K padded], [rows][V padded]
    T *top, *sum, *keep;  // [rows]: running maximum and sum, and what a chunk leaves of them
    T *keys, *values;     // [kChunk][K padded], [kChunk][V padded]
    T* scores;            // [rows][kChunk]
};

template <class T, class Element>
void widen_row(T* to, Element const* from, int64_t columns, T scale = 1) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, widen(from + c) * scale);
    if (c < columns) store(to + c, widen_first<T>(from + c, columns - c) * scale);
}

// As many codes as a vector of T has lanes.
template <class T>
struct CodeVectors;
template <>
struct CodeVectors<float> {
    typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
    typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
    typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct CodeVectors<double> {
    typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
    typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 4)));
    typedef int32_t Ints __attribute__((vector_size(kVectorBytes / 2)));
};

// A row of codes as numbers.
template <class T>
void widen_codes(T* to, uint8_t const* from, T const* affine, int64_t columns, int64_t bits) {
    constexpr int W = kLanes<T>;
    using Bytes = typename CodeVectors<T>::Bytes;
    using Shorts =
        typename CodeVectors<T>::Shorts;  // on the way: g++ takes four times as wide apart
    using Ints = typename CodeVectors<T>::Ints;
    T const step = affine[0], least = affine[1];
    bool const two = bits == 4;
    int64_t const bytes = two ? columns / 2 : columns;
    int64_t c = 0;
    for (; c + W <= bytes; c += W) {
        Bytes const bytes_ = load_bytes<Bytes>(from + c);
        Ints const codes = __builtin_convertvector(__builtin_convertvector(bytes_, Shorts), Ints);
        Ints const low = two ? codes & 15 : codes;
        store(to + c, __builtin_convertvector(low, Vector<T>) * step + least);
        if (two)
            store(to + bytes + c, __builtin_convertvector(codes >> 4, Vector<T>) * step + least);
    }
    for (; c < bytes; ++c) {
        to[c] = T(two ? from[c] & 15 : from[c]) * step + least;
        if (two) to[bytes + c] = T(from[c] >> 4) * step + least;
    }
    for (c = columns; c < padded<T>(columns); ++c) to[c] = 0;
}

// Rows of a chunk in memory, numbers or codes. Those past `live` are another's, so that whole vectors of keys may be read.
template <class T, class Stored>
struct Found {
    int64_t live = 0, keys[kChunk], entries[kChunk];
    Stored const *k[kChunk], *v[kChunk];
    T const *k_affine[kChunk], *v_affine[kChunk];  // of codes
};

// Stored: Element, or uint8_t for codes.
template <class T, class Element, class Stored>
class DecodeWalk {
  public:
    using Found = cpu::LSM_CPU_TIER::Found<T, Stored>;
    static constexpr bool kCodes = std::is_same_v<Stored, uint8_t>;
    static constexpr int W = kLanes<T>;
    static constexpr int kRows = W < 4 ? W : 4;  // that share a look at a key

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
            widen_row(s_.q + r * K_, at<Element>(p_.q, task_.batch, query(r), head(r)), p_.K,
                      T(p_.scale));
            s_.top[r] = -INFINITY, s_.sum[r] = 0;
        }
        for (int64_t i = 0; i < rows_ * V_; i += W) store(s_.o + i, Vector<T>{});
        // Wide rows are asked for a chunk ahead: a head's lie too far apart for the hardware.
        Found found[2];
        find(found[0], task_.first);
        for (int64_t i = task_.first, n = 0; i < task_.last; i += kChunk, n ^= 1) {
            find(found[n ^ 1], i + kChunk);
            chunk(found[n]);
        }
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

    template <class Number>
    static Number const* at(Rows const& x, int64_t batch, int64_t time, int64_t head) {
        return static_cast<Number const*>(x.data) + batch * x.batch + time * x.time + head * x.head;
    }

    // Visits from `first` on, in runs of keys that lie side by side.
    void find(Found& f, int64_t first) const {
        int64_t const end = min_of(first + kChunk, task_.last), block = p_.lists.block_k;
        f.live = 0;
        for (int64_t i = first; i < end;) {
            int64_t key, run = end - i, entry = 0, batch = task_.batch;
            if (task_.list != nullptr) {
                entry = i / block;
                key = task_.list[entry] * block + i % block;
                run = min_of(run, block - i % block);
            } else {
                key = task_.visits.key(i);
                if (i < task_.visits.sinks) run = min_of(run, task_.visits.sinks - i);
            }
            if (key >= task_.keys) break;  // the end of the last block
            run = min_of(run, task_.keys - key);
            int64_t time = key;
            if (p_.block_table != nullptr) {
                batch = p_.block_table[task_.batch * p_.max_pages + key / p_.page_size];
                time = key % p_.page_size;
                run = min_of(run, p_.page_size - time);
            }
            Stored const *k = at<Stored>(p_.k, batch, time, task_.kv_head),
                         *v = at<Stored>(p_.v, batch, time, task_.kv_head);
            for (int64_t n = 0; n < run; ++n, k += p_.k.time, v += p_.v.time) {
                if constexpr (kCodes) {
                    f.k_affine[f.live] = at<T>(p_.k_affine, batch, time + n, task_.kv_head);
                    f.v_affine[f.live] = at<T>(p_.v_affine, batch, time + n, task_.kv_head);
                }
                f.keys[f.live] = key + n, f.entries[f.live] = entry;
                f.k[f.live] = k, f.v[f.live++] = v;
                prefetch(k, p_.K), prefetch(v, p_.V);
            }
            i += run;
        }
        for (int64_t n = f.live; n < kChunk && f.live > 0; ++n) {
            f.k[n] = f.k[0], f.v[n] = f.v[0];
            if constexpr (kCodes) f.k_affine[n] = f.k_affine[0], f.v_affine[n] = f.v_affine[0];
        }
    }

    LSM_INLINE static void prefetch(Stored const* row, int64_t columns) {
        for (int64_t line = 0; line < columns * int64_t(sizeof(Stored)); line += 64)
            __builtin_prefetch(reinterpret_cast<char const*>(row) + line);
    }

    void chunk(Found const& f) {
        if (f.live == 0) return;
        // Codes, many queries, or a row's end: rows are widened once for all.
        if constexpr (!kCodes) {
            bool const whole = p_.K % W == 0 && p_.V % W == 0;
            if (whole && (rows_ <= 2 * kRows || sizeof(Element) == sizeof(T)))
                return attend(f, f.k, f.v);
        }
        T const *k[kChunk], *v[kChunk];
        for (int64_t n = 0; n < kChunk; ++n) k[n] = s_.keys + n * K_, v[n] = s_.values + n * V_;
        for (int64_t n = 0; n < panels(f.live, W) * W; ++n) {
            T *const key = s_.keys + n * K_, *const value = s_.values + n * V_;
            if constexpr (kCodes) {
                widen_codes(key, f.k[n], f.k_affine[n], p_.K, p_.code_bits);
                widen_codes(value, f.v[n], f.v_affine[n], p_.V, p_.code_bits);
            } else {
                widen_row(key, f.k[n], p_.K);
                widen_row(value, f.v[n], p_.V);
            }
        }
        attend(f, k, v);
    }

    template <class In>
    void attend(Found const& f, In const* const* k, In const* const* v) {
        int64_t r = 0;
        for (; r + kRows <= rows_; r += kRows) score<kRows>(r, k, f.live);
        for (; r < rows_; ++r) score<1>(r, k, f.live);
        bool const all_seen = adjust(f);
        for (r = 0; r < rows_; ++r) soften(r, f.live);
        for (r = 0; all_seen && r + kRows <= rows_; r += kRows) add<kRows, true>(r, v, f.live);
        for (; r < rows_; ++r) add<1, false>(r, v, f.live);
    }

    // R rows by as many keys as make a vector of products.
    template <int R, class In>
    LSM_INLINE void score(int64_t r, In const* const* keys, int64_t live) {
        constexpr int N = W / R;
        for (int64_t n = 0; n < live; n += N) {
            Vector<T> sum[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) sum[i] = Vector<T>{};  // "= {}" is a slow memset
            for (int64_t c = 0; c < K_; c += W) {
                Vector<T> q[R];
                for (int j = 0; j < R; ++j) q[j] = load(s_.q + (r + j) * K_ + c);
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) {
                    Vector<T> const k = widen(keys[n + i] + c);
                    for (int j = 0; j < R; ++j) sum[j * N + i] += q[j] * k;
                }
            }
            T sums[W];
            store(sums, sum_each<T>(sum));
            for (int j = 0; j < R; ++j)
                std::memcpy(s_.scores + (r + j) * kChunk + n, sums + j * N, N * sizeof(T));
        }
    }

    // What is added to the products, and -inf for the keys that a query does not see. Whether all are seen.
    bool adjust(Found const& f) {
        AttnMask const& m = p_.mask;
        bool const changed = p_.softcap != 0 || p_.lists.bias != nullptr ||
                             p_.alibi_slopes != nullptr || p_.ramp != nullptr;
        // The usual case: every query sees every key of the chunk.
        if (!changed && m.dilation == 1 && m.head_left == nullptr) {
            auto const seen = [&](int64_t t) {
                return keys_seen(m, first_position_ + t, task_.h0, task_.keys, INFINITY);
            };
            Seen const first = seen(task_.t0), last = seen(task_.t1 - 1);
            bool all = true;
            for (int64_t n = 0; n < f.live; ++n) {
                int64_t const key = f.keys[n];
                all &= key < first.sink_end || (key >= last.begin && key < first.end);
            }
            if (all) return true;
        }
        for (int64_t r = 0; r < rows_; ++r) {
            int64_t const h = head(r), position = first_position_ + query(r);
            int64_t const left = m.head_left != nullptr ? m.head_left[h] : m.left;
            T* const scores = s_.scores + r * kChunk;
            for (int64_t n = 0; n < f.live; ++n) {
                int64_t const x = attn_position(m, f.keys[n]);
                if (!attn_sees(m, left, position, x)) {
                    scores[n] = -INFINITY;
                    continue;
                }
                T s = scores[n];
                T const distance = T(position > x ? position - x : x - position);
                if (p_.softcap != 0) s = T(p_.softcap) * std::tanh(s / T(p_.softcap));
                if (p_.lists.bias != nullptr)
                    s += static_cast<T const*>(p_.lists.bias)[task_.list_at + f.entries[n]];
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
        return false;
    }

    // Scores become weights, and the running sum takes them.
    void soften(int64_t r, int64_t live) {
        T* const p = s_.scores + r * kChunk;
        for (int64_t n = live; n < panels(live, W) * W; ++n) p[n] = -INFINITY;
        Vector<T> most = splat(s_.top[r]);
        for (int64_t n = 0; n < live; n += W) {
            Vector<T> const x = load(p + n);
            most = x <= most ? most : x;  // NaN too
        }
        T top = most[0];
        for (int i = 1; i < W; ++i) top = most[i] <= top ? top : most[i];
        // Nothing was seen so far: all weights are 0.
        Vector<T> const from = splat(top == -INFINITY ? T(0) : top);
        Vector<T> sum{};
        for (int64_t n = 0; n < live; n += W) {
            Vector<T> const e = exp(load(p + n) - from);
            store(p + n, e), sum += e;
        }
        T const keep = s_.keep[r] = top == -INFINITY ? T(1) : std::exp(s_.top[r] - top);
        s_.top[r] = top, s_.sum[r] = s_.sum[r] * keep + sum_lanes<T>(sum);
    }

    // R rows of the output take the chunk's values. kAll: of every key; else not of those whose weight is 0,
    // which need not be numbers.
    template <int R, bool kAll, class In>
    LSM_INLINE void add(int64_t r, In const* const* values, int64_t live) {
        add_columns<R, kRegisters / 2 / R, kAll>(r, 0, values, live);
    }
    template <int R, int N, bool kAll, class In>
    LSM_INLINE void add_columns(int64_t r, int64_t c, In const* const* values, int64_t live) {
        T const* const p = s_.scores + r * kChunk;
        for (; c + N * W <= V_; c += N * W) {
            Vector<T> sum[R][N];
            for (int j = 0; j < R; ++j)
                for (int i = 0; i < N; ++i)
                    sum[j][i] = load(s_.o + (r + j) * V_ + c + i * W) * s_.keep[r + j];
            for (int64_t n = 0; n < live; ++n) {
                if (!kAll && p[n] == 0) continue;
#pragma GCC unroll 16
                for (int i = 0; i < N; ++i) {
                    Vector<T> const v = widen(values[n] + c + i * W);
                    for (int j = 0; j < R; ++j) sum[j][i] += p[j * kChunk + n] * v;
                }
            }
            for (int j = 0; j < R; ++j)
                for (int i = 0; i < N; ++i) store(s_.o + (r + j) * V_ + c + i * W, sum[j][i]);
        }
        if constexpr (N > 1) add_columns<R, N / 2, kAll>(r, c, values, live);
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
        using Element = decltype(element);
        auto const run = [&](auto stored) {
            DecodeWalk<T, Element, decltype(stored)>(p, task, scratch)
                .run(static_cast<T*>(o), static_cast<T*>(lse));
        };
        p.code_bits == 0 ? run(element) : run(uint8_t{});
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
