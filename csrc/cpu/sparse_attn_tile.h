// A tile of queries and the blocks of keys they see. Queries lie in lanes, so that a softmax is element-wise over
// keys; keys and values lie in rows as in memory, so that nothing but queries is turned. One product serves all:
// numbers of one matrix, one by one, times vectors of the other.
#pragma once

#include "arena.h"
#include "numbers.h"
#include "sparse_attn_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kLaneCount = int(kQueryLanes);

// Rows of numbers in the accumulation type, a multiple of whole vectors long, zero-filled.
template <class T, class In>
void read_row(T* dst, void const* src, int64_t columns, T scale) {
    constexpr int W = kLanes<T>;
    In const* row = static_cast<In const*>(src);
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(dst + c, widen(row + c) * scale);
    if (c < columns) store(dst + c, widen_first<T>(row + c, columns - c) * scale);
}

template <class T, class Out>
void write_row(void* dst, T const* src, int64_t columns) {
    constexpr int W = kLanes<T>;
    Out* row = static_cast<Out*>(dst);
    int64_t c = 0;
    for (; c + W <= columns; c += W) narrow(row + c, load(src + c));
    if (c < columns) narrow_first<T>(row + c, load(src + c), columns - c);
}

// Rows of one dtype in memory; which one is settled once.
template <class T>
struct RowAccess {
    explicit RowAccess(Dtype dtype) : bytes(bytes_of(dtype)) {
        with_element<T>(dtype, [&](auto zero) {
            read = read_row<T, decltype(zero)>, write = write_row<T, decltype(zero)>;
        });
    }
    char* at(Rows const& rows, int64_t batch, int64_t token, int64_t head) const {
        return static_cast<char*>(rows.data) +
               (batch * rows.batch + token * rows.time + head * rows.head) * bytes;
    }

    int64_t bytes;
    void (*read)(T*, void const*, int64_t, T);
    void (*write)(void*, T const*, int64_t);
};

// ---- Products ----

// C[r][n] = (C[r][n] +) sum over k of A(r, k) B[k][n], R rows by N vectors. A(r, k) is A[k * step + r] if kColumns,
// else A[r * step + k].
template <int R, int N, bool kColumns, class T>
LSM_INLINE void multiply_tile(T* C, int64_t c_row, T const* A, int64_t step, T const* B,
                              int64_t b_row, int64_t depth, bool add) {
    constexpr int W = kLanes<T>;
    Vector<T> sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] = add ? load(C + r * c_row + n * W) : Vector<T>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vector<T> b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = load(B + k * b_row + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            T const a = kColumns ? A[k * step + r] : A[r * step + k];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[r][n] += a * b[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(C + r * c_row + n * W, sum[r][n]);
    }
}

template <int N, bool kColumns, class T>
void multiply_rows(T* C, int64_t c_row, T const* A, int64_t step, T const* B, int64_t b_row,
                   int64_t rows, int64_t depth, bool add) {
    constexpr int R = N == 1 ? 8 : 4;
    int64_t const next = kColumns ? 1 : step;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        multiply_tile<R, N, kColumns>(C + r * c_row, c_row, A + r * next, step, B, b_row, depth,
                                      add);
    for (; r < rows; ++r)
        multiply_tile<1, N, kColumns>(C + r * c_row, c_row, A + r * next, step, B, b_row, depth,
                                      add);
}

// The same for `vectors` vectors of columns.
template <bool kColumns, class T>
void multiply(T* C, int64_t c_row, T const* A, int64_t step, T const* B, int64_t b_row,
              int64_t rows, int64_t vectors, int64_t depth, bool add) {
    constexpr int W = kLanes<T>, kMost = kRegisters == 32 ? 4 : 2;
    int64_t v = 0;
    for (; v + kMost <= vectors; v += kMost)
        multiply_rows<kMost, kColumns>(C + v * W, c_row, A, step, B + v * W, b_row, rows, depth,
                                       add);
    if (kMost == 4 && v + 2 <= vectors) {
        multiply_rows<2, kColumns>(C + v * W, c_row, A, step, B + v * W, b_row, rows, depth, add);
        v += 2;
    }
    for (; v < vectors; ++v)
        multiply_rows<1, kColumns>(C + v * W, c_row, A, step, B + v * W, b_row, rows, depth, add);
}

// C += as above, where `finite` tells whether what is weighed (one of A and B, the weights being the other) is finite; if
// not, a weight of 0 adds nothing, rather than 0 times inf.
template <bool kColumns, bool kWeightsLeft = !kColumns, class T>
void add_weighed(bool finite, T* C, int64_t c_row, T const* A, int64_t step, T const* B,
                 int64_t b_row, int64_t rows, int64_t vectors, int64_t depth) {
    if (finite) return multiply<kColumns>(C, c_row, A, step, B, b_row, rows, vectors, depth, true);
    constexpr int W = kLanes<T>;
    for (int64_t k = 0; k < depth; ++k) {
        for (int64_t r = 0; r < rows; ++r) {
            T const a = kColumns ? A[k * step + r] : A[r * step + k];
            if (kWeightsLeft && a == 0) continue;
            for (int64_t n = 0; n < vectors * W; n += W) {
                Vector<T> const b = load(B + k * b_row + n), none = {};
                Vector<T> const x = kWeightsLeft ? a * b : b == none ? none : a * b;
                store(C + r * c_row + n, load(C + r * c_row + n) + x);
            }
        }
    }
}

// Whether whole vectors of numbers are.
template <class T>
bool all_finite(T const* x, int64_t count) {
    constexpr int W = kLanes<T>;
    Vector<T> zero[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int n = 0; n < 4; ++n) zero[n] += load(x + i + n * W) * T(0);
    for (; i < count; i += W) zero[0] += load(x + i) * T(0);
    return sum_lanes<T>(zero[0] + zero[1] + zero[2] + zero[3]) == 0;
}

// dst[c][lane] = src[lane][c]; both sides in whole vectors.
template <class T>
void turn(T* dst, int64_t dst_row, T const* src, int64_t src_row, int64_t rows, int64_t columns) {
    constexpr int W = kLanes<T>;
    for (int64_t r = 0; r < rows; r += W) {
        for (int64_t c = 0; c < columns; c += W) {
            Vector<T> x[W];
            for (int i = 0; i < W; ++i) x[i] = load(src + (r + i) * src_row + c);
            transpose<T>(x);
            for (int i = 0; i < W; ++i) store(dst + (c + i) * dst_row + r, x[i]);
        }
    }
}

// ---- Masks ----

// Keys that a query sees by its position: [0, sink_end) and [begin, end).
struct Seen {
    int64_t sink_end, begin, end;
};

// Keys before position x, of `keys`.
inline int64_t keys_before(AttnMask const& m, int64_t x, int64_t keys) {
    return clamped(attn_key_from(m, x), 0, keys);
}

// `reach`: keys at that distance or farther have no weight.
inline Seen keys_seen(AttnMask const& m, int64_t p, int64_t head, int64_t keys, double reach) {
    int64_t last = keys;
    if (m.causal) {
        int64_t const own = (floor_div(p, m.causal_block) + 1) * m.causal_block;
        last = keys_before(m, max_of(m.prefix, own), keys);
    }
    int64_t const left = m.head_left != nullptr ? m.head_left[head] : m.left;
    Seen s{0, 0, last};
    if (left >= 0) s.begin = keys_before(m, p - left, keys);
    if (m.right >= 0) s.end = min_of(s.end, keys_before(m, p + m.right + 1, keys));
    if (left >= 0 || m.right >= 0 || m.dilation > 1)
        s.sink_end = min_of(last, keys_before(m, m.sinks, keys));
    if (reach < 1e15) {
        s.begin = max_of(s.begin, keys_before(m, p + int64_t(std::floor(-reach)) + 1, keys));
        s.end = min_of(s.end, keys_before(m, p + int64_t(std::ceil(reach)), keys));
    }
    s.end = max_of(s.begin, s.end);
    return s;
}

// ---- Softmax ----

// Scores of a vector of queries, a key every kLaneCount numbers, to weights, relative to the largest score so far. What
// came before is to be multiplied with the result. `highest`: of these keys.
template <class T>
LSM_INLINE Vector<T> soften(T* S, int64_t keys, Vector<T>& most, Vector<T>& sum,
                            Vector<T>& highest) {
    Vector<T> const before = most, none = splat(T(-INFINITY));
    highest = none;
    for (int64_t j = 0; j < keys; ++j) highest = max_of(load(S + j * kLaneCount), highest);
    most = max_of(highest, before);
    Vector<T> const base = most == none ? Vector<T>{} : most;
    Vector<T> total = {};
    for (int64_t j = 0; j < keys; ++j) {
        Vector<T> const weight = exp(load(S + j * kLaneCount) - base);
        total += weight;
        store(S + j * kLaneCount, weight);
    }
    Vector<T> const fade = exp(before - base);
    sum = sum * fade + total;
    return fade;
}

// Whether the values of keys with these highest scores count, of the first `count` queries of a vector.
template <class T>
bool weighs(SparseAttnParams const& p, Vector<T> highest, Vector<T> most, int count) {
    if (p.pv_threshold == 0) return true;
    bool some = false;
    for (int i = 0; i < kLanes<T> && i < count; ++i)
        some |= highest[i] - most[i] > -T(p.pv_threshold);
    return some;
}

// Largest score and sum of weights of a row before any key: a sink's, if there are sinks.
template <class T>
void start_row(SparseAttnParams const& p, int64_t head, T& most, T& sum) {
    most = T(-INFINITY), sum = 0;
    if (p.sink_logits == nullptr) return;
    most = static_cast<T const*>(p.sink_logits)[head];
    sum = most > T(-INFINITY) ? 1 : 0;
}

// What a row's gradients need beside it: its lse, 0 if it sees nothing, and D = sum dO O - dlse.
template <class T>
struct RowStats {
    T lse, dot;
    bool blind;

    // What the row takes from a sink logit's gradient.
    T of_sink(SparseAttnParams const& p, int64_t head) const {
        T const sink = static_cast<T const*>(p.sink_logits)[head];
        return blind ? T(0) : std::exp(sink - lse) * dot;
    }
};

// Of one row, whose dO is read to `grad_o`; `room` for as many numbers. `scalar`: its place in a [B, Hq, Tq] tensor.
template <class T>
RowStats<T> row_stats(SparseAttnParams const& p, RowAccess<T> const& access, T* grad_o, T* room,
                      void const* grad_o_row, void const* o_row, int64_t columns, int64_t scalar) {
    constexpr int W = kLanes<T>;
    access.read(grad_o, grad_o_row, p.V, T(1));
    access.read(room, o_row, p.V, T(1));
    Vector<T> sum = {};
    for (int64_t c = 0; c < columns; c += W) sum += load(grad_o + c) * load(room + c);
    T dot = sum_lanes<T>(sum);
    if (p.grad_lse != nullptr) dot -= static_cast<T const*>(p.grad_lse)[scalar];
    T const lse = static_cast<T const*>(p.lse)[scalar];
    bool const blind = lse == T(-INFINITY);
    return {blind ? T(0) : lse, dot, blind};
}

// ---- The tile ----

// A run of lane vectors.
struct Run {
    int begin, end;
};

template <class T>
class AttnTile {
  public:
    static constexpr int W = kLanes<T>, kVectors = kLaneCount / W;

    AttnTile(SparseAttnParams const& p, SparseAttnTask const& task)
        : p_(p),
          task_(task),
          access_(p.dtype),
          block_k_(p.lists.block_k),
          K_(panels(p.K, W) * W),
          V_(panels(p.V, W) * W) {}

    // Places for a block of keys and values, and for a tile of queries in rows and in lanes.
    void take(Arena<T>& arena) {
        queries_ = arena.take(kLaneCount * K_);
        turned_ = arena.take(K_ * kLaneCount);
        keys_ = arena.take(block_k_ * K_);
        values_ = arena.take(block_k_ * V_);
    }

    // Queries of the tile at `token` of the sequence; fewer at the end of the task.
    void start(int64_t token) {
        token_ = token;
        tokens_ = min_of(tokens_of_tile(p_), task_.end - token);
        lanes_ = int(tokens_ * task_.heads);
        vectors_ = (lanes_ + W - 1) / W;
        std::memset(queries_, 0, size_t(vectors_ * W * K_) * sizeof(T));
        for (int i = 0; i < lanes_; ++i)
            access_.read(queries_ + i * K_, row(p_.q, i), p_.K, T(p_.scale));
        turn(turned_, kLaneCount, queries_, K_, vectors_ * W, K_);
        find_bounds();
        find_lists();
    }

    // The next block that any query sees: false after the last one.
    bool next() {
        for (;;) {
            if (!next_block()) return false;
            first_ = block_ * block_k_;
            count_ = min_of(block_k_, task_.keys - first_);
            if (visible()) return true;
        }
    }

    // Keys and values of the block, of which [from, from + size()) are seen by any.
    void read_keys() {
        for (int64_t j = 0; j < size_; ++j) {
            int64_t const token = task_.first_k + first_ + from_ + j;
            access_.read(keys_ + j * K_, access_.at(p_.k, task_.batch, token, task_.kv_head), p_.K,
                         T(1));
            access_.read(values_ + j * V_, access_.at(p_.v, task_.batch, token, task_.kv_head),
                         p_.V, T(1));
        }
    }

    // Scores of the block, [size()][lanes], -inf where a query does not see a key; with a softcap `capped` keeps
    // tanh(s / softcap), if it is not null.
    void scores(T* S, T* capped) const {
        over_runs([&](Run run) {
            multiply<false>(S + run.begin * W, kLaneCount, keys_, K_, turned_ + run.begin * W,
                            kLaneCount, size_, run.end - run.begin, p_.K, false);
            for (int v = run.begin; v < run.end; ++v) {
                if (p_.softcap > 0) cap(S, capped, v);
                if (p_.lists.bias != nullptr) add_bias(S, v);
                if (p_.alibi_slopes != nullptr) add_slope(S, v);
                if (p_.ramp != nullptr) add_ramp(S, v);
                if (!full_[v]) mask(S, v);
            }
        });
    }

    template <class F>
    void over_runs(F const& f) const {
        for (int r = 0; r < runs_; ++r) f(run_[r]);
    }

    // f(entry of the lists, first lane, last lane) for every row of the lists that has the block.
    template <class F>
    void over_entries(F const& f) const {
        for (int r = 0; r < rows_; ++r)
            if (member_[r])
                f(entry_[r], r * lanes_of_row_, min_of((r + 1) * lanes_of_row_, lanes_));
    }

    // Where row i of the tile lies.
    char* row(Rows const& rows, int i) const {
        return access_.at(rows, task_.batch, task_.first_q + token_ + i / task_.heads, head(i));
    }
    int64_t head(int i) const { return task_.head + i % task_.heads; }
    // Its place in a [B, Hq, Tq] tensor.
    int64_t scalar(int i) const {
        return (task_.batch * p_.Hq + head(i)) * p_.Tq + task_.first_q + token_ + i / task_.heads;
    }

    // |p - x| of the queries of vector v and key j of the block.
    Vector<T> distance(int v, int64_t j) const {
        Vector<T> const d = load(relative_ + v * W) - T((from_ + j) * p_.mask.key_stride);
        return d < T(0) ? -d : d;
    }
    // The ramp before it is clamped.
    Vector<T> ramp(int v, int64_t j) const {
        T const length = T(p_.ramp_length);
        return (length + load(ramp_ + v * W) - distance(v, j)) / length;
    }

    // Whether some query does not see some key of the block.
    bool partial() const {
        bool some = false;
        over_runs([&](Run run) {
            for (int v = run.begin; v < run.end; ++v) some = some || !full_[v];
        });
        return some || p_.ramp != nullptr;
    }
    bool finite_keys() const { return all_finite(keys_, size_ * K_); }
    bool finite_values() const { return all_finite(values_, size_ * V_); }
    bool finite_queries() const { return all_finite(queries_, vectors_ * W * K_); }

    int64_t key() const { return first_ + from_; }  // of the sequence
    int64_t size() const { return size_; }
    int lanes() const { return lanes_; }
    int vectors() const { return vectors_; }
    int64_t K() const { return K_; }
    int64_t V() const { return V_; }
    RowAccess<T> const& access() const { return access_; }
    T const* queries() const { return queries_; }
    T const* keys() const { return keys_; }
    T const* values() const { return values_; }

  private:
    T const* number(void const* per_head, int64_t h) const {
        return static_cast<T const*>(per_head) + h;
    }

    void find_bounds() {
        AttnMask const& m = p_.mask;
        int64_t const shift = m.offset + (m.align_end ? task_.keys - task_.queries : 0);
        extent_ = {0, task_.keys, 0};
        sinks_most_ = 0, begin_most_ = 0, end_least_ = task_.keys;
        for (int i = 0; i < vectors_ * W; ++i) {
            int const of = min_of(i, lanes_ - 1);  // lanes without a query take after the last one
            int64_t const h = head(of), p = token_ + of / task_.heads + shift;
            double reach = INFINITY;
            if (p_.alibi_slopes != nullptr) slope_[i] = *number(p_.alibi_slopes, h);
            if (p_.ramp != nullptr) {
                ramp_[i] = *number(p_.ramp, h);
                reach = p_.ramp_length + double(ramp_[i]);
            }
            position_[i] = p;
            if (m.dilation > 1) phase_[i] = T(p - floor_div(p, m.dilation) * m.dilation);
            Seen const s = seen_[i] = keys_seen(m, p, h, task_.keys, reach);
            extent_.begin = min_of(extent_.begin, s.begin);
            extent_.end = max_of(extent_.end, s.end);
            sinks_most_ = max_of(sinks_most_, s.sink_end);
            begin_most_ = max_of(begin_most_, s.begin);
            end_least_ = min_of(end_least_, s.end);
        }
        extent_.sink_end = sinks_most_;
    }

    void find_lists() {
        BlockLists const& lists = p_.lists;
        block_ = -1;
        if (lists.index == nullptr) {
            rows_ = 0;
            return;
        }
        int64_t const tokens = min_of(lists.block_q, tokens_of_tile(p_));
        rows_ = int((tokens_ + tokens - 1) / tokens);
        lanes_of_row_ = int(tokens * task_.heads);
        int64_t const list_head = task_.head * lists.heads / p_.Hq;
        for (int r = 0; r < rows_; ++r) {
            int64_t const list = (task_.batch * lists.heads + list_head) * lists.rows +
                                 task_.first_row + (token_ + r * tokens) / lists.block_q;
            entry_[r] = lists.row_ptr != nullptr ? lists.row_ptr[list] : list * lists.capacity;
            last_[r] =
                lists.row_ptr != nullptr ? lists.row_ptr[list + 1] : entry_[r] + lists.capacity;
            --entry_[r];
            member_[r] = true;  // so that next_block advances it
        }
    }

    // The smallest block beyond the last one in any row's list.
    bool next_block() {
        if (p_.lists.index == nullptr) {
            ++block_;
            int64_t const sink_blocks = (extent_.sink_end + block_k_ - 1) / block_k_;
            if (block_ >= sink_blocks) block_ = max_of(block_, extent_.begin / block_k_);
            return block_ * block_k_ < max_of(extent_.end, extent_.sink_end);
        }
        int64_t least = INT64_MAX;
        for (int r = 0; r < rows_; ++r) {
            if (member_[r]) ++entry_[r];
            if (int64_t const block = listed(r); block >= 0) least = min_of(least, block);
        }
        for (int r = 0; r < rows_; ++r) member_[r] = least != INT64_MAX && listed(r) == least;
        block_ = least;
        return least != INT64_MAX;
    }
    int64_t listed(int r) const { return entry_[r] < last_[r] ? p_.lists.index[entry_[r]] : -1; }

    // Which vectors of queries see any key of the block, and whether they see all; false if none does.
    bool visible() {
        bool const dilated = p_.mask.dilation > 1;
        bool every = true;
        for (int r = 0; r < rows_; ++r) every = every && member_[r];
        for (int i = 0; i < vectors_ * W; ++i)
            relative_[i] = T(position_[i] - first_ * p_.mask.key_stride - p_.mask.key_length + 1);
        if (every && !dilated && begin_most_ <= first_ && first_ + count_ <= end_least_) {
            run_[0] = {0, vectors_};
            runs_ = 1, from_ = 0, size_ = count_;
            for (int v = 0; v < vectors_; ++v) full_[v] = true;
            return true;
        }
        int64_t from = count_, to = 0;
        bool any[kVectors];
        for (int v = 0; v < vectors_; ++v) {
            any[v] = false, full_[v] = !dilated;
            for (int i = v * W; i < (v + 1) * W; ++i) {
                bool const in = rows_ == 0 || member_[min_of(i / lanes_of_row_, rows_ - 1)];
                auto const relative = [&](int64_t key) {
                    return in ? clamped(key - first_, 0, count_) : 0;
                };
                int64_t const sink = relative(seen_[i].sink_end);
                int64_t const begin = relative(seen_[i].begin), end = relative(seen_[i].end);
                sink_end_[i] = T(sink), begin_[i] = T(begin), end_[i] = T(end);
                full_[v] = full_[v] && (sink == count_ || (begin == 0 && end == count_));
                if (sink > 0) from = 0, to = max_of(to, sink);
                if (end > begin) from = min_of(from, begin), to = max_of(to, end);
                any[v] = any[v] || sink > 0 || end > begin;
            }
        }
        from_ = from, size_ = to - from, runs_ = 0;
        for (int v = 0; v < vectors_; ++v) {
            if (!any[v]) continue;
            if (runs_ > 0 && run_[runs_ - 1].end == v) {
                run_[runs_ - 1].end = v + 1;
            } else {
                run_[runs_++] = {v, v + 1};
            }
        }
        return runs_ > 0;
    }

    void mask(T* S, int v) const {
        AttnMask const& m = p_.mask;
        Vector<T> const sink = load(sink_end_ + v * W), begin = load(begin_ + v * W),
                        end = load(end_ + v * W), phase = load(phase_ + v * W);
        Vector<T> const hidden = splat(T(-INFINITY));
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            T const at = T(from_ + j);
            Vector<T> x = load(s);
            Vector<T> near = begin <= at ? x : hidden;
            near = at < end ? near : hidden;
            if (m.dilation > 1) {
                int64_t const pos = (first_ + from_ + j) * m.key_stride + m.key_length - 1;
                near = phase == T(pos % m.dilation) ? near : hidden;
            }
            store(s, at < sink ? x : near);
        }
    }

    void cap(T* S, T* capped, int v) const {
        T const size = T(p_.softcap);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            Vector<T> const x = hyperbolic_tangent(load(s) / size);
            if (capped != nullptr) store(capped + j * kLaneCount + v * W, x);
            store(s, x * size);
        }
    }

    void add_bias(T* S, int v) const {
        T bias[kLaneCount] = {};
        over_entries([&](int64_t entry, int begin, int end) {
            for (int i = begin; i < end; ++i) bias[i] = *number(p_.lists.bias, entry);
        });
        Vector<T> const b = load(bias + v * W);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            store(s, load(s) + b);
        }
    }

    void add_slope(T* S, int v) const {
        Vector<T> const slope = load(slope_ + v * W);
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            store(s, load(s) - slope * distance(v, j));
        }
    }

    void add_ramp(T* S, int v) const {
        for (int64_t j = 0; j < size_; ++j) {
            T* const s = S + j * kLaneCount + v * W;
            Vector<T> const factor = ramp(v, j);
            Vector<T> x = load(s);
            for (int i = 0; i < W; ++i) {
                if (factor[i] >= T(1)) continue;
                x[i] = factor[i] > T(0) ? x[i] + std::log(factor[i]) : T(-INFINITY);
            }
            store(s, x);
        }
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    RowAccess<T> access_;
    int64_t block_k_, K_, V_;
    T *queries_, *turned_, *keys_, *values_;

    // Of the tile.
    int64_t token_, tokens_;
    int lanes_, vectors_;
    Seen seen_[kLaneCount], extent_;  // of each query, and of all together
    int64_t position_[kLaneCount], sinks_most_, begin_most_, end_least_;
    T slope_[kLaneCount], ramp_[kLaneCount], phase_[kLaneCount];
    int rows_, lanes_of_row_ = 1;
    int64_t entry_[kLaneCount], last_[kLaneCount];
    bool member_[kLaneCount];

    // Of the block.
    int64_t block_, first_, count_, from_, size_;
    T relative_[kLaneCount];  // positions, from that of the block's first key
    T sink_end_[kLaneCount], begin_[kLaneCount], end_[kLaneCount];
    bool full_[kVectors];
    Run run_[kVectors];
    int runs_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
