// Scores of key blocks for rows of queries, and the choice among them, in one launch: what is chosen from, a row's
// numbers per key and per block, lives in shared memory and goes nowhere else unless the scores themselves are asked for.
//
// A block takes some rows of one head of the map: 64 members at a time, products with 64 keys at a time, whose columns
// come in slices if they are many. A thread owns a row's key when members are added up, and a warp owns a row when it
// chooses, so every sum has one order. The softmax, where its log-sum-exp is not given, takes a sweep of its own.
// Grid: (range of blocks, head, rows).
#pragma once

#include "kernels/matrix.cuh"
#include "kernels/segments.cuh"
#include "kernels/sparse_attn/rows.cuh"
#include "kernels/warp.cuh"
#include "params/block_select.h"
#include "policy/block_rows.h"

namespace lsm::block_select {

constexpr int kWarps = 4, kThreads = kWarps * 32, kMembers = 64, kKeys = 64;
constexpr int kStride = kKeys + 1;  // of the products' rows
using attn_rows::load_rows;
using attn_rows::Pieces;

struct Plan {
    int units;         // rows of a block
    int members;       // of a row
    int passes;        // over the members of one row that has more than kMembers
    int range_blocks;  // blocks of a range
    int range_keys;    // keys that they take, at most
    int depth;         // columns of a slice
    int slices;
    i64 ranges;
};

// ---- The choice ----

// Floats in their order as integers; the smallest of a number is above 0.
LSM_DEVICE u32 ordered(float x) {
    u32 const bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

LSM_DEVICE float from_ordered(u32 x) {
    return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

// A warp writes a row's blocks in ascending order. The k-th best is found bit by bit: how many are at least so good?
template <class Score>
LSM_DEVICE void choose(BlockChoice const& choice, BlockRange const& range, Score const& score,
                       int32_t* index) {
    int const lane = threadIdx.x % 32, n = static_cast<int>(range.limit);
    float const threshold = static_cast<float>(choice.threshold);
    // What can be chosen by its score, 0: not this.
    auto const key = [&](int j) {
        float const x = score(j);
        return range.forced(j) || !(x > -INFINITY) || !(x >= threshold) ? 0u : ordered(x);
    };
    float total = 0.f, mass = 0.f;
    int eligible = 0;
    for (int j = lane; j < n; j += 32) {
        float const share = fmaxf(score(j), 0.f);
        total += share;
        if (range.forced(j)) mass += share;
        eligible += key(j) != 0;
    }
    total = warp_sum(total), mass = warp_sum(mass), eligible = warp_sum(eligible);
    auto const count_from = [&](u32 low) {
        int count = 0;
        for (int j = lane; j < n; j += 32) count += key(j) >= low;
        return warp_sum(count);
    };

    i64 room = (choice.top_k > 0 ? choice.top_k : n) - range.forced_count();
    room = clamped(room, 0, eligible);
    if (choice.top_p > 0) {
        float const need = static_cast<float>(choice.top_p) * total - mass;
        auto const mass_from = [&](u32 low) {
            float sum = 0.f;
            for (int j = lane; j < n; j += 32)
                if (u32 const k = key(j); k >= low) sum += fmaxf(from_ordered(k), 0.f);
            return warp_sum(sum);
        };
        if (need <= 0.f) {
            room = 0;
        } else {
            u32 low = 0;  // the best that reach it are those from here on
            for (u32 bit = 0x80000000u; bit != 0; bit /= 2)
                if (mass_from(low | bit) >= need) low |= bit;
            if (low != 0) {
                int const above = low == 0xffffffffu ? 0 : count_from(low + 1);
                int const equal = count_from(low) - above;
                float const missing = need - (low == 0xffffffffu ? 0.f : mass_from(low + 1));
                float const each = from_ordered(low);
                float const more = each > 0.f ? ceilf(missing / each) : 1.f;
                i64 const few = clamped(static_cast<i64>(fminf(more, 1e9f)), 1, equal);
                room = room < above + few ? room : above + few;
            }
        }
    }
    u32 low = room > 0 ? 0u : 0xffffffffu;
    int ties = 0;  // to be taken of those that are just so good
    if (room > 0 && room < eligible) {
        for (u32 bit = 0x80000000u; bit != 0; bit /= 2)
            if (count_from(low | bit) >= room) low |= bit;
        ties = static_cast<int>(room) - count_from(low + 1);
    }
    int written = 0, seen = 0;
    u32 const below = (1u << lane) - 1;
    for (int first = 0; first < n; first += 32) {
        int const j = first + lane;
        u32 const k = j < n ? key(j) : 0u;
        u32 const tied = __ballot_sync(0xffffffffu, k != 0 && k == low);
        bool const take = j < n && (range.forced(j) || k > low ||
                                    (k != 0 && k == low && seen + __popc(tied & below) < ties));
        u32 const taken = __ballot_sync(0xffffffffu, take);
        int const at = written + __popc(taken & below);
        if (take && at < choice.capacity) store_global(index + at, j);
        seen += __popc(tied), written += __popc(taken);
    }
    for (i64 i = written + lane; i < choice.capacity; i += 32) store_global(index + i, -1);
}

// ---- Products of 64 members with 64 keys, to shared memory ----

template <class Element>
struct TensorProducts {
    using T = Element;
    static constexpr int kMostDepth = 256, kUnit = 64;
    float acc[kKeys / 8][4] = {};

    LSM_DEVICE static float exp(float x) { return exp2_approx(x * 1.44269504f); }

    LSM_DEVICE void add(Pieces const& q, Pieces const& k, int depth) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        LSM_UNROLL_BY(1)
        for (int c = 0; c < depth / 8; c += 2) {
            u32 qa[4];
            ldmatrix_x4(qa, q.at(warp * 16 + (lane & 15), c + (lane >> 4)));
            LSM_UNROLL
            for (int n = 0; n < kKeys / 8; n += 2) {
                u32 kb[4];
                ldmatrix_x4(kb, k.at(n * 8 + (lane & 7) + (lane >> 4) * 8, c + ((lane >> 3) & 1)));
                mma_16x8x16(acc[n], qa, kb[0], kb[1], static_cast<T const*>(nullptr));
                mma_16x8x16(acc[n + 1], qa, kb[2], kb[3], static_cast<T const*>(nullptr));
            }
        }
    }
    LSM_DEVICE void store(float* products, float scale) const {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int n = 0; n < kKeys / 8; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e)
                products[(warp * 16 + lane / 4 + e / 2 * 8) * kStride + n * 8 + lane % 4 * 2 +
                         e % 2] = scale * acc[n][e];
        }
    }
};

// fp32 on CUDA cores: a warp has 16 members, a lane two keys.
struct FloatProducts {
    using T = float;
    static constexpr int kMostDepth = 128, kUnit = 32;
    float acc[2][16] = {};

    LSM_DEVICE static float exp(float x) { return expf(x); }

    LSM_DEVICE void add(Pieces const& q, Pieces const& k, int depth) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        LSM_UNROLL_BY(1)
        for (int c = 0; c < depth / 4; ++c) {
            float4 y[2];
            LSM_UNROLL
            for (int n = 0; n < 2; ++n)
                y[n] = load_shared(&at_shared<float4>(k.at(lane + 32 * n, c)));
            LSM_UNROLL
            for (int i = 0; i < 16; ++i) {
                float4 const x = load_shared(&at_shared<float4>(q.at(warp * 16 + i, c)));
                LSM_UNROLL
                for (int n = 0; n < 2; ++n)
                    acc[n][i] += x.x * y[n].x + x.y * y[n].y + x.z * y[n].z + x.w * y[n].w;
            }
        }
    }
    LSM_DEVICE void store(float* products, float scale) const {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            LSM_UNROLL
            for (int i = 0; i < 16; ++i)
                products[(warp * 16 + i) * kStride + lane + 32 * n] = scale * acc[n][i];
        }
    }
};

struct Members {
    i64 q_at[kMembers];    // elements from the beginning of q
    i64 lse_at[kMembers];  // likewise of lse
    i64 seen[kMembers];    // keys that a member sees; -1: no member
    float lse[kMembers];
};

struct SharedStorage {
    Members members;
    float products[kMembers * kStride];
};

constexpr std::size_t kStorage = (sizeof(SharedStorage) + 1023) / 1024 * 1024;

template <class Math>
std::size_t slice_bytes(Plan const& plan) {
    return static_cast<std::size_t>(kMembers + kKeys) * plan.depth * sizeof(typename Math::T);
}

inline std::size_t row_bytes(Plan const& plan) {
    return static_cast<std::size_t>(plan.units) * (plan.range_keys + plan.range_blocks) *
           sizeof(float);
}

// One block: rows [r0, r0 + rows) of sequence n, one head of the map, blocks [j0, j1).
template <class Math>
struct Walk {
    using T = typename Math::T;
    ScoreParams const& p;
    Plan const& plan;
    SharedStorage& shared;
    u32 slices;
    float *weights, *scores;  // [units][range_keys], [units][range_blocks]
    BlockRow first;           // of the rows
    i64 n, r0, head, key_head, j0, j1, key0, key1;
    int rows, group, heads;

    LSM_DEVICE Walk(ScoreParams const& params, Plan const& how, Segment const& segment, i64 of,
                    i64 range)
        : p(params), plan(how), shared(*reinterpret_cast<SharedStorage*>(dyn_smem())), head(of) {
        slices = smem_u32(dyn_smem()) + kStorage;
        weights = reinterpret_cast<float*>(dyn_smem() + kStorage +
                                           (kMembers + kKeys) * plan.depth * sizeof(T));
        scores = weights + plan.units * plan.range_keys;
        n = segment.sequence, r0 = static_cast<i64>(segment.index) * plan.units;
        rows = static_cast<int>((segment.t1 - segment.t0 + p.block_q - 1) / p.block_q);
        group = static_cast<int>(p.Hq / p.Hk), heads = p.group ? group : 1;
        key_head = p.group ? head : head / group;
        first = block_row(p, n, r0);
        j0 = range * plan.range_blocks;
        j1 = clamped(j0 + plan.range_blocks, j0, p.blocks);
        key0 = clamped(j0 * p.tap_step + p.tap_first, 0, first.keys);
        key1 = clamped((j1 - 1) * p.tap_step + p.tap_first + p.tap_count, key0, first.keys);
    }

    // Where the members of a pass are, and what they see; returns the most that one does.
    LSM_DEVICE i64 find_members(int pass) {
        Members& m = shared.members;
        for (int i = threadIdx.x; i < kMembers; i += kThreads) {
            int const at = pass * kMembers + i, unit = at / plan.members;
            int const member = at - unit * plan.members;
            m.seen[i] = -1;
            if (unit >= rows || unit >= plan.units) continue;
            BlockRow const row = block_row(p, n, r0 + unit);
            i64 const t = row.q_begin + member / heads;
            i64 const h = p.group ? head * group + member % heads : head;
            if (t >= row.q_end) continue;
            m.seen[i] = block_keys_seen(p, row, block_position(p, row, row.t0 + member / heads));
            m.q_at[i] = row.batch * p.q.batch + t * p.q.time + h * p.q.head;
            if (p.lse != nullptr)
                m.lse[i] = load_global(static_cast<float const*>(p.lse) +
                                       (row.batch * p.Hq + h) * p.Tq + t);
        }
        __syncthreads();
        i64 most = 0;
        for (int i = 0; i < kMembers; ++i) most = m.seen[i] > most ? m.seen[i] : most;
        return most;
    }

    // Of all members with keys [key, key + 64). Ends behind a barrier.
    LSM_DEVICE void multiply(i64 key, bool& loaded) {
        Math math;
        u32 const bytes = plan.depth * sizeof(T);
        Pieces const q{slices, bytes}, k{slices + kMembers * bytes, bytes};
        for (int s = 0; s < plan.slices; ++s) {
            int const column = s * plan.depth;
            int const rest = static_cast<int>(p.K) - column;
            int const columns = rest < plan.depth ? rest : plan.depth;
            if (plan.slices > 1 || !loaded) {
                load_rows<T, kThreads>(q, kMembers, columns, plan.depth, p.q.data, [&](int i) {
                    return shared.members.seen[i] < 0
                               ? nullptr
                               : static_cast<T const*>(p.q.data) + shared.members.q_at[i] + column;
                });
                loaded = true;
            }
            load_rows<T, kThreads>(k, kKeys, columns, plan.depth, p.q.data, [&](int i) {
                return key + i >= first.keys
                           ? nullptr
                           : static_cast<T const*>(p.k.data) + first.batch * p.k.batch +
                                 (first.k_begin + key + i) * p.k.time + key_head * p.k.head +
                                 column;
            });
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            math.add(q, k, plan.depth);
            if (s + 1 < plan.slices) __syncthreads();  // the slice has been read
        }
        math.store(shared.products, static_cast<float>(p.scale));
        __syncthreads();
    }

    // log-sum-exp of each member over the keys it sees: two threads a member.
    LSM_DEVICE void find_lse(i64 most, bool& loaded) {
        int const member = threadIdx.x / 2, half_ = threadIdx.x % 2;
        i64 const seen = shared.members.seen[member];
        float top = -INFINITY, sum = 0.f;
        for (i64 key = 0; key < most; key += kKeys) {
            multiply(key, loaded);
            float const* const x = shared.products + member * kStride + half_ * (kKeys / 2);
            i64 const here = clamped(seen - key - half_ * (kKeys / 2), 0, kKeys / 2);
            float high = top;
            for (int i = 0; i < here; ++i) high = fmaxf(high, x[i]);
            if (here > 0) {
                sum *= Math::exp(top - high), top = high;
                for (int i = 0; i < here; ++i) sum += Math::exp(x[i] - high);
            }
            __syncthreads();  // products and slices have been read
        }
        float const other = __shfl_xor_sync(0xffffffffu, top, 1);
        float const high = fmaxf(top, other);
        sum *= top == -INFINITY ? 0.f : Math::exp(top - high);
        // In the order of the keys, on both threads.
        float const theirs = __shfl_xor_sync(0xffffffffu, sum, 1);
        float const total = half_ == 0 ? sum + theirs : theirs + sum;
        if (half_ == 0) shared.members.lse[member] = total > 0.f ? high + logf(total) : -INFINITY;
        __syncthreads();
    }

    // The members of a pass to the weights of their rows' keys [key, key + 64).
    LSM_DEVICE void add_members(int pass, i64 key, bool multiplied) {
        int const units = plan.passes > 1 ? 1 : rows;
        int const each = plan.passes > 1 ? kMembers : plan.members;
        for (int i = threadIdx.x; i < units * kKeys; i += kThreads) {
            int const unit = i / kKeys, column = i % kKeys;
            if (key + column >= key1) continue;
            float sum = 0.f;
            for (int m = unit * each; m < (unit + 1) * each; ++m) {
                i64 const seen = shared.members.seen[m];
                if (seen < 0) continue;
                bool const sees = multiplied && key + column < seen;
                float const x = sees ? shared.products[m * kStride + column] : -INFINITY;
                if (!p.softmax) {
                    sum += x;
                } else if (sees) {
                    float const lse = shared.members.lse[m];
                    sum += lse == -INFINITY ? 0.f : Math::exp(x - lse);
                }
            }
            float& weight = weights[unit * plan.range_keys + (key + column - key0)];
            weight = pass == 0 ? sum : weight + sum;
        }
    }

    LSM_DEVICE float tap(int unit, i64 j) const {
        i64 const from = j * p.tap_step + p.tap_first;
        float score = p.softmax ? 0.f : -INFINITY;
        bool any = false;
        for (i64 i = 0; i < p.tap_count; ++i) {
            i64 const key = from + i;
            if (key < 0 || key >= first.keys) continue;
            float const x =
                weights[unit * plan.range_keys + (key - key0)] *
                (p.taps != nullptr ? load_global(static_cast<float const*>(p.taps) + i) : 1.f);
            score = !any ? x : p.tap_max ? fmaxf(score, x) : score + x;
            any = true;
        }
        return score;
    }

    LSM_DEVICE void run(BlockChoice const& choice) {
        for (int pass = 0; pass < plan.passes; ++pass) {
            if (pass > 0) __syncthreads();  // what is known of the last members has been read
            i64 const most = find_members(pass);
            bool loaded = false;
            if (p.softmax && p.lse == nullptr) find_lse(most, loaded);
            for (i64 key = key0; key < key1; key += kKeys) {
                bool const multiplied = key < most;
                if (multiplied) multiply(key, loaded);
                add_members(pass, key, multiplied);
                __syncthreads();  // products and slices have been read
            }
        }
        int const blocks = static_cast<int>(j1 - j0);
        __syncthreads();
        for (int i = threadIdx.x; i < rows * blocks; i += kThreads) {
            int const unit = i / blocks, j = i % blocks;
            float const score = tap(unit, j0 + j);
            if (p.index != nullptr) {
                scores[unit * plan.range_blocks + j] = score;
            } else {
                BlockRow const row = block_row(p, n, r0 + unit);
                i64 const at = (row.batch * p.heads + head) * p.rows + row.row;
                store_global(static_cast<float*>(p.scores) + at * p.blocks + j0 + j, score);
            }
        }
        if (p.index == nullptr) return;
        __syncthreads();
        for (int unit = threadIdx.x / 32; unit < rows; unit += kWarps) {
            BlockRow const row = block_row(p, n, r0 + unit);
            i64 const at = (row.batch * p.heads + head) * p.rows + row.row;
            float const* const own = scores + unit * plan.range_blocks;
            choose(
                choice, block_range(p, choice, row), [&](int j) { return own[j]; },
                p.index + at * choice.capacity);
        }
    }
};

template <class Math>
__global__ void __launch_bounds__(kThreads, 4)
    score_kernel(ScoreParams const p, BlockChoice const choice, Plan const plan,
                 Segments const segments) {
    i64 id = blockIdx.x;
    i64 const range = id % plan.ranges;
    id /= plan.ranges;
    Segment const segment = segments[id / p.heads];
    if (segment.unused() || segment.poison || segment.t0 >= segment.t1) return;
    Walk<Math>(p, plan, segment, id % p.heads, range).run(choice);
}

// A warp chooses from each row of a map.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(ScoreParams const p, BlockChoice const choice) {
    i64 const row = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= p.B * p.heads * p.rows) return;
    i64 const r = row % p.rows, batch = row / p.rows / p.heads;
    i64 sequence = batch, first = 0;
    bool there = true;
    if (p.cu_rows != nullptr) {
        i64 low = 0, high = p.N;  // rows of sequences before low begin at r or before it
        while (low < high) {
            i64 const middle = (low + high) / 2;
            if (load_global(p.cu_rows + middle + 1) <= r) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        sequence = low, there = low < p.N;
        first = there ? load_global(p.cu_rows + low) : 0;
    }
    BlockRange range{};
    if (there) range = block_range(p, choice, block_row(p, sequence, r - first));
    float const* const scores = static_cast<float const*>(p.scores) + row * p.blocks;
    choose(
        choice, range, [&](int j) { return load_global(scores + j); },
        p.index + row * choice.capacity);
}

// ---- Pooling: a block for each window and head ----

LSM_DEVICE i64 pool_boundary(PoolParams const& p, i64 i) {
    i64 const at = p.cu_seqlens_is_64bit
                       ? load_global(static_cast<int64_t const*>(p.cu_seqlens) + i)
                       : load_global(static_cast<int32_t const*>(p.cu_seqlens) + i);
    return clamped(at, 0, p.T);
}

// The first of [0, N) that begins(n + 1) says is past `at`; N if none.
template <class Begins>
LSM_DEVICE i64 sequence_of(i64 N, i64 at, Begins const& begins) {
    i64 low = 0, high = N;
    while (low < high) {
        i64 const middle = (low + high) / 2;
        if (begins(middle + 1) <= at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Tokens [first, first + count) of a batch row; none where there is no window.
struct Window {
    i64 first, count;
};

// Of a row of y.
LSM_DEVICE Window window_of(PoolParams const& p, i64 batch, i64 row) {
    i64 begin = 0, tokens = p.T, window = row;
    if (p.cu_seqlens != nullptr) {
        i64 const n =
            sequence_of(p.N, row, [&](i64 i) -> i64 { return load_global(p.cu_blocks + i); });
        if (n < p.N) {
            begin = pool_boundary(p, n), tokens = pool_boundary(p, n + 1) - begin;
            window = row - load_global(p.cu_blocks + n);
        } else {
            tokens = 0;
        }
    } else if (p.lengths != nullptr) {
        tokens = clamped(load_global(p.lengths + batch), 0, p.T);
    }
    i64 const start = window * p.stride;
    bool const there = p.partial ? start < tokens : start + p.length <= tokens;
    return {begin + start, there ? clamped(p.length, 0, tokens - start) : 0};
}

template <class T>
LSM_DEVICE T* pooled(Rows const& rows, i64 batch, i64 row, i64 head) {
    return static_cast<T*>(rows.data) + batch * rows.batch + row * rows.time + head * rows.head;
}

// A block per row of y and head.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolParams const p) {
    i64 const id = blockIdx.x, h = id % p.H, row = id / p.H % p.blocks, batch = id / p.H / p.blocks;
    Window const window = window_of(p, batch, row);
    T const* const x = pooled<T>(p.x, batch, window.first, h);
    T* const y = pooled<T>(p.y, batch, row, h);
    for (int c = threadIdx.x; c < p.K; c += kThreads) {
        float sum = 0.f, high = 0.f, low = 0.f;
        for (i64 i = 0; i < window.count; ++i) {
            float const v = static_cast<float>(load_global(x + i * p.x.time + c));
            sum += v;
            high = i == 0 ? v : fmaxf(high, v), low = i == 0 ? v : fminf(low, v);
        }
        float const mean = window.count > 0 ? sum / static_cast<float>(window.count) : 0.f;
        store_global(y + c, static_cast<T>(p.pool == Pool::mean  ? mean
                                           : p.pool == Pool::min ? low
                                                                 : high));
        if (p.pool == Pool::bounds) store_global(y + p.K + c, static_cast<T>(low));
    }
}

// Of a window's gradient what one token gets, [B, blocks, H, columns of y]. A block per row of y and head.
template <class T>
__global__ void __launch_bounds__(kThreads) share_kernel(PoolParams const p, float* shares) {
    i64 const id = blockIdx.x, h = id % p.H, row = id / p.H % p.blocks, batch = id / p.H / p.blocks;
    Window const window = window_of(p, batch, row);
    int const K = static_cast<int>(p.K), columns = p.pool == Pool::bounds ? 2 * K : K;
    T const* const x = pooled<T>(p.x, batch, window.first, h);
    T const* const y = pooled<T>(p.y, batch, row, h);
    T const* const grad = pooled<T>(p.grad_y, batch, row, h);
    for (int c = threadIdx.x; c < columns; c += kThreads) {
        float among = static_cast<float>(window.count);
        if (p.pool != Pool::mean) {
            float const best = static_cast<float>(load_global(y + c));
            among = 0.f;
            for (i64 i = 0; i < window.count; ++i)
                among += static_cast<float>(load_global(x + i * p.x.time + c % K)) == best;
        }
        store_global(shares + id * columns + c,
                     static_cast<float>(load_global(grad + c)) / fmaxf(among, 1.f));
    }
}

// dx: of every token what the windows that hold it give it, in their order. A thread per number.
template <class T>
__global__ void __launch_bounds__(kThreads)
    collect_kernel(PoolParams const p, float const* shares) {
    i64 const id = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
    if (id >= p.B * p.T * p.H * p.K) return;
    i64 const c = id % p.K, h = id / p.K % p.H, time = id / p.K / p.H % p.T,
              batch = id / p.K / p.H / p.T;
    i64 begin = 0, tokens = p.T, row = 0;
    if (p.cu_seqlens != nullptr) {
        i64 const n = sequence_of(p.N, time, [&](i64 i) { return pool_boundary(p, i); });
        tokens = 0;
        if (n < p.N) {
            begin = pool_boundary(p, n), tokens = pool_boundary(p, n + 1) - begin;
            row = load_global(p.cu_blocks + n);
        }
    } else if (p.lengths != nullptr) {
        tokens = clamped(load_global(p.lengths + batch), 0, p.T);
    }
    WindowRange const range = windows_of(p, time - begin, tokens);
    int const parts = p.pool == Pool::bounds ? 2 : 1;
    bool const mean = p.pool == Pool::mean;
    float const own =
        mean ? 0.f : static_cast<float>(load_global(pooled<T>(p.x, batch, time, h) + c));
    float sum = 0.f;
    for (i64 w = range.first; w < range.last; ++w) {
        i64 const at = row + w;
        if (at < 0 || at >= p.blocks) continue;  // cu_blocks are not checked on a GPU
        float const* const share = shares + ((batch * p.blocks + at) * p.H + h) * parts * p.K + c;
        T const* const y = pooled<T>(p.y, batch, at, h) + c;
        for (int part = 0; part < parts; ++part) {
            float const some = load_global(share + part * p.K);
            if (mean || static_cast<float>(load_global(y + part * p.K)) == own) sum += some;
        }
    }
    store_global(pooled<T>(p.dx, batch, time, h) + c, static_cast<T>(sum));
}

}  // namespace lsm::block_select
