// Decode attention: a few queries of one sequence against part of what they visit in its cache.
//
// A block has up to 16 rows, the query heads of one key/value head times the queries that share its keys, padded: what
// it costs is the cache's bytes. It walks its part in steps of kKeys keys. Rows of the cache, found through the lists
// and the page table, come by cp.async, one step ahead where two stages fit; a key that is not there, or whose page is
// none, is zero-filled and masked. Codes are turned into numbers on the way to shared memory. Rows whose sums are not
// finite are made again by CUDA cores, without adding 0 times the value of a key that a row does not see. Results of a
// part, fp32, go to a workspace, and merge.cu joins them in order.
// Grid: (part, 16 rows, queries that share keys).
#pragma once

#include "kernels/matrix.cuh"
#include "kernels/rare.cuh"
#include "kernels/sparse_attn/codes.cuh"
#include "kernels/sparse_attn/decode_keys.cuh"
#include "kernels/warp.cuh"

namespace lsm::decode_attn {

using attn_rows::load_rows;
using attn_rows::Pieces;
constexpr float kLog2e = 1.44269504f;

// What a block's rows add to the products with the keys of a step; -inf for what a query does not see.
struct Adjust {
    SparseAttnParams const& p;
    Place const& place;
    Plan const& plan;
    bool changed, only_causal;

    // A row's side of it.
    struct Row {
        int position, left;
        float slope, ramp;
        bool there;
    };

    LSM_DEVICE Adjust(SparseAttnParams const& params, Place const& where, Plan const& how)
        : p(params), place(where), plan(how) {
        AttnMask const& m = p.mask;
        changed = p.softcap != 0 || p.lists.bias != nullptr || p.alibi_slopes != nullptr ||
                  p.ramp != nullptr;
        only_causal = m.left < 0 && m.head_left == nullptr && m.right < 0 && m.dilation == 1;
    }

    // Whether every key of a step is there and seen by every query, and nothing is added.
    LSM_DEVICE bool idle(i64 first, int last_key, int keys) const {
        return !changed && only_causal && first + keys <= place.last && p.block_table == nullptr &&
               !place.listed &&
               attn_sees(p.mask, -1, place.first_position + place.t0,
                         attn_position(p.mask, last_key));
    }

    LSM_DEVICE Row row(int r) const {
        Row row{0, static_cast<int>(plan.mask.left), 0.f, 0.f, r < place.rows};
        if (!row.there) return row;
        i64 const h = place.head(plan, r);
        row.position = static_cast<int>(place.first_position + place.query(plan, r));
        if (p.mask.head_left != nullptr) row.left = load_global(p.mask.head_left + h);
        if (p.alibi_slopes != nullptr)
            row.slope = load_global(static_cast<float const*>(p.alibi_slopes) + h);
        if (p.ramp != nullptr) row.ramp = load_global(static_cast<float const*>(p.ramp) + h);
        return row;
    }

    LSM_DEVICE float operator()(Row const& row, int key, i64 entry, float s) const {
        if (!row.there || key < 0) return -INFINITY;
        int const x = key * static_cast<int>(plan.mask.key_stride) +
                      static_cast<int>(plan.mask.key_length) - 1;
        if (!attn_sees(plan.mask, row.left, row.position, x)) return -INFINITY;
        if (!changed) return s;
        float const distance = fabsf(static_cast<float>(row.position - x));
        if (p.softcap != 0) {
            float const cap = static_cast<float>(p.softcap);
            s = cap * tanhf(s / cap);
        }
        if (p.lists.bias != nullptr)
            s += load_global(static_cast<float const*>(p.lists.bias) + entry);
        s -= row.slope * distance;
        if (p.ramp != nullptr) {
            float const R = static_cast<float>(p.ramp_length), open = (R + row.ramp - distance) / R;
            s = open >= 1.f ? s : open > 0.f ? s + logf(open) : -INFINITY;
        }
        return s;
    }
};

// Columns first + lane + step n of a row whose sums met inf or NaN, which may be of keys that it does not see: once more,
// by a warp in fp32. Its lse is in memory.
template <class T, int Bits>
LSM_DEVICE_RARE void repair_row(SparseAttnParams const& p, Plan const& plan, int r, int first,
                                int step, int count) {
    constexpr int kMost = 4;
    Place const place = find_place(p, plan);
    Adjust const adjust(p, place, plan);
    Adjust::Row const row = adjust.row(r);
    i64 const part = blockIdx.x % plan.parts, t = place.query(plan, r), h = place.head(plan, r);
    int const lane = threadIdx.x % 32;
    float const lse = load_global(plan.lse + ((part * p.B + place.b) * p.Hq + h) * p.Tq + t);
    T const* const q =
        static_cast<T const*>(p.q.data) + place.b * p.q.batch + t * p.q.time + h * p.q.head;
    float sums[kMost] = {};
    for (i64 i = place.first; i < place.last; ++i) {
        Key const at = find_key(p, place, i);
        if (at.key < 0) continue;
        i64 const k_affine = Bits == 0 ? 0 : row_at(p.k_affine, place, at);
        i64 const v_affine = Bits == 0 ? 0 : row_at(p.v_affine, place, at);
        float dot = 0.f;
        for (int c = lane; c < p.K; c += 32)
            dot += static_cast<float>(load_global(q + c)) *
                   number<T, Bits>(p.k, at.k_at, p.k_affine, k_affine, p.K, c);
        dot = warp_sum(dot) * static_cast<float>(p.scale);
        float const s = adjust(row, at.key, at.entry, dot);
        if (s == -INFINITY) continue;
        float const weight = expf(s - lse);
        LSM_UNROLL
        for (int n = 0; n < kMost; ++n) {
            int const column = first + lane + step * n;
            if (n * step + lane < count && column < p.V)
                sums[n] +=
                    weight * number<T, Bits>(p.v, at.v_at, p.v_affine, v_affine, p.V, column);
        }
    }
    float* const o = plan.o + (((part * p.B + place.b) * p.Tq + t) * p.Hq + h) * p.V;
    LSM_UNROLL
    for (int n = 0; n < kMost; ++n) {
        int const column = first + lane + step * n;
        if (n * step + lane < count && column < p.V) store_global(o + column, sums[n]);
    }
}

// bf16 and fp16: products on tensor cores. Each warp scores a quarter of a step's keys; the probabilities meet in shared
// memory, and each warp sums a quarter of the columns of v.
template <class Element, int V>
struct TensorMath {
    using T = Element;
    static constexpr int kKeys = 64, kColumns = V, kTiles = V / kWarps / 8;
    static constexpr int kBlocks = V > 256 ? 3 : 4;  // of a multiprocessor, for their registers

    struct Shared {
        alignas(128) T p[kRows * kKeys];
        float top[kWarps][kRows], sum[kWarps][kRows];
    };

    float o[kTiles][4] = {};
    float top[2] = {-INFINITY, -INFINITY},
          sum[2] = {};  // of rows lane / 4 and the same + 8; sums of this thread's keys

    template <class Keys>
    LSM_DEVICE void step(SparseAttnParams const& p, Plan const& plan, Adjust const& adjust,
                         bool idle, Pieces const& q, Pieces const& k, Pieces const& v,
                         Keys const& keys, Shared& shared) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        float s[2][4] = {};
        LSM_UNROLL_BY(4)
        for (int c = 0; c < plan.k_columns / 8; c += 2) {
            u32 qa[4], kb[4];
            ldmatrix_x4(qa, q.at(lane & 15, c + (lane >> 4)));
            ldmatrix_x4(kb, k.at(warp * 16 + (lane & 7) + (lane >> 4) * 8, c + ((lane >> 3) & 1)));
            mma_16x8x16(s[0], qa, kb[0], kb[1], static_cast<T const*>(nullptr));
            mma_16x8x16(s[1], qa, kb[2], kb[3], static_cast<T const*>(nullptr));
        }
        float const scale = static_cast<float>(p.scale);
        float high[2] = {-INFINITY, -INFINITY};
        Adjust::Row const rows[2] = {adjust.row(lane / 4), adjust.row(lane / 4 + 8)};
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const n = i / 4, e = i % 4;
            int const key = warp * 16 + n * 8 + lane % 4 * 2 + e % 2;
            s[n][e] *= scale;
            if (!idle) s[n][e] = adjust(rows[e / 2], keys.key[key], keys.entry[key], s[n][e]);
            high[e / 2] = fmaxf(high[e / 2], s[n][e]);
        }
        LSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 1));
            high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 2));
            if (lane % 4 == 0) shared.top[warp][lane / 4 + 8 * i] = high[i];
        }
        __syncthreads();
        float keep[2], base[2];
        LSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            float next = top[i];
            LSM_UNROLL
            for (int w = 0; w < kWarps; ++w) next = fmaxf(next, shared.top[w][lane / 4 + 8 * i]);
            base[i] = next == -INFINITY ? 0.f : next;
            keep[i] = exp2_approx((top[i] - base[i]) * kLog2e);
            top[i] = next, sum[i] *= keep[i];
        }
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            int const n = i / 2, half_ = i % 2, row = lane / 4 + half_ * 8;
            float const a = exp2_approx((s[n][2 * half_] - base[half_]) * kLog2e);
            float const b = exp2_approx((s[n][2 * half_ + 1] - base[half_]) * kLog2e);
            sum[half_] += a + b;
            Pieces const tile{smem_u32(shared.p), kKeys * 2};
            at_shared<u32>(tile.at(row, warp * 2 + n) + lane % 4 * 4) =
                pack(a, b, static_cast<T*>(nullptr));
        }
        __syncthreads();
        LSM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            o[n][0] *= keep[0], o[n][1] *= keep[0], o[n][2] *= keep[1], o[n][3] *= keep[1];
        }
        Pieces const tile{smem_u32(shared.p), kKeys * 2};
        LSM_UNROLL_BY(1)
        for (int kk = 0; kk < kKeys / 16; ++kk) {
            u32 pa[4];
            ldmatrix_x4(pa, tile.at(lane & 15, kk * 2 + (lane >> 4)));
            LSM_UNROLL
            for (int n = 0; n < kTiles; n += 2) {
                u32 vb[4];
                ldmatrix_x4_trans(vb, v.at(kk * 16 + (lane & 15), warp * kTiles + n + (lane >> 4)));
                mma_16x8x16(o[n], pa, vb[0], vb[1], static_cast<T const*>(nullptr));
                mma_16x8x16(o[n + 1], pa, vb[2], vb[3], static_cast<T const*>(nullptr));
            }
        }
    }

    // store(row, column, value, sum of the row), lse(row, top, sum); repair(row, first column, step, columns) of rows whose
    // values are not finite, after all else is stored.
    template <class Store, class Lse, class Repair>
    LSM_DEVICE void finish(Shared& shared, Store const& store, Lse const& lse,
                           Repair const& repair) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 odd[2];
        LSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
            if (lane % 4 == 0) shared.sum[warp][lane / 4 + 8 * i] = sum[i];
        }
        __syncthreads();
        LSM_UNROLL
        for (int i = 0; i < 2; ++i) {
            int const row = lane / 4 + 8 * i;
            float total = 0.f;
            LSM_UNROLL
            for (int w = 0; w < kWarps; ++w) total += shared.sum[w][row];
            if (warp == 0 && lane % 4 == 0) lse(row, top[i], total);
            float zero = 0.f;
            LSM_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                int const column = (warp * kTiles + n) * 8 + lane % 4 * 2;
                store(row, column, o[n][2 * i], total);
                store(row, column + 1, o[n][2 * i + 1], total);
                zero += (o[n][2 * i] + o[n][2 * i + 1]) * 0.f;
            }
            odd[i] = __ballot_sync(0xffffffffu, zero != 0.f && total == total);
        }
        if (__syncthreads_or((odd[0] | odd[1]) != 0) == 0) return;
        LSM_UNROLL_BY(1)
        for (int row = 0; row < kRows; ++row)
            if (((row < 8 ? odd[0] : odd[1]) >> 4 * (row % 8) & 15) != 0)
                repair(row, warp * kTiles * 8, 32, kTiles * 8);
    }
};

// fp32, on CUDA cores: a warp scores four rows, a lane for each key; then a thread sums columns of v for all rows.
template <int V>
struct FloatMath {
    using T = float;
    static constexpr int kBlocks = V > 128 ? 2 : 3;
    static constexpr int kKeys = 32, kColumns = V, kColumnsEach = V / kThreads,
                         kOwnRows = kRows / kWarps;

    struct Shared {
        alignas(16) float p[kRows][kKeys];
        float keep[kRows], sum[kRows];
    };

    float o[kColumnsEach][kRows] = {};
    float top[kOwnRows] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[kOwnRows] = {};

    template <class Keys>
    LSM_DEVICE void step(SparseAttnParams const& p, Plan const& plan, Adjust const& adjust,
                         bool idle, Pieces const& q, Pieces const& k, Pieces const& v,
                         Keys const& keys, Shared& shared) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        float s[kOwnRows] = {};
        LSM_UNROLL_BY(2)
        for (int c = 0; c < plan.k_columns / 4; ++c) {
            float4 const y = load_shared(&at_shared<float4>(k.at(lane, c)));
            LSM_UNROLL
            for (int i = 0; i < kOwnRows; ++i) {
                float4 const x = load_shared(&at_shared<float4>(q.at(warp * kOwnRows + i, c)));
                s[i] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
            }
        }
        LSM_UNROLL
        for (int i = 0; i < kOwnRows; ++i) {
            int const row = warp * kOwnRows + i;
            s[i] *= static_cast<float>(p.scale);
            if (!idle) s[i] = adjust(adjust.row(row), keys.key[lane], keys.entry[lane], s[i]);
            float next = s[i];
            LSM_UNROLL
            for (int d = 16; d > 0; d /= 2)
                next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, d));
            next = fmaxf(next, top[i]);
            float const base = next == -INFINITY ? 0.f : next;
            float const keep = expf(top[i] - base), e = expf(s[i] - base);
            top[i] = next, sum[i] = sum[i] * keep + e;
            shared.p[row][lane] = e;
            if (lane == 0) shared.keep[row] = keep;
        }
        __syncthreads();
        LSM_UNROLL
        for (int j = 0; j < kColumnsEach; ++j) {
            int const column = threadIdx.x + j * kThreads;
            LSM_UNROLL
            for (int r = 0; r < kRows; ++r) o[j][r] *= shared.keep[r];
            LSM_UNROLL_BY(1)
            for (int n = 0; n < kKeys; ++n) {
                float const x = at_shared<float>(v.at(n, column / 4) + column % 4 * 4);
                LSM_UNROLL
                for (int r = 0; r < kRows; ++r) o[j][r] += shared.p[r][n] * x;
            }
        }
    }

    template <class Store, class Lse, class Repair>
    LSM_DEVICE void finish(Shared& shared, Store const& store, Lse const& lse,
                           Repair const& repair) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        LSM_UNROLL
        for (int i = 0; i < kOwnRows; ++i) {
            LSM_UNROLL
            for (int d = 16; d > 0; d /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
            if (lane == 0) {
                shared.sum[warp * kOwnRows + i] = sum[i];
                lse(warp * kOwnRows + i, top[i], sum[i]);
            }
        }
        __syncthreads();
        u32 odd = 0;
        LSM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float const total = shared.sum[r];
            float zero = 0.f;
            LSM_UNROLL
            for (int j = 0; j < kColumnsEach; ++j) {
                store(r, threadIdx.x + j * kThreads, o[j][r], total);
                zero += o[j][r] * 0.f;
            }
            if (__any_sync(0xffffffffu, zero != 0.f && total == total)) odd |= 1u << r;
        }
        __syncwarp();
        LSM_UNROLL_BY(1)
        for (int r = 0; r < kRows; ++r)
            if ((odd >> r & 1) != 0) repair(r, 32 * warp, kThreads, V);
    }
};

template <class Math, int Bits>
struct SharedStorage {
    Step<Math::kKeys, Bits != 0> steps[2];
    typename Math::Shared math;
};

// Bytes of the tiles, which come after SharedStorage.
template <class Math>
std::size_t tile_bytes(Plan const& plan, int stages) {
    std::size_t const k = plan.k_columns, v = plan.shared_values ? 0 : plan.v_columns;
    return (kRows * k + stages * Math::kKeys * (k + v)) * sizeof(typename Math::T);
}

template <class Math, int Bits>
constexpr std::size_t storage_bytes() {
    return (sizeof(SharedStorage<Math, Bits>) + 1023) / 1024 * 1024;
}

// Bits of the cache's codes, 0 for numbers.
template <class Math, int Bits>
__global__ void __launch_bounds__(kThreads, Math::kBlocks)
    decode_kernel(__grid_constant__ SparseAttnParams const p, __grid_constant__ Plan const plan) {
    using T = typename Math::T;
    constexpr int kKeys = Math::kKeys;
    auto& shared = *reinterpret_cast<SharedStorage<Math, Bits>*>(dyn_smem());
    Place const place = find_place(p, plan);
    i64 const part = blockIdx.x % plan.parts;
    auto const lse_of = [&](int row) {
        return plan.lse + ((part * p.B + place.b) * p.Hq + place.head(plan, row)) * p.Tq +
               place.query(plan, row);
    };
    if (place.first >= place.last) {
        if (static_cast<int>(threadIdx.x) < place.rows)
            store_global(lse_of(threadIdx.x), -INFINITY);
        return;
    }

    u32 const row_bytes = plan.k_columns * sizeof(T), v_bytes = plan.v_columns * sizeof(T);
    u32 const tiles = smem_u32(dyn_smem()) + storage_bytes<Math, Bits>();
    Pieces const q{tiles, row_bytes};
    auto const k_tile = [&](int stage) {
        u32 const size = kKeys * (row_bytes + (plan.shared_values ? 0 : v_bytes));
        return Pieces{tiles + kRows * row_bytes + stage * size, row_bytes};
    };
    auto const v_tile = [&](int stage) {
        Pieces const k = k_tile(stage);
        return plan.shared_values ? k : Pieces{k.base + kKeys * row_bytes, v_bytes};
    };
    auto const issue = [&](i64 s, int stage) {
        auto const& keys = shared.steps[s % 2];
        if constexpr (Bits != 0) {
            auto const row = [&](int n, Rows const& codes, i64 const* at, Rows const& affine,
                                 i64 const* affine_at) {
                return keys.key[n] < 0 ? Coded{nullptr, nullptr}
                                       : coded(codes, at[n], affine, affine_at[n]);
            };
            load_codes<T, Bits>(
                k_tile(stage), kKeys, static_cast<int>(p.K), plan.k_columns,
                [&](int n) { return row(n, p.k, keys.k_at, p.k_affine, keys.k_affine_at); });
            load_codes<T, Bits>(
                v_tile(stage), kKeys, static_cast<int>(p.V), plan.v_columns,
                [&](int n) { return row(n, p.v, keys.v_at, p.v_affine, keys.v_affine_at); });
            return;
        }
        load_rows<T, kThreads>(
            k_tile(stage), kKeys, static_cast<int>(p.K), plan.k_columns, p.q.data, [&](int n) {
                return keys.key[n] < 0 ? nullptr : static_cast<T const*>(p.k.data) + keys.k_at[n];
            });
        if (!plan.shared_values) {
            load_rows<T, kThreads>(
                v_tile(stage), kKeys, static_cast<int>(p.V), plan.v_columns, p.q.data, [&](int n) {
                    return keys.key[n] < 0 ? nullptr
                                           : static_cast<T const*>(p.v.data) + keys.v_at[n];
                });
        }
        cp_async_commit();
    };

    load_rows<T, kThreads>(q, kRows, static_cast<int>(p.K), plan.k_columns, p.q.data, [&](int r) {
        return r >= place.rows
                   ? nullptr
                   : static_cast<T const*>(p.q.data) + place.b * p.q.batch +
                         place.query(plan, r) * p.q.time + place.head(plan, r) * p.q.head;
    });
    find_keys(p, place, place.first, shared.steps[0]);
    __syncthreads();
    issue(0, 0);
    i64 const steps = (place.last - place.first + kKeys - 1) / kKeys;
    Adjust const adjust(p, place, plan);
    Math math;
    for (i64 s = 0; s < steps; ++s) {
        int const stage = plan.stages == 2 ? static_cast<int>(s % 2) : 0;
        if (plan.stages == 1 && s > 0) {
            __syncthreads();  // the last step's values have been read
            issue(s, 0);
        }
        i64 const first = place.first + s * kKeys;
        if (s + 1 < steps) find_keys(p, place, first + kKeys, shared.steps[(s + 1) % 2]);
        cp_async_wait<0>();
        __syncthreads();
        if (plan.stages == 2 && s + 1 < steps) issue(s + 1, 1 - stage);
        auto const& keys = shared.steps[s % 2];
        bool const idle = adjust.idle(first, keys.key[kKeys - 1], kKeys);
        math.step(p, plan, adjust, idle, q, k_tile(stage), v_tile(stage), keys, shared.math);
    }
    math.finish(
        shared.math,
        [&](int row, int column, float value, float sum) {
            if (row >= place.rows || column >= p.V) return;
            i64 const at = (((part * p.B + place.b) * p.Tq + place.query(plan, row)) * p.Hq +
                            place.head(plan, row)) *
                           p.V;
            store_global(plan.o + at + column, sum == 0.f ? 0.f : value / sum);
        },
        [&](int row, float top, float sum) {
            if (row < place.rows)
                store_global(lse_of(row), sum == 0.f ? -INFINITY : top + logf(sum));
        },
        [&](int row, int first, int step, int count) {
            if (row < place.rows) repair_row<T, Bits>(p, plan, row, first, step, count);
        });
}

// ---- Launches ----

constexpr std::size_t kMostShared = 160 * 1024;  // that every GPU since sm_80 has

template <class Math, int Bits>
void run(SparseAttnParams const& p, Plan plan, void* stream) {
    int const unit = 128 / static_cast<int>(sizeof(typename Math::T));  // eight pieces
    plan.k_columns = static_cast<int>(p.K + unit - 1) / unit * unit;
    plan.v_columns = Math::kColumns;
    // Of a row of k that is too short for the columns of values that warps read, v is loaded by itself.
    plan.shared_values = plan.shared_values && plan.k_columns >= Math::kColumns;
    std::size_t const storage = storage_bytes<Math, Bits>();
    plan.stages = storage + tile_bytes<Math>(plan, 2) <= kMostShared ? 2 : 1;
    i64 const units = p.B * p.Hkv * plan.groups * (p.Tq / plan.queries);
    launch(decode_kernel<Math, Bits>, dim3(static_cast<unsigned>(units * plan.tiles * plan.parts)),
           dim3(kThreads), storage + tile_bytes<Math>(plan, plan.stages), stream, p, plan);
}

// From a cache of codes; in a device file of its own.
void run_codes(SparseAttnParams const& p, Plan const& plan, void* stream);

}  // namespace lsm::decode_attn
