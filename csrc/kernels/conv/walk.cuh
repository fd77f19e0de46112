// How the short convolution and its gradients walk a sequence, each in one pass over memory.
//
// A thread owns kVector channels of a run of kRun tokens and walks it in batches of kBatch >= W - 1 tokens, with the
// batch before in registers: forwards in time, or for the gradients backwards, so that dx_t is complete, and stored in
// the place of the token just read, when the walk is at t. What lies side by side in memory, channels or tokens, decides
// how threads are laid out and where runs are cut, and nothing else. A block owns a tile of channels of a segment
// (kernels/segments.cuh): kLanes threads along channels, kRuns along time. Grid: (record, tile of channels).
//
// Where tokens lie side by side, a run begins where the row that is written is aligned, which no two rows need agree
// on: boundaries of runs, and of segments, are up to kPiece - 1 tokens later than kRun would have them. The first run of
// a sequence has those tokens besides, as the end of a batch that begins before the sequence.
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
    static_assert(kBatch >= W - 1 && kRun % kBatch == 0 && (kChannelLast || kBatch % kPiece == 0));
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
    i64 begin, end;  // of the sequence
    i64 t, stop;     // tokens of the run; what is before the sequence is not
    i64 channel;     // first of kVector
    int channels;    // of them inside D, at most kVector
    int lane, run;   // of the block
    i64 record, tile;

    // `written`: what the walk stores.
    LSM_DEVICE Place(ConvParams const& p, Segments const& segments, int tiles,
                     Strided const& written) {
        record = blockIdx.x / static_cast<unsigned>(tiles);
        tile = blockIdx.x % static_cast<unsigned>(tiles);
        segment = segments[record];
        int const tid = threadIdx.x;
        lane = C::kChannelLast ? tid % C::kLanes : tid / C::kRuns;
        run = C::kChannelLast ? tid / C::kLanes : tid % C::kRuns;
        channel = tile * C::kTile + lane * C::kVector;
        i64 const left = p.D - channel;
        channels = left < 0 ? 0 : left < C::kVector ? static_cast<int>(left) : C::kVector;
        begin = segments[segment.first].t0, end = segment.end;
        t = segment.t0 + run * C::kRun, stop = t + C::kRun;
        i64 last = segment.t1;
        if constexpr (!C::kChannelLast) {
            auto const at = reinterpret_cast<uintptr_t>(static_cast<typename C::T*>(written.data) +
                                                        offset(written, segment.t0));
            int const past = static_cast<int>(at % 16 / sizeof(typename C::T));
            int const shift = past == 0 ? 0 : C::kPiece - past;
            if (!segment.is_last) last = last + shift < end ? last + shift : end;
            t += shift, stop += shift;
            if (shift > 0 && segment.index == 0 && run == 0) t -= C::kBatch;
        }
        stop = stop < last ? stop : last;
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

// Whether a batch of tokens that lie side by side, from `at` on, is aligned and all there.
template <class C>
LSM_DEVICE bool is_line(Place<C> const& place, typename C::T const* at, i64 token, int count) {
    return count == C::kBatch && token >= place.begin && reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// Tokens [token, token + count) of a run; zeros behind them, before the sequence and past the last channel. `whole`: a
// token's channels are aligned and inside.
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
            if (is_line(place, at, token, count)) {
                if (i % C::kPiece != 0) continue;
                Piece<T, C::kPiece> piece = {};
                if (place.channels > 0)
                    piece = load_global(reinterpret_cast<Piece<T, C::kPiece> const*>(at + i));
                LSM_UNROLL
                for (int j = 0; j < C::kPiece; ++j)
                    x[i + j][0] = static_cast<float>(piece.element[j]);
            } else {
                x[i][0] = i < count && token + i >= place.begin && place.channels > 0
                              ? static_cast<float>(load_global(at + i))
                              : 0.f;
            }
        }
    }
    if (place.segment.poison) {
        LSM_UNROLL
        for (int i = 0; i < C::kBatch; ++i) {
            LSM_UNROLL
            for (int v = 0; v < C::kVector; ++v) x[i][v] = nan_value();
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
            if (is_line(place, at, token, count)) {
                if (i % C::kPiece != 0) continue;
                Piece<T, C::kPiece> piece;
                LSM_UNROLL
                for (int j = 0; j < C::kPiece; ++j) piece.element[j] = static_cast<T>(x[i + j][0]);
                store_global(reinterpret_cast<Piece<T, C::kPiece>*>(at + i), piece);
            } else if (i < count && token + i >= place.begin) {
                store_global(at + i, static_cast<T>(x[i][0]));
            }
        }
    }
}

// Rows before the sequence, of a batch from `token` on: what the initial state holds of them.
template <class C>
LSM_DEVICE void load_past(Batch<C>& x, ConvParams const& p, Place<C> const& place, i64 token) {
    if (token >= place.begin || p.initial_state == nullptr || place.segment.sequence < 0) return;
    LSM_UNROLL
    for (int i = 0; i < C::kBatch; ++i) {
        i64 const age = place.begin - token - i;
        if (age <= 0 || age >= p.W) continue;
        LSM_UNROLL
        for (int v = 0; v < C::kVector; ++v) {
            if (v < place.channels)
                x[i][v] = load_float<typename C::T>(p.initial_state, place.state(p, v) + p.S - age);
        }
    }
}

// Inputs of a batch of a run.
template <class C>
LSM_DEVICE void load_inputs(Batch<C>& x, ConvParams const& p, Place<C> const& place, i64 token,
                            int count, bool whole) {
    load_batch(x, p.x, place, token, count, whole);
    if constexpr (!C::kChannelLast) load_past(x, p, place, token);
}

// The last inputs before `token`, at the end of a batch: of the sequence, or of its initial state.
template <class C>
LSM_DEVICE void load_before(Batch<C>& x, ConvParams const& p, Place<C> const& place, i64 token,
                            bool whole) {
    using T = typename C::T;
    LSM_UNROLL
    for (int i = 0; i < C::kBatch; ++i) {
        i64 const source = token - C::kBatch + i;
        bool const wanted = C::kBatch - i < p.W && token < place.stop && source >= place.begin;
        if constexpr (C::kChannelLast) {
            if (whole && wanted && place.channels > 0) {
                auto const piece = load_global(reinterpret_cast<Piece<T, C::kVector> const*>(
                    static_cast<T const*>(p.x.data) + place.offset(p.x, source)));
                LSM_UNROLL
                for (int v = 0; v < C::kVector; ++v) x[i][v] = static_cast<float>(piece.element[v]);
                continue;
            }
        }
        LSM_UNROLL
        for (int v = 0; v < C::kVector; ++v) {
            x[i][v] = wanted && v < place.channels
                          ? load_float<T>(p.x.data, place.offset(p.x, source) + v * p.x.channel)
                          : 0.f;
        }
    }
    if (token < place.stop) load_past(x, p, place, token - C::kBatch);
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

// The sum over a head's channels, which a power of two of neighbouring lanes has.
template <class C>
LSM_DEVICE float head_sum(ConvParams const& p, float x) {
    int const lanes = static_cast<int>(p.norm) / C::kVector;
    for (int d = 1; d < lanes; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

// 1 behind the channels that have a norm; their lanes take part in the sums of others.
template <class C>
LSM_DEVICE float inverse_norm(ConvParams const& p, Place<C> const& place,
                              float const (&value)[C::kVector]) {
    float squares = 0.f;
    LSM_UNROLL
    for (int v = 0; v < C::kVector; ++v) squares += value[v] * value[v];
    float const sum = head_sum<C>(p, squares) + static_cast<float>(p.norm_eps);
    return place.channel < p.normed ? 1.f / sqrtf(sum) : 1.f;
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
                x = nan_value();
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

}  // namespace lsm::conv
