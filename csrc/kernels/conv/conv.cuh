// The short convolution and its gradients, each one pass over memory.
//
// A thread owns kVector channels of a run of kRun tokens and walks it in batches of kBatch >= W - 1 tokens, with the
// batch before in registers: forwards in time, or for the gradients backwards, so that dx_t is complete, and stored in
// the place of the token just read, when the walk is at t. What lies side by side in memory, channels or tokens, decides
// how threads are laid out and nothing else. A block owns a tile of channels of a segment (kernels/segments.cuh):
// kLanes threads along channels, kRuns along time. Grid: (record, tile of channels).
#pragma once

#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "params/conv.h"

namespace lsm::conv {

// W: taps, the smallest supported number that holds the actual one.
template <class Element, bool kIsChannelLast, int W>
struct Config {
    using T = Element;
    static constexpr bool kChannelLast = kIsChannelLast;
    static constexpr int kTaps = W;
    static constexpr int kVector = !kChannelLast ? 1 : W <= 4 ? 4 : 2;  // of what registers hold
    static constexpr int kBatch = kChannelLast ? W : 8;
    static constexpr int kRun = 8 * W;
    static constexpr int kThreads = 256;
    static constexpr int kLanes = kChannelLast ? 32 : 8;
    static constexpr int kRuns = kThreads / kLanes;
    static constexpr int kTile = kLanes * kVector;  // channels of a block
    static constexpr int kSegment = kRuns * kRun;   // tokens of a block
    static constexpr int kPiece = 16 / sizeof(T);   // elements of an access along time
    static_assert(kBatch >= W - 1 && kRun % kBatch == 0);
};

template <class C>
struct SharedStorage {
    float weight[C::kTaps][C::kTile];  // by age: the current token's first
    float bias[C::kTile];
    float sum[C::kRuns][C::kTile];  // of the weight's gradient
};

template <class C>
using Batch = float[C::kBatch][C::kVector];

template <class T, int N>
struct alignas(N * sizeof(T)) Piece {
    T element[N];
};

LSM_DEVICE float not_a_number() {
    return __int_as_float(0x7fffffff);
}

template <class T>
LSM_DEVICE float load_float(void const* p, i64 i) {
    return static_cast<float>(load_global(static_cast<T const*>(p) + i));
}

// Of weights and biases: float32, or like x.
template <class T>
LSM_DEVICE float load_weight(ConvParams const& p, void const* from, i64 i) {
    return p.weight_dtype == Dtype::f32 ? load_float<float>(from, i) : load_float<T>(from, i);
}

// Where a thread works.
template <class C>
struct Place {
    Segment segment;
    i64 begin, end;  // of the sequence; `end` only as far as this segment's last tokens can tell
    i64 t;           // first token of the run
    i64 channel;     // first of kVector
    int channels;    // of them inside D, at most kVector
    int lane, run;   // of the block
    i64 record, tile;

    LSM_DEVICE Place(ConvParams const& p, Segments const& segments, int tiles) {
        record = blockIdx.x / static_cast<unsigned>(tiles);
        tile = blockIdx.x % static_cast<unsigned>(tiles);
        segment = segments[record];
        int const tid = threadIdx.x;
        lane = C::kChannelLast ? tid % C::kLanes : tid / C::kRuns;
        run = C::kChannelLast ? tid / C::kLanes : tid % C::kRuns;
        t = segment.t0 + run * C::kRun;
        channel = tile * C::kTile + lane * C::kVector;
        i64 const left = p.D - channel;
        channels = left < 0 ? 0 : left < C::kVector ? static_cast<int>(left) : C::kVector;
        begin = segments[segment.first].t0;
        // Far enough to know of every token here whether the final state holds it.
        i64 const known = segment.t1 + p.S + p.W;
        i64 last = record;
        end = segment.t1;
        while (!segments[last].is_last && end < known) end = segments[++last].t1;
    }

    LSM_DEVICE i64 offset(Strided const& x, i64 token) const {
        return segment.batch * x.batch + token * x.time + channel * x.channel;
    }

    LSM_DEVICE i64 state(ConvParams const& p, int v) const {
        return (static_cast<i64>(segment.sequence) * p.D + channel + v) * p.S;
    }

    // How many tokens before `token` are of its sequence, as far as the taps reach.
    LSM_DEVICE int age(ConvParams const& p, i64 token) const {
        if (p.seq_idx == nullptr) return C::kTaps;
        int32_t const* const index = p.seq_idx + segment.batch * p.T + token;
        int a = 0;
        while (a < C::kTaps && token - a > 0 && index[-a] == index[-a - 1]) ++a;
        return a;
    }
};

// Tokens [token, token + count) of a run; zeros behind them and past the last channel. `whole`: every 16-byte piece of
// a row is aligned and inside.
template <class C>
LSM_DEVICE void load_batch(Batch<C>& x, Strided const& from, Place<C> const& place, i64 token,
                           int count, bool whole) {
    using T = typename C::T;
    T const* const at = static_cast<T const*>(from.data) + place.offset(from, token);
    LSM_UNROLL
    for (int i = 0; i < C::kBatch; ++i) {
        if constexpr (C::kChannelLast) {
            if (whole) {
                Piece<T, C::kVector> piece = {};
                if (i < count && place.channels > 0)
                    piece = load_global(
                        reinterpret_cast<Piece<T, C::kVector> const*>(at + i * from.time));
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v) x[i][v] = static_cast<float>(piece.element[v]);
            } else {
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v)
                    x[i][v] = i < count && v < place.channels
                                  ? static_cast<float>(load_global(at + i * from.time + v))
                                  : 0.f;
            }
        } else {
            if (whole && count == C::kBatch) {
                if (i % C::kPiece != 0) continue;
                Piece<T, C::kPiece> piece = {};
                if (place.channels > 0)
                    piece = load_global(reinterpret_cast<Piece<T, C::kPiece> const*>(at + i));
                LSM_UNROLL
                for (int j = 0; j < C::kPiece; ++j)
                    x[i + j][0] = static_cast<float>(piece.element[j]);
            } else {
                x[i][0] =
                    i < count && place.channels > 0 ? static_cast<float>(load_global(at + i)) : 0.f;
            }
        }
    }
    if (place.segment.poison) {
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) x[i][v] = not_a_number();
        }
    }
}

template <class C>
LSM_DEVICE void store_batch(Batch<C> const& x, Strided const& to, Place<C> const& place, i64 token,
                            int count, bool whole) {
    using T = typename C::T;
    T* const at = static_cast<T*>(to.data) + place.offset(to, token);
    LSM_UNROLL
    for (int i = 0; i < C::kBatch; ++i) {
        if constexpr (C::kChannelLast) {
            if (i >= count) continue;
            if (whole) {
                Piece<T, C::kVector> piece;
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v) piece.element[v] = static_cast<T>(x[i][v]);
                if (place.channels > 0)
                    store_global(reinterpret_cast<Piece<T, C::kVector>*>(at + i * to.time), piece);
            } else {
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v)
                    if (v < place.channels)
                        store_global(at + i * to.time + v, static_cast<T>(x[i][v]));
            }
        } else {
            if (place.channels == 0) continue;
            if (whole && count == C::kBatch) {
                if (i % C::kPiece != 0) continue;
                Piece<T, C::kPiece> piece;
                LSM_UNROLL
                for (int j = 0; j < C::kPiece; ++j) piece.element[j] = static_cast<T>(x[i + j][0]);
                store_global(reinterpret_cast<Piece<T, C::kPiece>*>(at + i), piece);
            } else if (i < count) {
                store_global(at + i, static_cast<T>(x[i][0]));
            }
        }
    }
}

// The last inputs before `token`, at the end of a batch: of the sequence, or of its initial state.
template <class C>
LSM_DEVICE void load_before(Batch<C>& x, ConvParams const& p, Place<C> const& place, i64 token,
                            bool whole) {
    using T = typename C::T;
    LSM_UNROLL
    for (int i = 0; i < C::kBatch; ++i) {
        i64 const source = token - C::kBatch + i;
        bool const wanted = C::kBatch - i < p.W && token < place.segment.t1;
        if constexpr (C::kChannelLast) {
            if (whole && wanted && source >= place.begin && place.channels > 0) {
                auto const piece = load_global(reinterpret_cast<Piece<T, C::kVector> const*>(
                    static_cast<T const*>(p.x.data) + place.offset(p.x, source)));
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v) x[i][v] = static_cast<float>(piece.element[v]);
                continue;
            }
        }
        LSM_UNROLL
        for (int v = 0; v < C::kVector; ++v) {
            x[i][v] = 0.f;
            if (!wanted || v >= place.channels) continue;
            if (source >= place.begin) {
                x[i][v] = load_float<T>(p.x.data, place.offset(p.x, source) + v * p.x.channel);
            } else if (p.initial_state != nullptr && place.segment.sequence >= 0) {
                x[i][v] =
                    load_float<T>(p.initial_state, place.state(p, v) + p.S + source - place.begin);
            }
        }
    }
}

template <class C>
struct Filter {
    float weight[C::kTaps][C::kVector], bias[C::kVector];

    // All threads of the block take part.
    LSM_DEVICE Filter(ConvParams const& p, Place<C> const& place, SharedStorage<C>& shared) {
        using T = typename C::T;
        int const taps = static_cast<int>(p.W);
        i64 const first = place.tile * C::kTile;
        i64 const inside = p.D - first < C::kTile ? p.D - first : C::kTile;
        for (int i = threadIdx.x; i < C::kTile * C::kTaps; i += C::kThreads)
            shared.weight[i / C::kTile][i % C::kTile] = 0.f;
        __syncthreads();
        for (int i = threadIdx.x; i < inside * taps; i += C::kThreads)
            shared.weight[taps - 1 - i % taps][i / taps] =
                load_weight<T>(p, p.weight, first * taps + i);
        for (int i = threadIdx.x; i < C::kTile; i += C::kThreads)
            shared.bias[i] =
                p.bias != nullptr && i < inside ? load_weight<T>(p, p.bias, first + i) : 0.f;
        __syncthreads();
        LSM_UNROLL
        for (int v = 0; v < C::kVector; ++v) {
            int const c = place.lane * C::kVector + v;
            LSM_UNROLL
            for (int a = 0; a < C::kTaps; ++a) weight[a][v] = shared.weight[a][c];
            bias[v] = shared.bias[c];
        }
    }
};

// Row i of a batch, a rows before it.
template <class C>
LSM_DEVICE float input(Batch<C> const& x, Batch<C> const& before, int i, int a, int v) {
    return i >= a ? x[i - a][v] : before[C::kBatch + i - a][v];
}

LSM_DEVICE float logistic(float x) {
    return 1.f / (1.f + exp2_approx(-1.44269504f * x));
}

// Before the activation. Taps that are not there have no input either, not a weight of zero: 0 · inf is not 0.
template <class C>
LSM_DEVICE float convolve(Filter<C> const& filter, Batch<C> const& x, Batch<C> const& before, int i,
                          int v, int reach) {
    float sum = filter.bias[v];
    LSM_UNROLL
    for (int a = 0; a < C::kTaps; ++a)
        if (a <= reach) sum += filter.weight[a][v] * input<C>(x, before, i, a, v);
    return sum;
}

// The last inputs of a sequence, or of its initial state where it is short; by the last segment's block.
template <class C>
LSM_DEVICE void store_state(ConvParams const& p, Place<C> const& place) {
    using T = typename C::T;
    if (p.final_state == nullptr || !place.segment.is_last || place.segment.sequence < 0) return;
    for (int v = 0; v < place.channels; ++v) {
        for (i64 s = place.run; s < p.S; s += C::kRuns) {
            i64 const token = place.segment.t1 - p.S + s;
            float x = 0.f;
            if (place.segment.poison) {
                x = not_a_number();
            } else if (token >= place.begin) {
                x = load_float<T>(p.x.data, place.offset(p.x, token) + v * p.x.channel);
            } else if (p.initial_state != nullptr) {
                x = load_float<T>(p.initial_state, place.state(p, v) + p.S + token - place.begin);
            }
            store_global(static_cast<T*>(p.final_state) + place.state(p, v) + s, static_cast<T>(x));
        }
    }
}

LSM_DEVICE int clamp_count(i64 count, int most) {
    return count < 0 ? 0 : count < most ? static_cast<int>(count) : most;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_kernel(ConvParams const p, Segments const segments, int tiles, bool whole) {
    auto& shared = *reinterpret_cast<SharedStorage<C>*>(dyn_smem());
    Place<C> const place(p, segments, tiles);
    if (place.segment.unused()) return;
    Filter<C> const filter(p, place, shared);
    store_state(p, place);

    int const reach = static_cast<int>(p.W) - 1;
    Batch<C> x, before, y;
    load_before(before, p, place, place.t, whole);
    LSM_UNROLL_BY(1)
    for (int r = 0; r < C::kRun; r += C::kBatch) {
        i64 const t = place.t + r;
        int const count = clamp_count(place.segment.t1 - t, C::kBatch);
        if (count == 0) break;
        load_batch(x, p.x, place, t, count, whole);
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            int own = reach;
            if (p.seq_idx != nullptr && i < count) {
                int const age = place.age(p, t + i);
                own = age < reach ? age : reach;
            }
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) {
                float const pre = convolve<C>(filter, x, before, i, v, own);
                y[i][v] = p.silu ? pre * logistic(pre) : pre;
            }
        }
        store_batch(y, p.y, place, t, count, whole);
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) before[i][v] = x[i][v];
        }
    }
}

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
            if (segment.poison) sum = not_a_number();
            store_global(static_cast<T*>(p.grad_initial_state) + place.state(p, v) + s,
                         static_cast<T>(sum));
        }
    }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward_kernel(ConvParams const p, Segments const segments, int tiles, bool whole,
                    float* partial) {
    using T = typename C::T;
    auto& shared = *reinterpret_cast<SharedStorage<C>*>(dyn_smem());
    Place<C> const place(p, segments, tiles);
    if (place.segment.unused()) return;
    Filter<C> const filter(p, place, shared);

    int const reach = static_cast<int>(p.W) - 1;
    i64 const t1 = place.segment.t1;
    float dweight[C::kTaps + 1][C::kVector] = {};
    float grad[C::kTaps][C::kVector] =
        {};  // before the activation, of the tokens from the current one on
    int ages[C::kTaps];
    LSM_UNROLL
    for (int a = 0; a < C::kTaps; ++a) ages[a] = C::kTaps;

    // The batch behind the run is there for the gradients of its first tokens only.
    Batch<C> x, before, dy, dx;
    int const tokens = clamp_count(t1 - place.t, C::kRun);
    int const whole_batches = (tokens + C::kBatch - 1) / C::kBatch;
    i64 const readable =
        place.t + tokens + reach < place.end ? place.t + tokens + reach : place.end;
    int const batches = tokens == 0 ? 0
                                    : clamp_count((readable - place.t + C::kBatch - 1) / C::kBatch,
                                                  C::kRun / C::kBatch + 1);
    if (batches > 0)
        load_batch(x, p.x, place, place.t + (batches - 1) * C::kBatch,
                   clamp_count(readable - place.t - (batches - 1) * C::kBatch, C::kBatch), whole);
    LSM_UNROLL_BY(1)
    for (int b = batches - 1; b >= 0; --b) {
        i64 const t = place.t + b * C::kBatch;
        int const count = clamp_count(readable - t, C::kBatch);
        if (b > 0) {
            load_batch(before, p.x, place, t - C::kBatch, C::kBatch, whole);
        } else {
            load_before(before, p, place, t, whole);
        }
        load_batch(dy, p.grad_y, place, t, count, whole);
        LSM_UNROLL
        for (int i = C::kBatch - 1; i >= 0; --i) {
            int age = C::kTaps;
            if (p.seq_idx != nullptr && i < count) age = place.age(p, t + i);
            int const own = age < reach ? age : reach;
            LSM_UNROLL
            for (int a = C::kTaps - 1; a > 0; --a) ages[a] = ages[a - 1];
            ages[0] = age;
            bool const inside = i < count, mine = b * C::kBatch + i < tokens;
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

// ---- Launching ----

inline bool aligned(Strided const& x, i64 bytes, i64 element, bool channel_last) {
    i64 const unit = bytes / element;
    return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.batch % unit == 0 &&
           (channel_last ? x.time : x.channel) % unit == 0;
}

template <class C>
bool is_whole(ConvParams const& p, Strided const& x, Strided const& y, Strided const& z) {
    constexpr i64 kElement = sizeof(typename C::T);
    i64 const bytes = C::kChannelLast ? C::kVector * kElement : 16;
    bool ok = C::kChannelLast ? p.D % C::kVector == 0 : p.cu_seqlens == nullptr;
    for (Strided const& t : {x, y, z}) ok = ok && aligned(t, bytes, kElement, C::kChannelLast);
    return ok;
}

constexpr i64 kAlign = 256;

inline i64 round_up(i64 bytes) {
    return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Calls f(Config{}).
template <bool kChannelLast, class F>
void with_config(ConvParams const& p, F const& f) {
    auto const typed = [&](auto element) {
        using T = decltype(element);
        if (p.W <= 4) return f(Config<T, kChannelLast, 4>{});
        return f(Config<T, kChannelLast, 8>{});
    };
    switch (p.dtype) {
        case Dtype::bf16:
            return typed(bf16{});
        case Dtype::f16:
            return typed(half{});
        default:
            return typed(float{});
    }
}

template <bool kChannelLast>
i64 workspace_bytes(ConvParams const& p, bool backward) {
    i64 bytes = 0;
    with_config<kChannelLast>(p, [&](auto config) {
        using C = decltype(config);
        bytes = round_up(segments_bytes(p, C::kSegment));
        if (backward && p.dweight != nullptr)
            bytes += plan_segments(p, C::kSegment, nullptr).count * (C::kTaps + 1) * p.D *
                     static_cast<i64>(sizeof(float));
    });
    return bytes;
}

template <bool kChannelLast>
void run(ConvParams const& p, bool backward, void* workspace, void* stream) {
    with_config<kChannelLast>(p, [&](auto config) {
        using C = decltype(config);
        Segments const plan = plan_segments(p, C::kSegment, workspace);
        i64 const tiles = (p.D + C::kTile - 1) / C::kTile;
        float* const partial = reinterpret_cast<float*>(static_cast<char*>(workspace) +
                                                        round_up(segments_bytes(p, C::kSegment)));
        if (tiles == 0) return;
        build_segments(p, plan, stream);
        dim3 const grid(static_cast<unsigned>(plan.count * tiles)), block(C::kThreads);
        if (!backward) {
            if (plan.count > 0)
                launch(forward_kernel<C>, grid, block, sizeof(SharedStorage<C>), stream, p, plan,
                       static_cast<int>(tiles), is_whole<C>(p, p.x, p.y, p.y));
            return;
        }
        if (plan.count > 0)
            launch(backward_kernel<C>, grid, block, sizeof(SharedStorage<C>), stream, p, plan,
                   static_cast<int>(tiles), is_whole<C>(p, p.x, p.grad_y, p.dx), partial);
        if (p.dweight == nullptr) return;
        int const columns = static_cast<int>((p.D + 31) / 32);
        launch(sum_partials<typename C::T, C::kTaps>,
               dim3(static_cast<unsigned>(columns * (C::kTaps + 1))), dim3(32 * kGroups),
               sizeof(float) * kGroups * 32, stream, p, plan, static_cast<float const*>(partial),
               columns);
    });
}

}  // namespace lsm::conv
