// Attention on CUDA cores in fp32, for every type, size, mask and gradient: what the tensor-core kernels do not take. A
// warp owns four rows; lanes are keys while scores are made, and columns while rows are added up. Beyond 256 columns
// there is room for half as many keys: two lanes have one, and half of its columns each.
#pragma once

#include "kernels/sparse_attn/numbers.cuh"
#include "kernels/sparse_attn/plan.cuh"
#include "kernels/sparse_attn/score.cuh"

namespace lsm::sparse_attn {

constexpr int kExactWarps = 4, kExactThreads = 32 * kExactWarps;
constexpr int kExactEach = 4;                         // rows of a warp
constexpr int kExactRows = kExactWarps * kExactEach;  // of a block

// Up to D columns.
template <int D>
struct Exact {
    static constexpr int kStep = D > 256 ? 16 : 32;  // tokens gone through at once
    static constexpr int kLaneColumns = lane_columns(D);
    using Sums = float[kExactEach][kLaneColumns];
};

// Rows in shared memory: 16 bytes apart beyond their length, so that eight lanes reading a row each meet all banks.
LSM_DEVICE int exact_pitch(i64 columns) {
    return static_cast<int>((columns + 3) / 4 * 4 + 4);
}

LSM_DEVICE float4& float4_at(float* x) {
    return *reinterpret_cast<float4*>(x);
}
LSM_DEVICE float4 const& float4_at(float const* x) {
    return *reinterpret_cast<float4 const*>(x);
}

// Rows of a tensor: at(row) is the first element's place, or below 0 for a row of zeros. Whether all that this thread
// read is finite.
template <class At>
LSM_DEVICE bool load_exact_rows(Rows const& x, Dtype type, int columns, int rows, float* to,
                                At at) {
    int const pieces = (columns + 3) / 4, pitch = exact_pitch(columns);
    float odd = 0.f;
    for (int i = threadIdx.x; i < rows * pieces; i += kExactThreads) {
        int const row = i / pieces, c = i % pieces * 4;
        i64 const from = at(row);
        float4 const zero = {0.f, 0.f, 0.f, 0.f};
        float4 const four = from < 0 ? zero : load4(x.data, from + c, type);
        float4_at(to + row * pitch + c) = four;
        odd += four.x * 0.f + four.y * 0.f + four.z * 0.f + four.w * 0.f;
    }
    return odd == 0.f;
}

// dots[r] = this lane's row, of kStep, . row r of four.
template <int kStep>
LSM_DEVICE void dot_four(float const* rows, float const* four, int columns,
                         float (&dots)[kExactEach]) {
    int const pitch = exact_pitch(columns), lane = threadIdx.x % 32;
    float const* const mine = rows + lane % kStep * pitch;
    LSM_UNROLL_BY(2)
    for (int c = lane / kStep * 4; c < columns; c += 128 / kStep) {
        float4 const a = float4_at(mine + c);
        LSM_UNROLL
        for (int r = 0; r < kExactEach; ++r) {
            float4 const b = float4_at(four + r * pitch + c);
            dots[r] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
    }
    if constexpr (kStep < 32) {
        LSM_UNROLL
        for (int r = 0; r < kExactEach; ++r)
            dots[r] += __shfl_xor_sync(0xffffffffu, dots[r], kStep);
    }
}

// sums[r][columns of this lane] += sum over the step's tokens of weight[token][r] row(token). kOdd: rows may hold inf or
// NaN, and 0 times that is 0.
template <int kStep, bool kOdd, int kLaneColumns>
LSM_DEVICE void add_rows(float const* weights, float const* rows, int columns,
                         float (&sums)[kExactEach][kLaneColumns]) {
    int const lane = threadIdx.x % 32, pitch = exact_pitch(columns);
    LSM_UNROLL_BY(2)
    for (int j = 0; j < kStep; ++j) {
        float4 const w = float4_at(weights + kExactEach * j);
        float const by[kExactEach] = {w.x, w.y, w.z, w.w};
        LSM_UNROLL
        for (int i = 0; i < kLaneColumns; i += 4) {
            int const c = 4 * lane + 32 * i;
            if (c >= columns) continue;
            float4 const x = float4_at(rows + j * pitch + c);
            LSM_UNROLL
            for (int r = 0; r < kExactEach; ++r) {
                if (kOdd && by[r] == 0.f) continue;
                sums[r][i] += by[r] * x.x, sums[r][i + 1] += by[r] * x.y;
                sums[r][i + 2] += by[r] * x.z, sums[r][i + 3] += by[r] * x.w;
            }
        }
    }
}

template <int kStep, int kLaneColumns>
LSM_DEVICE void add_rows(bool finite, float const* weights, float const* rows, int columns,
                         float (&sums)[kExactEach][kLaneColumns]) {
    finite ? add_rows<kStep, false>(weights, rows, columns, sums)
           : add_rows<kStep, true>(weights, rows, columns, sums);
}

// Forward: o and lse. Backward: dq, and what sums over a query's keys: gradients of biases and the ramp.
// Grid: (tile of queries, head tile, key head, batch row), tiles fastest.
template <int D, bool kBackward>
struct ExactRowsKernel {
    static constexpr int kStep = Exact<D>::kStep;
    struct SharedStorage {
        Plan plan;
        Row rows[kExactRows];
        float weights[kExactWarps][kStep * kExactEach];
        float bias[kBackward ? kExactWarps : 1][kPlan];
        float arrays[4];  // q, dO, keys, values
    };

    static std::size_t bytes(SparseAttnParams const& p) {
        auto const pitch = [](i64 columns) { return (columns + 3) / 4 * 4 + 4; };
        return sizeof(SharedStorage) + 4 * ((kExactRows + kStep) * pitch(p.K) +
                                            (kStep + (kBackward ? kExactRows : 0)) * pitch(p.V));
    }

    Work const& work;
    SparseAttnParams const& p;
    SharedStorage& s;
    int const lane, warp, K, V;
    Place place;
    int batch, key_head, first_head;  // first query head of this tile
    float *q, *grad_o, *keys, *values;

    LSM_DEVICE ExactRowsKernel(Work const& work_)
        : work(work_),
          p(work_.p),
          s(*reinterpret_cast<SharedStorage*>(dyn_smem())),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          K(static_cast<int>(p.K)),
          V(static_cast<int>(p.V)) {
        i64 rest = blockIdx.x;
        int const index = work.query_tiles - 1 - static_cast<int>(rest % work.query_tiles);
        rest /= work.query_tiles;
        int const head_tile = static_cast<int>(rest % work.head_tiles);
        rest /= work.head_tiles;
        key_head = static_cast<int>(rest % p.Hkv), batch = static_cast<int>(rest / p.Hkv);
        first_head = key_head * work.group + head_tile * work.heads;
        place = locate(work, &First::queries, batch, index, work.tokens);
        q = s.arrays;
        grad_o = q + kExactRows * exact_pitch(K);
        keys = grad_o + (kBackward ? kExactRows * exact_pitch(V) : 0);
        values = keys + kStep * exact_pitch(K);
    }

    LSM_DEVICE int token(int m) const { return place.token + work.token_of(m); }
    LSM_DEVICE int head(int m) const { return first_head + work.head_of(m); }
    LSM_DEVICE bool exists(int m) const {
        return work.row_exists(m) && token(m) < place.sequence.Tq &&
               head(m) < (key_head + 1) * work.group;
    }
    LSM_DEVICE i64 row_at(Rows const& x, int m) const {
        return row_offset(x, batch, place.sequence.q0 + token(m), head(m));
    }

    LSM_DEVICE void poison() {
        int const columns = kBackward ? K : V;
        Rows const& to = kBackward ? p.dq : p.o;
        float nans[Exact<D>::kLaneColumns];
        for (float& x : nans) x = nan_value();
        for (int r = 0; r < kExactEach; ++r) {
            int const m = warp * kExactEach + r;
            if (!work.row_exists(m) || token(m) >= p.Tq || head(m) >= (key_head + 1) * work.group)
                continue;
            store_row(to, row_offset(to, batch, token(m), head(m)), p.dtype, columns, nans, 1.f);
            i64 const at = per_head(work, batch, token(m), head(m));
            if (!kBackward && lane == 0) store_global(static_cast<float*>(p.lse) + at, nan_value());
            if (kBackward && lane == 0 && work.ramp_parts != nullptr)
                store_global(work.ramp_parts + at, nan_value());
        }
    }

    // Units of the step at i: this lane's key.
    LSM_DEVICE int unit_size() const { return min(work.block_k, kStep); }
    LSM_DEVICE int key_of(int step, int j, int& tag) const {
        int const size = unit_size();
        Unit const unit = s.plan.at((step * kStep + j) / size);
        tag = unit.tag;
        int const key = unit.first + j % size;
        return key < 0 || key >= place.sequence.Tk ? -1 : key;
    }

    LSM_DEVICE void run() {
        if (place.unused) return;
        if (place.poison) return poison();
        Sequence const& sequence = place.sequence;
        Mask const& mask = work.mask;
        int const shift = mask.shift(sequence.Tq, sequence.Tk), last = mask.key(sequence.Tk - 1);
        int left_min = mask.left, left_max = mask.left;
        if (mask.head_left != nullptr) {
            left_min = kNone, left_max = 0;
            for (int h = 0; h < work.heads && first_head + h < (key_head + 1) * work.group; ++h) {
                int const left = mask.left_of(first_head + h);
                left_min = min(left_min, left), left_max = max(left_max, left);
            }
        }
        if (threadIdx.x == 0) s.plan.next = 0;
        if (threadIdx.x < kExactRows) {
            int const m = threadIdx.x;
            s.rows[m] = exists(m) ? mask.row(token(m) + shift, mask.left_of(head(m)), last)
                                  : Row{0, -kFar, 0, 0};
        }
        load_exact_rows(p.q, p.dtype, K, kExactRows, q,
                        [&](int m) { return exists(m) ? row_at(p.q, m) : -1; });
        if constexpr (kBackward)
            load_exact_rows(p.grad_o, p.dtype, V, kExactRows, grad_o,
                            [&](int m) { return exists(m) ? row_at(p.grad_o, m) : -1; });
        Bounds const bounds = mask.bounds(place.token + shift,
                                          min(place.token + work.tokens, sequence.Tq) - 1 + shift,
                                          left_min, left_max, last);
        Blocks const blocks =
            work.lists ? list_blocks(work, sequence, first_head, place.token / work.block_q)
                       : visible_keys(work, sequence, bounds);
        int const size = unit_size(), subs = work.block_k / size;

        Head heads[kExactEach];
        float most[kExactEach], sum[kExactEach], lse[kExactEach], delta[kExactEach],
            ramp[kExactEach];
        typename Exact<D>::Sums sums = {};
        for (int r = 0; r < kExactEach; ++r) {
            int const m = warp * kExactEach + r;
            bool const real = exists(m);
            heads[r] = Head::of(work, real ? head(m) : first_head);
            most[r] = kLowest, sum[r] = 0.f, ramp[r] = 0.f;
            if constexpr (kBackward) {
                float4 const stats =
                    real ? load_global(work.stats +
                                       per_head(work, batch, sequence.q0 + token(m), head(m)))
                         : float4{infinity(), 0.f, infinity(), 0.f};
                lse[r] = stats.z, delta[r] = stats.y;
            }
        }

        for (bool more = true; more;) {
            __syncthreads();  // the last part is done with
            if (warp == 0)
                fill_plan(s.plan, blocks.count * subs, [&](int i, Unit& unit) {
                    int const block = blocks[i / subs];
                    if (block < 0 || block > kNone / work.block_k) return Kind::skip;
                    unit = {block * work.block_k + i % subs * size, i / subs};
                    if (unit.first >= sequence.Tk) return Kind::skip;
                    Kind const kind =
                        mask.kind(bounds, mask.key(unit.first), mask.key(unit.first + size - 1));
                    return kind == Kind::skip ? kind : Kind::partial;
                });
            __syncthreads();
            more = s.plan.more;
            for (int step = 0; step < s.plan.steps(kStep / size); ++step) {
                auto const at = [&](Rows const& x, int j) -> i64 {
                    int tag;
                    int const key = key_of(step, j, tag);
                    return key < 0 ? -1 : row_offset(x, batch, sequence.k0 + key, key_head);
                };
                if (step > 0) __syncthreads();
                bool const keys_finite = load_exact_rows(p.k, p.dtype, K, kStep, keys,
                                                         [&](int j) { return at(p.k, j); });
                bool const values_finite = load_exact_rows(p.v, p.dtype, V, kStep, values,
                                                           [&](int j) { return at(p.v, j); });
                bool const finite = __syncthreads_and(kBackward ? keys_finite : values_finite) != 0;

                int tag;
                int const key = key_of(step, lane % kStep, tag), x = key < 0 ? kFar : mask.key(key);
                float const bias =
                    p.lists.bias != nullptr && key >= 0 ? work.bias(blocks.entry + tag) : 0.f;
                float dots[kExactEach] = {}, grads[kExactEach] = {};
                dot_four<kStep>(keys, q + warp * kExactEach * exact_pitch(K), K, dots);
                if constexpr (kBackward)
                    dot_four<kStep>(values, grad_o + warp * kExactEach * exact_pitch(V), V, grads);
                bool const first = lane < kStep;  // of the lanes of a key
                float weight[kExactEach];
                float all = 0.f;
                LSM_UNROLL
                for (int r = 0; r < kExactEach; ++r) {
                    Row const row = s.rows[warp * kExactEach + r];
                    Score const what = score(work, heads[r], dots[r], row.p - x, bias);
                    float const value = mask.sees(row, x) ? what.s : -infinity();
                    if constexpr (kBackward) {
                        float const ds = value == -infinity() || !first
                                             ? 0.f
                                             : expf(value - lse[r]) * (grads[r] - delta[r]);
                        all += ds;
                        ramp[r] += what.ramp == 0.f ? 0.f : ds * what.ramp;
                        weight[r] = ds == 0.f ? 0.f : ds * what.slope;
                    } else {
                        float const highest = fmaxf(most[r], warp_max(value));
                        float const fade = expf(most[r] - highest);
                        most[r] = highest;
                        weight[r] = first ? expf(value - highest) : 0.f;
                        sum[r] = sum[r] * fade + weight[r];  // of this lane
                        LSM_UNROLL
                        for (float& x : sums[r]) x *= fade;
                    }
                }
                if constexpr (kBackward) {
                    if (work.bias_parts != nullptr) {
                        for (int d = size / 2; d > 0; d /= 2)
                            all += __shfl_xor_sync(0xffffffffu, all, d);
                        int const unit = step * (kStep / size) + lane / size;
                        if (first && lane % size == 0 && unit < kPlan) s.bias[warp][unit] = all;
                    }
                }
                if (!kBackward && work.least_weight > 0.f) {
                    float const heaviest =
                        fmaxf(fmaxf(weight[0], weight[1]), fmaxf(weight[2], weight[3]));
                    if (!__any_sync(0xffffffffu, heaviest > work.least_weight)) continue;
                }
                float* const weights = s.weights[warp];
                __syncwarp();
                if (first)
                    float4_at(weights + kExactEach * lane) = {weight[0], weight[1], weight[2],
                                                              weight[3]};
                __syncwarp();
                add_rows<kStep>(finite, weights, kBackward ? keys : values, kBackward ? K : V,
                                sums);
            }
            if constexpr (kBackward) {
                if (work.bias_parts != nullptr) {
                    __syncthreads();
                    store_bias_sums<kExactWarps, kExactThreads>(work, s.plan, s.bias, place.token,
                                                                key_head, first_head, blocks.entry);
                }
            }
        }

        for (int r = 0; r < kExactEach; ++r) {
            int const m = warp * kExactEach + r;
            float denominator = kBackward ? 1.f : warp_sum(sum[r]), by = 1.f;
            float const bent = kBackward ? warp_sum(ramp[r]) : 0.f;
            if (!exists(m)) continue;
            i64 const at = per_head(work, batch, sequence.q0 + token(m), head(m));
            if constexpr (kBackward) {
                store_row(p.dq, row_at(p.dq, m), p.dtype, K, sums[r], work.scale);
                if (lane == 0 && work.ramp_parts != nullptr)
                    store_global(work.ramp_parts + at, bent);
            } else {
                if (p.sink_logits != nullptr) {
                    float const sink =
                        load_global(static_cast<float const*>(p.sink_logits) + head(m));
                    float const highest = fmaxf(most[r], sink);
                    by = expf(most[r] - highest);
                    denominator = denominator * by + expf(sink - highest);
                    most[r] = highest;
                }
                by = denominator == 0.f ? 0.f : by / denominator;
                store_row(p.o, row_at(p.o, m), p.dtype, V, sums[r], by);
                if (lane == 0)
                    store_global(static_cast<float*>(p.lse) + at,
                                 denominator == 0.f ? -infinity() : most[r] + logf(denominator));
            }
        }
    }
};

template <int D, bool kBackward>
__global__ void __launch_bounds__(kExactThreads, 2) exact_rows(Work work) {
    ExactRowsKernel<D, kBackward>(work).run();
}

// dk and dv: the same the other way round, keys as rows. Grid: (tile of kExactRows keys, key head, batch row).
template <int D, Want Wants>
struct ExactKeysKernel {
    static constexpr int kStep = Exact<D>::kStep;
    static constexpr bool kKeys = Wants != Want::values, kValues = Wants != Want::keys;
    using Sums = typename Exact<D>::Sums;
    struct SharedStorage {
        Plan plan;
        float weights[kExactWarps][kStep * kExactEach];
        float slopes[kExactWarps][kStep * kExactEach];
        float arrays[4];  // keys, values, q, dO
    };

    static std::size_t bytes(SparseAttnParams const& p) {
        auto const pitch = [](i64 columns) { return (columns + 3) / 4 * 4 + 4; };
        return sizeof(SharedStorage) + 4 * (kExactRows + kStep) * (pitch(p.K) + pitch(p.V));
    }

    Work const& work;
    SparseAttnParams const& p;
    SharedStorage& s;
    int const lane, warp, K, V;
    Place place;
    int batch, key_head;

    LSM_DEVICE ExactKeysKernel(Work const& work_)
        : work(work_),
          p(work_.p),
          s(*reinterpret_cast<SharedStorage*>(dyn_smem())),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          K(static_cast<int>(p.K)),
          V(static_cast<int>(p.V)) {
        KeyTile const tile = locate_keys(work, kExactRows, blockIdx.x);
        batch = tile.batch, key_head = tile.key_head, place = tile.place;
    }

    LSM_DEVICE void store(i64 first, i64 end, Sums const& dk, Sums const& dv, float by) {
        for (int r = 0; r < kExactEach; ++r) {
            i64 const key = first + warp * kExactEach + r;
            if (key >= end) continue;
            if constexpr (kKeys)
                store_row(p.dk, row_offset(p.dk, batch, key, key_head), p.dtype, K, dk[r], by);
            if constexpr (kValues)
                store_row(p.dv, row_offset(p.dv, batch, key, key_head), p.dtype, V, dv[r], 1.f);
        }
    }

    LSM_DEVICE void run() {
        if (place.unused) return;
        Sums dk = {}, dv = {};
        if (place.poison) {
            for (int r = 0; r < kExactEach; ++r)
                for (int i = 0; i < Exact<D>::kLaneColumns; ++i) dk[r][i] = dv[r][i] = nan_value();
            return store(place.token, p.Tk, dk, dv, 1.f);
        }
        Sequence const& sequence = place.sequence;
        Mask const& mask = work.mask;
        Inverse const& inverse = work.inverse;
        float* const keys = s.arrays;
        float* const values = keys + kExactRows * exact_pitch(K);
        float* const q = values + kExactRows * exact_pitch(V);
        float* const grad_o = q + kStep * exact_pitch(K);
        auto const key_at = [&](Rows const& x, int r) -> i64 {
            int const key = place.token + r;
            return key < sequence.Tk ? row_offset(x, batch, sequence.k0 + key, key_head) : -1;
        };
        load_exact_rows(p.k, p.dtype, K, kExactRows, keys, [&](int r) { return key_at(p.k, r); });
        load_exact_rows(p.v, p.dtype, V, kExactRows, values, [&](int r) { return key_at(p.v, r); });
        int const shift = mask.shift(sequence.Tq, sequence.Tk), last = mask.key(sequence.Tk - 1);
        int const x0 = mask.key(place.token);
        int const x1 = mask.key(min(place.token + kExactRows, sequence.Tk) - 1);
        int const size = min(work.block_q, kStep), subs = work.block_q / size;
        int const each = kStep / size;
        int const per = inverse.section_k / work.block_k;
        int const member = work.lists ? place.token / work.block_k % per : 0;

        for (int head = key_head * work.group; head < (key_head + 1) * work.group; ++head) {
            int const left = mask.left_of(head);
            Head const bend = Head::of(work, head);
            int2 const* entries = nullptr;
            Blocks blocks = {nullptr, 0, 0, 0, 0};
            if (work.lists) {
                Entries const those = section_entries(
                    work, batch, head, sequence.section0 + place.token / inverse.section_k);
                entries = those.at, blocks.count = those.count;
            } else {
                blocks = visible_queries(work, sequence, left, x0, x1);
            }
            __syncthreads();
            if (threadIdx.x == 0) s.plan.next = 0;
            for (bool more = true; more;) {
                __syncthreads();
                if (warp == 0)
                    fill_plan(s.plan, blocks.count * subs, [&](int i, Unit& unit) {
                        int2 const entry = entries != nullptr ? load_global(entries + i / subs)
                                                              : int2{blocks[i / subs], 1};
                        if ((entry.y >> member & 1) == 0) return Kind::skip;
                        unit = {entry.x * work.block_q + i % subs * size,
                                entry.y / 16 + __popc(entry.y & ((1 << member) - 1))};
                        if (unit.first >= sequence.Tq) return Kind::skip;
                        int const p0 = unit.first + shift;
                        int const p1 = min(unit.first + size, sequence.Tq) - 1 + shift;
                        Kind const kind = mask.kind(mask.bounds(p0, p1, left, left, last), x0, x1);
                        return kind == Kind::skip ? kind : Kind::partial;
                    });
                __syncthreads();
                more = s.plan.more;
                for (int step = 0; step < s.plan.steps(each); ++step) {
                    auto const token_of = [&](int j) {
                        int const t = s.plan.at((step * kStep + j) / size).first + j % size;
                        return t < 0 || t >= sequence.Tq ? -1 : t;
                    };
                    auto const at = [&](Rows const& x, int j) -> i64 {
                        int const t = token_of(j);
                        return t < 0 ? -1 : row_offset(x, batch, sequence.q0 + t, head);
                    };
                    if (step > 0) __syncthreads();
                    bool const q_finite = load_exact_rows(p.q, p.dtype, K, kStep, q,
                                                          [&](int j) { return at(p.q, j); });
                    bool const grads_finite =
                        load_exact_rows(p.grad_o, p.dtype, V, kStep, grad_o,
                                        [&](int j) { return at(p.grad_o, j); });
                    bool const finite = __syncthreads_and(q_finite && grads_finite) != 0;

                    int const t = token_of(lane % kStep);
                    Row const row = t < 0 ? Row{0, -kFar, 0, 0} : mask.row(t + shift, left, last);
                    float4 const stats =
                        t < 0 ? float4{infinity(), 0.f, infinity(), 0.f}
                              : load_global(work.stats +
                                            per_head(work, batch, sequence.q0 + t, head));
                    float bias = 0.f;
                    if (p.lists.bias != nullptr && t >= 0)
                        bias = work.bias(list_blocks(work, sequence, head, t / work.block_q).entry +
                                         s.plan.at((step * kStep + lane % kStep) / size).tag);
                    float dots[kExactEach] = {}, grads[kExactEach] = {};
                    dot_four<kStep>(q, keys + warp * kExactEach * exact_pitch(K), K, dots);
                    if constexpr (kKeys)
                        dot_four<kStep>(grad_o, values + warp * kExactEach * exact_pitch(V), V,
                                        grads);
                    float weight[kExactEach], slope[kExactEach];
                    LSM_UNROLL
                    for (int r = 0; r < kExactEach; ++r) {
                        int const x = mask.key(place.token + warp * kExactEach + r);
                        Score const what = score(work, bend, dots[r], row.p - x, bias);
                        bool const seen = mask.sees(row, x) && what.s != -infinity();
                        weight[r] = seen ? expf(what.s - stats.z) : 0.f;
                        slope[r] =
                            weight[r] == 0.f ? 0.f : weight[r] * (grads[r] - stats.y) * what.slope;
                    }
                    float *const weights = s.weights[warp], *const slopes = s.slopes[warp];
                    __syncwarp();
                    if (lane < kStep) {
                        float4_at(weights + kExactEach * lane) = {weight[0], weight[1], weight[2],
                                                                  weight[3]};
                        float4_at(slopes + kExactEach * lane) = {slope[0], slope[1], slope[2],
                                                                 slope[3]};
                    }
                    __syncwarp();
                    if constexpr (kValues) add_rows<kStep>(finite, weights, grad_o, V, dv);
                    if constexpr (kKeys) add_rows<kStep>(finite, slopes, q, K, dk);
                }
            }
        }
        store(sequence.k0 + place.token, sequence.k0 + sequence.Tk, dk, dv, work.scale);
    }
};

template <int D, Want Wants>
__global__ void __launch_bounds__(kExactThreads, 2) exact_keys(Work work) {
    ExactKeysKernel<D, Wants>(work).run();
}

}  // namespace lsm::sparse_attn
