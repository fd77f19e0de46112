// What tiles of queries are made of: rows from and to memory, one product for all of forward and backward (numbers of one
// matrix, one by one, times vectors of the other), masks, softmaxes, and room.
#pragma once

#include "arena.h"
#include "numbers.h"
#include "sparse_attn_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kLaneCount = int(kQueryLanes);
inline constexpr double kLeastScale = 1e-20;  // so that a sink's logit can be divided by it

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

// e^(s scale - base) to 2^-18 and what base is rounded to, for weights that are rounded to bf16.
template <class T>
LSM_INLINE Vector<T> rough_exp(Vector<T> s, T scale, Vector<T> base) {
#if LSM_CPU_VECTOR_BYTES == 64
    constexpr T kLog2e = T(1.44269504088896340736);
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    Vector<T> const x = s * (scale * kLog2e) - base * kLog2e;
    // What is below the normal numbers is 0, as products take it to be, and hidden keys must not weigh anything. By a mask:
    // a result down there takes the processor ten times as long as everything else. NaN passes.
    __mmask16 const normal = _mm512_cmp_ps_mask(__m512(x), __m512(splat(-126.0f)), _CMP_NLT_UQ);
    Vector<T> const rest = Vector<T>(_mm512_maskz_reduce_ps(0xffff, __m512(x), kDown));
    Vector<T> y = rest * 0.0135341679f + 0.0520114606f;
    y = (y * rest + 0.241442757f) * rest + 0.693003834f;
    y = y * rest + 1.00000259f;
    return Vector<T>(_mm512_maskz_scalef_ps(normal, __m512(y), __m512(x)));
#else
    return exp(s * scale - base);
#endif
}

// Weights are relative to a score at least this near to the largest so far, or to that one where its distance counts: what
// came before seldom has to be multiplied then.
inline double softmax_slack(SparseAttnParams const& p) {
    return p.pv_threshold == 0 ? 8 : 0;
}

// Scores of a vector of queries, a key every kLaneCount numbers, to weights, relative to `most`. What came before is to be
// multiplied with the result. `highest`: of these keys. All are still to be multiplied with `scale`, as differences are: the
// product of a large score is off by more than a whole number. Rough weights go to `pairs`, if it is not null, two keys of
// bf16 side by side.
template <bool kRough = false, class T>
LSM_INLINE Vector<T> soften(T* S, int64_t keys, T scale, T slack, Vector<T>& most, Vector<T>& sum,
                            Vector<T>& highest, [[maybe_unused]] T* pairs = nullptr) {
    Vector<T> const before = most, none = splat(T(-INFINITY));
    Vector<T> part[4] = {none, none, none, none};  // a chain of one would wait for itself
    int64_t first = 0;
    for (; first + 4 <= keys; first += 4)
        for (int i = 0; i < 4; ++i) part[i] = max_of(load(S + (first + i) * kLaneCount), part[i]);
    for (; first < keys; ++first) part[0] = max_of(load(S + first * kLaneCount), part[0]);
    highest = max_of(max_of(part[0], part[1]), max_of(part[2], part[3]));
    most = highest > before + slack ? highest : before;
    Vector<T> const base = most == none ? Vector<T>{} : most;
    Vector<T> total = {};
    auto const weight = [&](int64_t j) {
        Vector<T> const above = load(S + j * kLaneCount) - base;
        return kRough ? rough_exp(above, scale, Vector<T>{}) : exp(above * scale);
    };
    int64_t j = 0;
    if constexpr (kRough && std::is_same_v<T, float>) {
        for (; j < keys && pairs != nullptr; j += 2, pairs += kLaneCount) {
            Vector<T> const one = weight(j), two = j + 1 < keys ? weight(j + 1) : Vector<T>{};
            total += one, total += two;
            store(pairs, Vector<T>(bf16_pairs(one, two)));
        }
    }
    for (; j < keys; ++j) {
        Vector<T> const w = weight(j);
        total += w;
        store(S + j * kLaneCount, w);
    }
    Vector<T> const fade = exp((before - base) * scale);
    sum = sum * fade + total;
    return fade;
}

// Whether the values of keys count whose highest scores are so far above the largest so far, of the first `count` queries
// of a vector.
template <class T>
bool weighs(SparseAttnParams const& p, Vector<T> above, int count) {
    if (p.pv_threshold == 0) return true;
    bool some = false;
    for (int i = 0; i < kLanes<T> && i < count; ++i) some |= above[i] > -T(p.pv_threshold);
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

// In the backward a weight is at most 1, however lse was rounded, or scores summed.
template <class V>
LSM_INLINE V at_most_one(V weight) {
    V const most = V{} + 1;
    return weight > most ? most : weight;
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

// ---- Room ----

// What every tile has: where its queries lie, room for them in rows and for a block of keys and values, and the ways from
// and to memory.
template <class T>
class TileRoom {
  public:
    static constexpr int W = kLanes<T>;

    TileRoom(SparseAttnParams const& p, SparseAttnTask const& task)
        : p_(p),
          task_(task),
          access_(p.dtype),
          block_k_(p.lists.block_k),
          K_(panels(p.K, W) * W),
          V_(panels(p.V, W) * W) {}

    // Where row i of the tile lies. Heads of a token follow each other.
    char* row(Rows const& rows, int i) const {
        return access_.at(rows, task_.batch, task_.first_q + token_ + i / task_.heads, head(i));
    }
    char* row_of(Rows const& rows, int64_t key) const {
        return access_.at(rows, task_.batch, task_.first_k + key, task_.kv_head);
    }
    int64_t head(int i) const { return task_.head + i % task_.heads; }
    // Its place in a [B, Hq, Tq] tensor.
    int64_t scalar(int i) const {
        return (task_.batch * p_.Hq + head(i)) * p_.Tq + task_.first_q + token_ + i / task_.heads;
    }

    // Outputs [lanes()][V()] and what their softmaxes came to.
    void write_outputs(T const* outputs, T const* most, T const* sum) const {
        for (int i = 0; i < lanes_; ++i) {
            access_.write(row(p_.o, i), outputs + i * V_, p_.V);
            static_cast<T*>(p_.lse)[scalar(i)] =
                sum[i] == 0 ? T(-INFINITY) : most[i] + std::log(sum[i]);
        }
    }

    // dO [lanes()][V()] and each row's stats, with `room` for a row; what sink logits take, if they are asked for.
    void read_gradients(T* grad_o, T* lse, T* dot, T* d_sink, T* room) const {
        for (int i = 0; i < lanes_; ++i) {
            RowStats<T> const stats = row_stats<T>(p_, access_, grad_o + i * V_, room,
                                                   row(p_.grad_o, i), row(p_.o, i), V_, scalar(i));
            lse[i] = stats.lse, dot[i] = stats.dot;
            if (d_sink != nullptr) d_sink[i % task_.heads] -= stats.of_sink(p_, head(i));
        }
    }

    // dq [lanes()][K()].
    void write_gradients(T const* dq) const {
        for (int i = 0; i < lanes_; ++i) access_.write(row(p_.dq, i), dq + i * K_, p_.K);
    }

    int lanes() const { return lanes_; }
    int64_t K() const { return K_; }
    int64_t V() const { return V_; }
    T const* queries() const { return queries_; }
    T const* keys() const { return keys_; }
    T const* values() const { return values_; }

  protected:
    void take(Arena<T>& arena, int64_t queries) {
        queries_ = arena.take(queries * K_);
        keys_ = arena.take(block_k_ * K_);
        values_ = arena.take(block_k_ * V_);
    }

    // The tile at `token` of the sequence has fewer queries at the end of the task.
    void place(int64_t token) {
        token_ = token, tokens_ = min_of(tokens_of_tile(p_), task_.end - token);
        lanes_ = int(tokens_ * task_.heads);
    }
    void read_queries(T scale) {
        for (int i = 0; i < lanes_; ++i) access_.read(queries_ + i * K_, row(p_.q, i), p_.K, scale);
    }
    // How far positions of queries are ahead of their numbers.
    int64_t shift() const {
        return p_.mask.offset + (p_.mask.align_end ? task_.keys - task_.queries : 0);
    }
    // Where the list of a query of the tile begins and ends.
    struct List {
        int64_t begin, end;
    };
    List list_of(int64_t token) const {
        BlockLists const& lists = p_.lists;
        int64_t const list_head = task_.head * lists.heads / p_.Hq;
        int64_t const list = (task_.batch * lists.heads + list_head) * lists.rows +
                             task_.first_row + token / lists.block_q;
        if (lists.row_ptr != nullptr) return {lists.row_ptr[list], lists.row_ptr[list + 1]};
        return {list * lists.capacity, (list + 1) * lists.capacity};
    }

    // Keys [first, first + count) of the sequence, and their values.
    void read_keys(int64_t first, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            access_.read(keys_ + j * K_, row_of(p_.k, first + j), p_.K, T(1));
            access_.read(values_ + j * V_, row_of(p_.v, first + j), p_.V, T(1));
        }
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    RowAccess<T> access_;
    int64_t block_k_, K_, V_;
    T *queries_, *keys_, *values_;

    int64_t token_, tokens_;  // of the tile
    int lanes_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
