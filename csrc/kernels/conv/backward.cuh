// The gradients of the short convolution, one pass over memory walked backwards in time (walk.cuh), and the sums of the
// weight's gradient.
#pragma once

#include "kernels/conv/walk.cuh"

namespace lsm::conv {

// Sums of the runs of a block, in their order, to partial[record][kTaps + 1][D].
template <class C>
LSM_DEVICE void store_weight_grad(ConvParams const& p, Place<C> const& place,
                                  SharedStorage<C>& shared,
                                  float const (&dweight)[C::kTaps + 1][C::kVector],
                                  float* partial) {
    if (p.dweight == nullptr) return;
    LSM_UNROLL
    for (int a = 0; a <= C::kTaps; ++a) {
        __syncthreads();
        LSM_UNROLL
        for (int v = 0; v < C::kVector; ++v)
            shared.sum[place.run][place.lane * C::kVector + v] = dweight[a][v];
        __syncthreads();
        for (int c = threadIdx.x; c < C::kTile; c += C::kThreads) {
            i64 const channel = place.tile * C::kTile + c;
            if (channel >= p.D) continue;
            float sum = 0.f;
            for (int r = 0; r < C::kRuns; ++r) sum += shared.sum[r][c];
            store_global(partial + (place.record * (C::kTaps + 1) + a) * p.D + channel, sum);
        }
    }
}

// `grad` holds the gradients, before the activation, of the sequence's first tokens.
template <class C>
LSM_DEVICE void store_initial_grad(ConvParams const& p, Place<C> const& place,
                                   Filter<C> const& filter,
                                   float const (&grad)[C::kTaps][C::kVector]) {
    using T = typename C::T;
    Segment const& segment = place.segment;
    if (p.grad_initial_state == nullptr || segment.index != 0 || segment.sequence < 0) return;
    if (place.run != 0) return;
    LSM_UNROLL
    for (int v = 0; v < C::kVector; ++v) {
        if (v >= place.channels) continue;
        for (i64 s = 0; s < p.S; ++s) {
            i64 const age = p.S - s, column = s - (place.end - place.begin);
            float sum = 0.f;
            LSM_UNROLL
            for (int before = 1; before < C::kTaps; ++before) {
                if (before != age) continue;
                LSM_UNROLL
                for (int a = before; a < C::kTaps; ++a)
                    if (a < p.W) sum += filter.weight[a][v] * grad[a - before][v];
            }
            if (p.grad_final_state != nullptr && column >= 0)
                sum += load_float<T>(p.grad_final_state, place.state(p, v) + column);
            if (segment.poison) sum = nan_value();
            store_global(static_cast<T*>(p.grad_initial_state) + place.state(p, v) + s,
                         static_cast<T>(sum));
        }
    }
}

// Gradients of a token's values from those of its normalised ones: d(v / |v|) = (dv - v (v dv) / |v|²) / |v|.
template <class C>
LSM_DEVICE void through_norm(ConvParams const& p, Place<C> const& place, Filter<C> const& filter,
                             Batch<C> const& x, Batch<C> const& before, int i, int own,
                             float (&dy)[C::kVector]) {
    float value[C::kVector], dot = 0.f;
    LSM_UNROLL
    for (int v = 0; v < C::kVector; ++v) {
        float const pre = convolve<C>(filter, x, before, i, v, own);
        value[v] = p.silu ? pre * logistic(pre) : pre;
        dot += value[v] * dy[v];
    }
    float const inverse = inverse_norm(p, place, value);
    float const along = head_sum<C>(p, dot) * inverse * inverse;
    if (place.channel >= p.normed) return;
    LSM_UNROLL
    for (int v = 0; v < C::kVector; ++v) dy[v] = (dy[v] - value[v] * along) * inverse;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_kernel(ConvParams const p, Segments const segments, int tiles, bool whole,
                    float* partial) {
    using T = typename C::T;
    auto& shared = *reinterpret_cast<SharedStorage<C>*>(dyn_smem());
    Place<C> const place(p, segments, tiles, p.dx);
    if (place.segment.unused()) return;
    Filter<C> const filter(p, place, shared);

    int const reach = static_cast<int>(p.W) - 1;
    float dweight[C::kTaps + 1][C::kVector] = {};
    float grad[C::kTaps][C::kVector] =
        {};  // before the activation, of the tokens from the current one on
    int ages[C::kTaps];
    LSM_UNROLL
    for (int a = 0; a < C::kTaps; ++a) ages[a] = C::kTaps;

    // The batch behind the run is there for the gradients of its first tokens only.
    Batch<C> x, before, dy, dx;
    int const tokens = clamp_count(place.stop - place.t, C::kRun + C::kBatch);
    int const whole_batches = (tokens + C::kBatch - 1) / C::kBatch;
    i64 const readable =
        place.t + tokens + reach < place.end ? place.t + tokens + reach : place.end;
    int const batches =
        tokens == 0 ? 0 : static_cast<int>((readable - place.t + C::kBatch - 1) / C::kBatch);
    if (batches > 0)
        load_inputs(x, p, place, place.t + (batches - 1) * C::kBatch,
                    clamp_count(readable - place.t - (batches - 1) * C::kBatch, C::kBatch), whole);
    LSM_UNROLL_BY(1)
    for (int b = batches - 1; b >= 0; --b) {
        i64 const t = place.t + b * C::kBatch;
        int const count = clamp_count(readable - t, C::kBatch);
        if (b > 0) {
            load_inputs(before, p, place, t - C::kBatch, C::kBatch, whole);
        } else {
            load_before(before, p, place, t, whole);
        }
        load_batch(dy, p.grad_y, place, t, count, whole);
        LSM_UNROLL
        for (int i = C::kBatch - 1; i >= 0; --i) {
            if (!C::kChannelLast && t + i < place.begin) continue;
            int age = C::kTaps;
            if (p.seq_idx != nullptr && i < count) age = place.age(p, t + i);
            int const own = age < reach ? age : reach;
            LSM_UNROLL
            for (int a = C::kTaps - 1; a > 0; --a) ages[a] = ages[a - 1];
            ages[0] = age;
            bool const inside = i < count, mine = b * C::kBatch + i < tokens;
            if (C::kChannelLast && p.norm > 0)
                through_norm(p, place, filter, x, before, i, own, dy[i]);
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) {
                float g = dy[i][v];
                if (p.silu) {
                    float const pre = convolve<C>(filter, x, before, i, v, own);
                    float const open = logistic(pre);
                    g *= open * (1.f + pre * (1.f - open));
                }
                LSM_UNROLL
                for (int a = C::kTaps - 1; a > 0; --a) grad[a][v] = grad[a - 1][v];
                grad[0][v] = g = inside ? g : 0.f;
                float sum = 0.f;
                LSM_UNROLL
                for (int a = 0; a < C::kTaps; ++a) {
                    if (a <= reach && a <= ages[a]) sum += filter.weight[a][v] * grad[a][v];
                    if (mine && a <= own) dweight[a][v] += g * input<C>(x, before, i, a, v);
                }
                if (mine) dweight[C::kTaps][v] += g;
                dx[i][v] = sum;
            }
            i64 const column = t + i - (place.end - p.S);
            if (p.grad_final_state != nullptr && mine && column >= 0 && column < p.S &&
                place.segment.sequence >= 0) {
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v)
                    if (v < place.channels)
                        dx[i][v] += load_float<T>(p.grad_final_state, place.state(p, v) + column);
            }
        }
        if (b < whole_batches)
            store_batch(dx, p.dx, place, t, clamp_count(place.t + tokens - t, C::kBatch), whole);
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) x[i][v] = before[i][v];
        }
    }
    store_initial_grad(p, place, filter, grad);
    store_weight_grad(p, place, shared, dweight, partial);
}

// The weight's gradient: the segments' sums, by kGroups threads per number and then in their order.
constexpr int kGroups = 8;

template <class T, int kTaps>
__global__ void __launch_bounds__(32 * kGroups)
    sum_partials(ConvParams const p, Segments const segments, float const* partial, int tiles) {
    auto& shared = *reinterpret_cast<float(*)[kGroups][32]>(dyn_smem());
    int const lane = threadIdx.x % 32, group = threadIdx.x / 32;
    int const a = blockIdx.x / static_cast<unsigned>(tiles);
    i64 const channel = static_cast<i64>(blockIdx.x % static_cast<unsigned>(tiles)) * 32 + lane;
    float sum = 0.f;
    if (channel < p.D) {
        for (i64 r = group; r < segments.count; r += kGroups)
            if (!segments[r].unused())
                sum += load_global(partial + (r * (kTaps + 1) + a) * p.D + channel);
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group != 0 || channel >= p.D) return;
    for (int g = 1; g < kGroups; ++g) sum += shared[g][lane];
    auto const store = [&](void* to, i64 i) {
        if (p.weight_dtype == Dtype::f32) {
            store_global(static_cast<float*>(to) + i, sum);
        } else {
            store_global(static_cast<T*>(to) + i, static_cast<T>(sum));
        }
    };
    if (a < p.W) store(p.dweight, channel * p.W + p.W - 1 - a);
    if (a == kTaps && p.dbias != nullptr) store(p.dbias, channel);
}

}  // namespace lsm::conv
