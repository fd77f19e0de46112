// The selective scan on CUDA: states over lanes (docs/kernels/scan.md).
//
// A block owns kThreads / L neighbouring channels of one sequence; a channel's states lie in L lanes, four each. Per
// tile of tokens the block's threads first take the roles of loaders, one token and channel each: softplus once, dt
// and dt u to shared memory, B and C widened beside them. Then every lane walks the tile's tokens with its states in
// registers; sums over states go through shuffles. More states than fit go in rounds, whose sums over states meet in
// the workspace.
#pragma once

#include "kernels/scan/numbers.cuh"
#include "kernels/segments.cuh"
#include "params/selective_scan.h"

namespace lsm::selective_kernel {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMine = 4;  // states of a lane

LSM_DEVICE float real_product(float a, float b) {
    return a * b;
}
LSM_DEVICE float real_product(Complex a, Complex b) {
    return fmaf(a.re, b.re, -a.im * b.im);
}
LSM_DEVICE float scaled(float a, float x) {
    return a * x;
}
LSM_DEVICE Complex scaled(Complex a, float x) {
    return {a.re * x, a.im * x};
}
// 2^a, of a decay's logarithm: not positive where it is legal.
LSM_DEVICE float power_of_two(float a) {
    return exp2_approx(a);
}
LSM_DEVICE Complex power_of_two(Complex a) {
    return scaled(exponential(Complex{0.f, 0.693147181f * a.im}), exp2_approx(a.re));
}
LSM_DEVICE float shuffle_xor(float x, int d) {
    return __shfl_xor_sync(0xffffffffu, x, d);
}
LSM_DEVICE Complex shuffle_xor(Complex x, int d) {
    return {shuffle_xor(x.re, d), shuffle_xor(x.im, d)};
}

// Numbers N in registers of tensors of T; kChannelBC: B or C may be a channel's.
template <class T_, class N_, int L_, bool kChannelBC_>
struct Kind {
    using T = T_;
    using N = N_;
    static constexpr int L = L_;  // lanes of a channel
    static constexpr bool kChannelBC = kChannelBC_;
    static constexpr bool kIsComplex = std::is_same_v<N, Complex>;
    using TokenNumber = std::conditional_t<kIsComplex, N, T>;    // of B and C of tokens
    static constexpr int kChannels = kThreads / L;               // of a block
    static constexpr int kStates = L * kMine;                    // of a round
    static constexpr int kTile = kIsComplex ? 16 : 32;           // tokens
    static constexpr int kPairs = kTile * kChannels / kThreads;  // token and channel of a thread
    static constexpr int kMicro = kIsComplex ? 4 : 8;  // tokens whose states the backward keeps
    static constexpr float kReadFactor = kIsComplex ? 2.f : 1.f;  // y = 2 Re(C h) of pairs

    struct Shared {
        float dt[kTile][kChannels], du[kTile][kChannels], y[kTile][kChannels];
        N b[kTile][kStates], c[kTile][kStates];
    };
    struct SharedBackward : Shared {
        float dy[kTile][kChannels], ddt[kTile][kChannels], ddu[kTile][kChannels];
        N parked[kTile / kMicro][kThreads][kMine];
        N db[kTile][kStates][kWarps], dc[kTile][kStates][kWarps];
    };
};

// The workspace. Sums over the states of earlier rounds are null where there is one round.
struct Scratch {
    float* y = nullptr;  // [B T][D]
    float *ddt = nullptr, *ddu = nullptr;
    void* checkpoints = nullptr;  // [tile of a sequence][D][S], tiles numbered over all sequences
    void* tokens = nullptr;       // [2][blocks of channels][B T][S]: shares of dB and dC
    float* channels = nullptr;    // [2][N][D]: of dD and the bias
    void* states = nullptr;       // [1 or 3][S][N][D]: of dA, and of channels' dB and dC
};

template <class T>
LSM_DEVICE float read(Rows const& r, i64 batch, i64 token, i64 channel) {
    return static_cast<float>(
        load_global(static_cast<T const*>(r.data) + batch * r.batch + token * r.time + channel));
}
template <class T>
LSM_DEVICE void write(Rows const& r, i64 batch, i64 token, i64 channel, float x) {
    store_global(static_cast<T*>(r.data) + batch * r.batch + token * r.time + channel,
                 static_cast<T>(x));
}

// What a thread knows of its block, channel and states.
template <class K>
struct Block {
    using T = typename K::T;
    using N = typename K::N;
    SelectiveParams const& p;
    Segment segment;  // a whole sequence
    i64 sequence, batch, begin, end;
    i64 group, first;  // channels [first, first + count)
    i64 part;          // of the blocks of a sequence
    int count, s0;     // states of this round: [s0, s0 + K::kStates)
    int lane, own;     // of the channel's lanes; the thread's channel
    N a_log2[kMine];
    N own_b[kMine], own_c[kMine];  // where they are the channel's

    LSM_DEVICE Block(SelectiveParams const& p, Segments const& plan, unsigned blocks_of_group,
                     int s0)
        : p(p), s0(s0) {
        unsigned const per_sequence = blocks_of_group * static_cast<unsigned>(p.G);
        segment = plan[blockIdx.x / per_sequence];
        part = blockIdx.x % per_sequence;
        i64 const channels = p.D / p.G, at = part % blocks_of_group * K::kChannels;
        group = part / blocks_of_group;
        first = group * channels + at;
        count = static_cast<int>(channels - at < K::kChannels ? channels - at : K::kChannels);
        sequence = segment.sequence, batch = segment.batch;
        begin = segment.t0, end = segment.t1;
        lane = threadIdx.x % K::L, own = threadIdx.x / K::L;
        load_constants(p.A, true, a_log2);
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) a_log2[s] = scaled(a_log2[s], 1.44269504f);
        if constexpr (K::kChannelBC) {
            load_constants(p.b.data, p.channel_B, own_b);
            load_constants(p.c.data, p.channel_C, own_c);
        }
    }
    LSM_DEVICE void load_constants(void const* from, bool wanted, N (&x)[kMine]) const {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            x[s] = wanted && inside(s)
                       ? load_global(static_cast<N const*>(from) + (first + own) * p.S + state(s))
                       : number<N>(0.f);
        }
    }
    LSM_DEVICE int column(int s) const { return lane * kMine + s; }  // of the round's states
    LSM_DEVICE i64 state(int s) const { return s0 + column(s); }
    LSM_DEVICE bool inside(int s) const { return own < count && state(s) < p.S; }
    LSM_DEVICE i64 states_at(int s) const {
        return (sequence * p.D + first + own) * p.S + state(s);
    }
    LSM_DEVICE void load_states(void const* from, N (&h)[kMine]) const {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            h[s] = from != nullptr && inside(s)
                       ? load_global(static_cast<N const*>(from) + states_at(s))
                       : number<N>(0.f);
        }
    }
    LSM_DEVICE void store_states(void* to, N const (&h)[kMine]) const {
        if (to == nullptr) return;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (inside(s)) store_global(static_cast<N*>(to) + states_at(s), h[s]);
        }
    }
    LSM_DEVICE float channel(void const* data, int c) const {
        return data != nullptr && c < count
                   ? load_global(static_cast<float const*>(data) + first + c)
                   : 0.f;
    }
    // f(token of the tile, channel of the block) for the thread's pairs, all of one channel.
    template <class F>
    LSM_DEVICE void pairs(F const& f) const {
        LSM_UNROLL
        for (int i = 0; i < K::kPairs; ++i) {
            int const pair = threadIdx.x + i * kThreads;
            f(pair / K::kChannels, pair % K::kChannels);
        }
    }
    // The token of a position, or -1: past the end, or of an order that is none.
    LSM_DEVICE i64 token_at(i64 position) const {
        if (position >= end || p.order == nullptr) return position < end ? position : -1;
        i64 const token = load_global(p.order + position);
        return token >= 0 && token < p.T ? token : -1;
    }
    // f(token of the row, row of the tile, channel of the block) for the thread's pairs that exist.
    template <class F>
    LSM_DEVICE void existing_pairs(i64 t, F const& f) const {
        pairs([&](int i, int c) {
            i64 const token = c < count ? token_at(t + i) : -1;
            if (token >= 0) f(token, i, c);
        });
    }
    // A pair's place in the sums of rounds.
    LSM_DEVICE i64 sum_at(i64 token, int c) const {
        return (batch * p.T + token) * p.D + first + c;
    }

    // B and C, dt and dt u of a tile; tokens past the end have dt = 0, which leaves states alone.
    LSM_DEVICE void load_tile(typename K::Shared& shared, i64 t) const {
        for (int i = threadIdx.x; i < K::kTile * K::kStates; i += kThreads) {
            int const row = i / K::kStates, s = i % K::kStates;
            i64 const token = token_at(t + row);
            bool const there = token >= 0 && s0 + s < p.S;
            shared.b[row][s] = token_number(p.b, there && !p.channel_B, token, s);
            shared.c[row][s] = token_number(p.c, there && !p.channel_C, token, s);
        }
        pairs([&](int row, int c) {
            i64 const token = c < count ? token_at(t + row) : -1;
            float const dt = token >= 0 ? step_size(token, c) : 0.f;
            float const u = token >= 0 ? read<T>(p.u, batch, token, first + c) : 0.f;
            shared.dt[row][c] = dt, shared.du[row][c] = dt * u;
        });
    }
    LSM_DEVICE N token_number(Rows const& r, bool there, i64 token, int s) const {
        if (!there) return number<N>(0.f);
        auto const x = load_global(static_cast<typename K::TokenNumber const*>(r.data) +
                                   batch * r.batch + token * r.time + group * r.head + s0 + s);
        return static_cast<N>(x);
    }
    LSM_DEVICE float raw_step(i64 token, int c) const {
        return read<T>(p.dt, batch, token, first + c) + channel(p.dt_bias, c);
    }
    LSM_DEVICE float step_size(i64 token, int c) const {
        float const x = raw_step(token, c);
        return p.softplus ? fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))) : x;
    }
    // One of the two is zero: a sum is no branch in the innermost loop.
    LSM_DEVICE N b(typename K::Shared const& shared, int token, int s) const {
        N const x = shared.b[token][column(s)];
        if constexpr (K::kChannelBC) return add(x, own_b[s]);
        return x;
    }
    LSM_DEVICE N c(typename K::Shared const& shared, int token, int s) const {
        N const x = shared.c[token][column(s)];
        if constexpr (K::kChannelBC) return add(x, own_c[s]);
        return x;
    }
    // h after a token; y, the lane's share of what C reads.
    LSM_DEVICE float walk(typename K::Shared const& shared, int token, N (&h)[kMine]) const {
        float const dt = shared.dt[token][own], du = shared.du[token][own];
        float y = 0.f;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            h[s] = multiply_add(power_of_two(scaled(a_log2[s], dt)), h[s],
                                scaled(b(shared, token, s), du));
            y += real_product(c(shared, token, s), h[s]);
        }
        return K::kReadFactor * y;
    }
    LSM_DEVICE static float over_states(float x) {
        LSM_UNROLL
        for (int d = 1; d < K::L; d *= 2) x += shuffle_xor(x, d);
        return x;
    }
    LSM_DEVICE static N over_channels(N x) {
        LSM_UNROLL
        for (int d = K::L; d < 32; d *= 2) x = add(x, shuffle_xor(x, d));
        return x;
    }
    LSM_DEVICE static void fill(N (&x)[kMine], float value) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) x[s] = number<N>(value);
    }
    // NaN to every token of a tensor.
    LSM_DEVICE void poison_tokens(Rows const& rows) const {
        if (rows.data == nullptr) return;
        for (i64 i = threadIdx.x; i < (end - begin) * count; i += kThreads)
            write<T>(rows, batch, begin + i / count, first + i % count, nan_value());
    }
};

}  // namespace lsm::selective_kernel
