// Scores of blocks for one instruction set (see chunk_tier.h for what the including file has chosen): products of a few
// rows' members with all keys, kept in a thread's scratch until they have become the few numbers of their row.
#pragma once

#include "arena.h"
#include "block_select_kernels.h"
#include "numbers.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kScoreKeys = 32;     // whose rows are widened once for all members of a tile
constexpr int64_t kScoreMembers = 16;  // of a tile

template <class T>
int64_t whole_vectors(int64_t columns) {
    return panels(columns, kLanes<T>) * kLanes<T>;
}

template <class T, class Element>
void widened(T* to, Element const* from, int64_t columns, T scale = 1) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= columns; c += W) store(to + c, widen(from + c) * scale);
    if (c < columns) store(to + c, widen_first<T>(from + c, columns - c) * scale);
}

// ---- Pooling ----

// Columns [c, c + kVectors vectors) of one window, its tokens one after another. `columns`: of them, that there are.
template <class T, int kVectors, Pool kPool, class Element>
LSM_INLINE void pool_columns(Element const* x, int64_t time, int64_t count, int64_t columns,
                             Element* high_to, Element* low_to) {
    constexpr int W = kLanes<T>;
    constexpr bool kHigh = kPool != Pool::min, kLow = kPool == Pool::min || kPool == Pool::bounds;
    bool const whole = columns == kVectors * W;
    auto const read = [&](int64_t i, int n) {
        Element const* const from = x + i * time + n * W;
        return whole ? widen(from) : widen_first<T>(from, columns - n * W);
    };
    Vector<T> high[kVectors] = {}, low[kVectors] = {};
    if (count > 0) {
        for (int n = 0; n < kVectors; ++n) high[n] = low[n] = read(0, n);
    }
    for (int64_t i = 1; i < count; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) {
            Vector<T> const v = read(i, n);
            if constexpr (kPool == Pool::mean) {
                high[n] += v;
            } else {
                if constexpr (kHigh) high[n] = max_of(high[n], v);
                if constexpr (kLow) low[n] = -max_of(-low[n], -v);
            }
        }
    }
    auto const write = [&](Element* to, int n, Vector<T> v) {
        to += n * W;
        if (whole) {
            narrow(to, v);
        } else {
            narrow_first<T>(to, v, columns - n * W);
        }
    };
    for (int n = 0; n < kVectors; ++n) {
        if constexpr (kPool == Pool::mean) {
            if (count > 0) high[n] = high[n] / T(count);
        }
        if constexpr (kHigh) write(high_to, n, high[n]);
        if constexpr (kLow) write(low_to, n, low[n]);
    }
}

template <class T, Pool kPool, class Element>
void pool_window(PoolParams const& p, int64_t batch, int64_t first, int64_t count, int64_t row) {
    constexpr int W = kLanes<T>, kTogether = 8;
    bool const one = p.x.head == p.K && kPool != Pool::bounds;  // heads that lie side by side
    int64_t const heads = one ? 1 : p.H, width = one ? p.H * p.K : p.K;
    for (int64_t h = 0; h < heads; ++h) {
        Element const* const x = static_cast<Element const*>(p.x.data) + batch * p.x.batch +
                                 first * p.x.time + h * p.x.head;
        Element* const y =
            static_cast<Element*>(p.y.data) + batch * p.y.batch + row * p.y.time + h * p.y.head;
        Element* const low = kPool == Pool::bounds ? y + p.K : y;
        int64_t c = 0;
        for (; c + kTogether * W <= width; c += kTogether * W)
            pool_columns<T, kTogether, kPool>(x + c, p.x.time, count, kTogether * W, y + c,
                                              low + c);
        for (; c < width; c += W)
            pool_columns<T, 1, kPool>(x + c, p.x.time, count, min_of(W, width - c), y + c, low + c);
    }
}

template <class T, class Element>
void pool_kind(PoolParams const& p, int64_t batch, int64_t first, int64_t count, int64_t row) {
    switch (p.pool) {
        case Pool::mean:
            return pool_window<T, Pool::mean, Element>(p, batch, first, count, row);
        case Pool::max:
            return pool_window<T, Pool::max, Element>(p, batch, first, count, row);
        case Pool::min:
            return pool_window<T, Pool::min, Element>(p, batch, first, count, row);
        case Pool::bounds:
            return pool_window<T, Pool::bounds, Element>(p, batch, first, count, row);
    }
}

void pool(PoolParams const& p, int64_t batch, int64_t first, int64_t count, int64_t row) {
    with_types(p.dtype, [&](auto zero, auto element) {
        pool_kind<decltype(zero), decltype(element)>(p, batch, first, count, row);
    });
}

// Whole vectors as they are, the last one of a row in part.
template <class T, class Element>
LSM_INLINE Vector<T> widen_some(Element const* from, int64_t count) {
    return count >= kLanes<T> ? widen(from) : widen_first<T>(from, count);
}

template <class T, class Element>
void share_window(PoolParams const& p, T* shares, int64_t batch, int64_t first, int64_t count,
                  int64_t row) {
    constexpr int W = kLanes<T>;
    int64_t const parts = p.pool == Pool::bounds ? 2 : 1;
    Vector<T> const zero = {}, one = splat<T>(1);
    for (int64_t i = 0; i < p.H * parts; ++i) {
        int64_t const h = i / parts, column = i % parts * p.K;
        Element const* const x = static_cast<Element const*>(p.x.data) + batch * p.x.batch +
                                 first * p.x.time + h * p.x.head;
        auto const row_of = [&](Rows const& rows) {
            return static_cast<Element const*>(rows.data) + batch * rows.batch + row * rows.time +
                   h * rows.head + column;
        };
        Element const *const y = row_of(p.y), *const grad = row_of(p.grad_y);
        T* const to = shares + (((batch * p.blocks + row) * p.H + h) * parts) * p.K + column;
        for (int64_t c = 0; c < p.K; c += W) {
            int64_t const width = p.K - c;
            Vector<T> among = splat<T>(T(count > 0 ? count : 1));
            if (p.pool != Pool::mean) {
                Vector<T> const best = widen_some<T>(y + c, width);
                Vector<T> ties = zero;
                for (int64_t t = 0; t < count; ++t)
                    ties += widen_some<T>(x + t * p.x.time + c, width) == best ? one : zero;
                among = max_of(ties, one);
            }
            Vector<T> const share = widen_some<T>(grad + c, width) / among;
            if (width >= W) {
                store(to + c, share);
            } else {
                narrow_first<T>(to + c, share, width);
            }
        }
    }
}

template <class T, bool kMean, class Element>
void collect_token(PoolParams const& p, T const* shares, int64_t batch, int64_t time, int64_t first,
                   int64_t last) {
    constexpr int W = kLanes<T>;
    int64_t const parts = p.pool == Pool::bounds ? 2 : 1, columns = parts * p.K;
    for (int64_t h = 0; h < p.H; ++h) {
        auto const row_of = [&](Rows const& rows, int64_t at) {
            return static_cast<Element*>(rows.data) + batch * rows.batch + at * rows.time +
                   h * rows.head;
        };
        Element const* const x = row_of(p.x, time);
        Element* const to = row_of(p.dx, time);
        for (int64_t c = 0; c < p.K; c += W) {
            int64_t const width = p.K - c;
            Vector<T> const zero = {}, own = kMean ? zero : widen_some<T>(x + c, width);
            Vector<T> sum = zero;
            for (int64_t row = first; row < last; ++row) {
                T const* const share = shares + ((batch * p.blocks + row) * p.H + h) * columns + c;
                Element const* const y = row_of(p.y, row) + c;
                for (int64_t n = 0; n < columns; n += p.K) {
                    Vector<T> const some = widen_some<T>(share + n, width);
                    if constexpr (kMean) {
                        sum += some;
                    } else {
                        sum += widen_some<T>(y + n, width) == own ? some : zero;
                    }
                }
            }
            if (width >= W) {
                narrow(to + c, sum);
            } else {
                narrow_first<T>(to + c, sum, width);
            }
        }
    }
}

void share(PoolParams const& p, void* shares, int64_t batch, int64_t first, int64_t count,
           int64_t row) {
    with_types(p.dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        share_window<T, decltype(element)>(p, static_cast<T*>(shares), batch, first, count, row);
    });
}

void collect(PoolParams const& p, void const* shares, int64_t batch, int64_t time, int64_t first,
             int64_t last) {
    with_types(p.dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        auto const run = p.pool == Pool::mean ? collect_token<T, true, decltype(element)>
                                              : collect_token<T, false, decltype(element)>;
        run(p, static_cast<T const*>(shares), batch, time, first, last);
    });
}

// ---- Scores ----

template <class T>
struct ScoreScratch {
    ScoreScratch(ScoreParams const& p, void* memory) : arena(memory) {
        int64_t const K = whole_vectors<T>(p.K), keys = whole_vectors<T>(p.Tk) + kScoreKeys;
        q = arena.take(kScoreMembers * K), k = arena.take(kScoreKeys * K);
        products = arena.take(kScoreMembers * keys), weights = arena.take(keys);
    }
    Arena<T> arena;
    T *q, *k;     // [kScoreMembers][K padded], [kScoreKeys][K padded]
    T* products;  // [kScoreMembers][keys padded]
    T* weights;   // [keys padded], of a row
};

template <class T, class Element>
class ScoreWalk {
  public:
    static constexpr int W = kLanes<T>;

    ScoreWalk(ScoreParams const& p, BlockTask const& task, void* scratch)
        : p_(p),
          task_(task),
          s_(p, scratch),
          K_(whole_vectors<T>(p.K)),
          stride_(whole_vectors<T>(p.Tk) + kScoreKeys),
          group_(p.Hq / p.Hk),
          heads_(p.group ? group_ : 1) {}

    // Rows are taken in tiles that share the keys' widening, as far as their members fit.
    void run(T* scores) {
        int64_t const members = p_.block_q * heads_;
        int64_t const together = members >= kScoreMembers ? 1 : kScoreMembers / members;
        for (int64_t r = task_.first; r < task_.last; r += together) {
            int64_t const rows = min_of(together, task_.last - r);
            T* const out = scores + (r - task_.first) * p_.blocks;
            if (members <= kScoreMembers) {
                tile(r, 0, rows * members);
                for (int64_t i = 0; i < rows; ++i) {
                    BlockRow const row = block_row(p_, task_.sequence, r + i);
                    clear(row);
                    add(row, i * members, 0, members);
                    finish(row, out + i * p_.blocks);
                }
            } else {
                BlockRow const row = block_row(p_, task_.sequence, r);
                clear(row);
                for (int64_t m = 0; m < members; m += kScoreMembers) {
                    int64_t const count = min_of(kScoreMembers, members - m);
                    tile(r, m, count);
                    add(row, 0, m, count);
                }
                finish(row, out);
            }
        }
    }

  private:
    int64_t key_head() const { return p_.group ? task_.head : task_.head / group_; }
    int64_t head(int64_t member) const {
        return p_.group ? task_.head * group_ + member % heads_ : task_.head;
    }

    // Member m of a row: its query, or the row's end.
    int64_t query(BlockRow const& row, int64_t member) const {
        return row.q_begin + member / heads_;
    }
    int64_t seen(BlockRow const& row, int64_t member) const {
        return block_keys_seen(p_, row, block_position(p_, row, row.t0 + member / heads_));
    }

    // Products of `count` members, from member m of row r on, with the keys that any of them sees.
    void tile(int64_t r, int64_t m, int64_t count) {
        int64_t const members = p_.block_q * heads_;
        int64_t most = 0;
        BlockRow row = block_row(p_, task_.sequence, r);
        for (int64_t i = 0; i < count; ++i) {
            int64_t const own = (m + i) % members;
            if (own == 0 && i > 0) row = block_row(p_, task_.sequence, r + (m + i) / members);
            int64_t const t = query(row, own);
            T* const q = s_.q + i * K_;
            if (t >= row.q_end) {
                for (int64_t c = 0; c < K_; c += W) store(q + c, Vector<T>{});
                continue;
            }
            Element const* const from = static_cast<Element const*>(p_.q.data) +
                                        row.batch * p_.q.batch + t * p_.q.time +
                                        head(own) * p_.q.head;
            widened(q, from, p_.K, T(p_.scale));
            int64_t const keys = seen(row, own);
            most = keys > most ? keys : most;
        }
        Element const* const keys = static_cast<Element const*>(p_.k.data) +
                                    row.batch * p_.k.batch + row.k_begin * p_.k.time +
                                    key_head() * p_.k.head;
        for (int64_t first = 0; first < most; first += kScoreKeys) {
            int64_t const live = min_of(kScoreKeys, most - first);
            for (int64_t n = 0; n < live; ++n)
                widened(s_.k + n * K_, keys + (first + n) * p_.k.time, p_.K);
            for (int64_t n = live; n < panels(live, W) * W; ++n)
                for (int64_t c = 0; c < K_; c += W) store(s_.k + n * K_ + c, Vector<T>{});
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t n = 0; n < live; n += W)
                    store(s_.products + i * stride_ + first + n,
                          products(s_.q + i * K_, s_.k + n * K_));
            }
        }
    }

    // Of a member with as many keys as a vector has lanes.
    LSM_INLINE Vector<T> products(T const* q, T const* k) const {
        Vector<T> sum[W] = {};
        for (int64_t c = 0; c < K_; c += W) {
            Vector<T> const x = load(q + c);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) sum[i] += x * load(k + i * K_ + c);
        }
        return sum_each<T>(sum);
    }

    void clear(BlockRow const& row) {
        for (int64_t n = 0; n < row.keys; n += W) store(s_.weights + n, Vector<T>{});
    }

    // Members [m, m + count) of a row, whose products begin at place `at` of the tile, to the weights of its keys.
    void add(BlockRow const& row, int64_t at, int64_t m, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            int64_t const t = query(row, m + i), keys = seen(row, m + i);
            if (t >= row.q_end) continue;
            T* const x = s_.products + (at + i) * stride_;
            if (!p_.softmax) {
                for (int64_t n = 0; n < keys; ++n) s_.weights[n] += x[n];
                for (int64_t n = keys; n < row.keys; ++n) s_.weights[n] = -INFINITY;
                continue;
            }
            if (keys == 0) continue;
            for (int64_t n = keys; n < panels(keys, W) * W; ++n) x[n] = -INFINITY;
            T lse = 0;
            if (p_.lse != nullptr) {
                lse = static_cast<T const*>(p_.lse)[(row.batch * p_.Hq + head(m + i)) * p_.Tq + t];
                if (lse == -INFINITY) continue;
            } else {
                T top = x[0];
                for (int64_t n = 1; n < keys; ++n) top = x[n] > top ? x[n] : top;
                Vector<T> sum{};
                for (int64_t n = 0; n < keys; n += W) sum += exp(load(x + n) - top);
                lse = top + std::log(sum_lanes<T>(sum));
            }
            for (int64_t n = 0; n < keys; n += W)
                store(s_.weights + n, load(s_.weights + n) + exp(load(x + n) - lse));
        }
    }

    void finish(BlockRow const& row, T* scores) const {
        for (int64_t j = 0; j < p_.blocks; ++j) {
            int64_t const first = j * p_.tap_step + p_.tap_first;
            T const nothing = p_.softmax ? T(0) : T(-INFINITY);
            T score = nothing;
            bool any = false;
            for (int64_t n = 0; n < p_.tap_count; ++n) {
                int64_t const i = first + n;
                if (i < 0 || i >= row.keys) continue;
                T const tap = p_.taps != nullptr ? static_cast<T const*>(p_.taps)[n] : T(1);
                T const x = tap * s_.weights[i];
                score = !any ? x : p_.tap_max ? (x > score ? x : score) : score + x;
                any = true;
            }
            scores[j] = score;
        }
    }

    ScoreParams const& p_;
    BlockTask const& task_;
    ScoreScratch<T> s_;
    int64_t K_, stride_, group_, heads_;
};

int64_t score_scratch_bytes(ScoreParams const& p) {
    return with_accumulator(
        p.dtype, [&](auto zero) { return ScoreScratch<decltype(zero)>(p, nullptr).arena.used(); });
}

void scores(ScoreParams const& p, BlockTask const& task, void* out, void* scratch) {
    with_types(p.dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        ScoreWalk<T, decltype(element)>(p, task, scratch).run(static_cast<T*>(out));
    });
}

}  // namespace

constinit BlockSelectKernels const block_select_kernels{pool, share, collect, score_scratch_bytes,
                                                        scores};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
