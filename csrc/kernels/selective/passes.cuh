// The selective scan on CUDA: states over lanes (docs/kernels/scan.md).
//
// A block owns kThreads / L neighbouring channels of one sequence; a channel's states lie in L lanes, four each. Per
// tile of tokens the block's threads first take the roles of loaders, one token and channel each: softplus once, dt
// and dt u to shared memory, B and C widened beside them. Then every lane walks the tile's tokens with its states in
// registers; sums over states go through shuffles. More states than fit go in rounds, whose sums over states meet in
// the workspace.
//
// The backward walks forwards once, leaving the states at every tile's beginning in the workspace, then takes the tiles
// from the last to the first: walks each again, keeping the states at every kMicro-th token in shared memory, and then
// those tokens backwards with their states and decays in registers. Shares of dB and dC of a block's channels are
// added over the blocks, in order, by a second kernel, as are the sequences' shares of the channels' gradients.
#pragma once

#include "kernels/scan/numbers.cuh"
#include "kernels/segments.cuh"
#include "kernels/selective/launch.h"

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

LSM_DEVICE float sigmoid(float x) {
    return 1.f / (1.f + expf(-x));
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

template <class K>
__global__ void __launch_bounds__(kThreads, 4)
    forward(SelectiveParams const p, Segments const plan, unsigned blocks_of_group, int s0,
            Scratch const scratch) {
    using T = typename K::T;
    auto& shared = *reinterpret_cast<typename K::Shared*>(dyn_smem());
    Block<K> const block(p, plan, blocks_of_group, s0);
    if (block.segment.unused()) return;
    typename K::N h[kMine];
    if (block.segment.poison) {
        block.poison_tokens(p.y);
        Block<K>::fill(h, nan_value());
        if (block.sequence >= 0) block.store_states(p.final_state, h);
        return;
    }
    bool const is_last = s0 + K::kStates >= p.S;
    block.load_states(p.initial_state, h);
    for (i64 t = block.begin; t < block.end; t += K::kTile) {
        block.load_tile(shared, t);
        __syncthreads();
        for (int i = 0; i < K::kTile; ++i) {
            float const y = block.over_states(block.walk(shared, i, h));
            if (block.lane == 0) shared.y[i][block.own] = y;
        }
        __syncthreads();
        block.existing_pairs(t, [&](i64 token, int row, int c) {
            float y = shared.y[row][c];
            if (s0 > 0) y += load_global(scratch.y + block.sum_at(token, c));
            if (!is_last) return store_global(scratch.y + block.sum_at(token, c), y);
            if (p.skip != nullptr) {
                float const u = read<T>(p.u, block.batch, token, block.first + c);
                y = fmaf(block.channel(p.skip, c), u, y);
            }
            if (p.z.data != nullptr) {
                float const z = read<T>(p.z, block.batch, token, block.first + c);
                y *= z * sigmoid(z);
            }
            write<T>(p.y, block.batch, token, block.first + c, y);
        });
        __syncthreads();
    }
    block.store_states(p.final_state, h);
}

// The number of tiles of earlier sequences; packed ones have room for one more each.
template <class K>
LSM_DEVICE i64 first_tile(SelectiveParams const& p, i64 sequence, i64 begin) {
    if (p.cu_seqlens == nullptr) return sequence * ((p.T + K::kTile - 1) / K::kTile);
    return begin / K::kTile + sequence;
}

template <class K>
__global__ void __launch_bounds__(kThreads, 2)
    backward(SelectiveParams const p, Segments const plan, unsigned blocks_of_group, int s0,
             Scratch const scratch) {
    using T = typename K::T;
    using N = typename K::N;
    auto& shared = *reinterpret_cast<typename K::SharedBackward*>(dyn_smem());
    Block<K> const block(p, plan, blocks_of_group, s0);
    if (block.segment.unused()) return;
    int const warp = threadIdx.x / 32;
    i64 const channel0 = block.sequence * p.D + block.first;
    i64 const parts = i64(blocks_of_group) * p.G;
    bool const is_last = s0 + K::kStates >= p.S;
    // dB, then dC, of a token.
    auto const share = [&](int which, i64 token, i64 s) {
        i64 const at = (which * parts + block.part) * p.B * p.T + block.batch * p.T + token;
        return static_cast<N*>(scratch.tokens) + at * p.S + s;
    };
    // Of dA, and of channels' dB and dC.
    auto const store_state_shares = [&](int which, N const(&x)[kMine]) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (!block.inside(s)) continue;
            store_global(static_cast<N*>(scratch.states) +
                             (which * p.S + block.state(s)) * p.N * p.D + channel0 + block.own,
                         x[s]);
        }
    };
    auto const store_channel_shares = [&](float skip, float bias) {
        store_global(scratch.channels + channel0 + threadIdx.x, skip);
        store_global(scratch.channels + p.N * p.D + channel0 + threadIdx.x, bias);
    };
    N h[kMine], g[kMine];
    if (block.segment.poison) {
        block.poison_tokens(p.du), block.poison_tokens(p.ddt), block.poison_tokens(p.dz);
        i64 const columns = p.S - s0 < K::kStates ? p.S - s0 : K::kStates;
        for (i64 i = threadIdx.x; i < (block.end - block.begin) * columns; i += kThreads) {
            for (int which = 0; which < 2; ++which)
                store_global(share(which, block.begin + i / columns, s0 + i % columns),
                             number<N>(nan_value()));
        }
        if (block.sequence < 0) return;
        Block<K>::fill(h, nan_value());
        block.store_states(p.grad_initial_state, h);
        for (int which = 0; which < (K::kChannelBC ? 3 : 1); ++which) store_state_shares(which, h);
        if (static_cast<int>(threadIdx.x) < block.count)
            store_channel_shares(nan_value(), nan_value());
        return;
    }

    i64 const tiles = (block.end - block.begin + K::kTile - 1) / K::kTile;
    i64 const tile0 = first_tile<K>(p, block.sequence, block.begin);
    auto const checkpoint = [&](i64 tile, int s) {
        return static_cast<N*>(scratch.checkpoints) +
               ((tile0 + tile) * p.D + block.first + block.own) * p.S + block.state(s);
    };
    block.load_states(p.initial_state, h);
    for (i64 tile = 0; tile < tiles; ++tile) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (block.inside(s)) store_global(checkpoint(tile, s), h[s]);
        }
        if (tile + 1 == tiles) break;
        block.load_tile(shared, block.begin + tile * K::kTile);
        __syncthreads();
        for (int i = 0; i < K::kTile; ++i) block.walk(shared, i, h);
        __syncthreads();
    }
    block.load_states(p.grad_final_state, g);
    N dA[kMine], dB[kMine], dC[kMine];
    Block<K>::fill(dA, 0.f), Block<K>::fill(dB, 0.f), Block<K>::fill(dC, 0.f);
    float dskip = 0.f, dbias = 0.f;  // a thread's pairs are of one channel
    for (i64 tile = tiles; tile-- > 0;) {
        i64 const t = block.begin + tile * K::kTile;
        block.load_tile(shared, t);
        block.pairs([&](int row, int c) {
            i64 const token = c < block.count ? block.token_at(t + row) : -1;
            float dy = 0.f;
            if (token >= 0) {
                dy = read<T>(p.grad_y, block.batch, token, block.first + c);
                if (p.z.data != nullptr) {
                    float const z = read<T>(p.z, block.batch, token, block.first + c);
                    dy *= z * sigmoid(z);
                }
            }
            shared.dy[row][c] = dy;
        });
        __syncthreads();
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s)
            h[s] = block.inside(s) ? load_global(checkpoint(tile, s)) : number<N>(0.f);
        for (int i = 0; i < K::kTile; ++i) {
            if (i % K::kMicro == 0) {
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) shared.parked[i / K::kMicro][threadIdx.x][s] = h[s];
            }
            float const y = block.over_states(block.walk(shared, i, h));
            if (block.lane == 0) shared.y[i][block.own] = y;
        }
        for (int m = K::kTile / K::kMicro; m-- > 0;) {
            N kept[K::kMicro + 1][kMine];
            LSM_UNROLL
            for (int s = 0; s < kMine; ++s) kept[0][s] = shared.parked[m][threadIdx.x][s];
            LSM_UNROLL
            for (int i = 0; i < K::kMicro; ++i) {
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) kept[i + 1][s] = kept[i][s];
                block.walk(shared, m * K::kMicro + i, kept[i + 1]);
            }
            LSM_UNROLL
            for (int i = K::kMicro; i-- > 0;) {
                int const token = m * K::kMicro + i;
                float const dt = shared.dt[token][block.own], du = shared.du[token][block.own];
                float const dy = K::kReadFactor * shared.dy[token][block.own];
                float ddt = 0.f, ddu = 0.f;
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) {
                    g[s] = add(g[s], scaled(conj(block.c(shared, token, s)), dy));
                    N const of_c = scaled(conj(kept[i + 1][s]), dy), of_b = scaled(g[s], du);
                    if (K::kChannelBC && p.channel_C) {
                        dC[s] = add(dC[s], of_c);
                    } else {
                        N const sum = block.over_channels(of_c);
                        if (threadIdx.x % 32 < K::L) shared.dc[token][block.column(s)][warp] = sum;
                    }
                    if (K::kChannelBC && p.channel_B) {
                        dB[s] = add(dB[s], of_b);
                    } else {
                        N const sum = block.over_channels(of_b);
                        if (threadIdx.x % 32 < K::L) shared.db[token][block.column(s)][warp] = sum;
                    }
                    ddu += real_product(g[s], conj(block.b(shared, token, s)));
                    g[s] = multiply(g[s], conj(power_of_two(scaled(block.a_log2[s], dt))));
                    N const q = multiply(g[s], conj(kept[i][s]));  // of dt A
                    ddt += real_product(q, conj(scaled(block.a_log2[s], 0.693147181f)));
                    dA[s] = add(dA[s], scaled(q, dt));
                }
                ddt = block.over_states(ddt), ddu = block.over_states(ddu);
                if (block.lane == 0) {
                    shared.ddt[token][block.own] = ddt;
                    shared.ddu[token][block.own] = ddu;
                }
            }
        }
        __syncthreads();
        block.existing_pairs(t, [&](i64 at, int row, int c) {
            i64 const channel = block.first + c, sum = block.sum_at(at, c);
            float ddt = shared.ddt[row][c], ddu = shared.ddu[row][c], y = shared.y[row][c];
            if (s0 > 0) {
                ddt += load_global(scratch.ddt + sum), ddu += load_global(scratch.ddu + sum);
                y += load_global(scratch.y + sum);
            }
            if (!is_last) {
                store_global(scratch.ddt + sum, ddt), store_global(scratch.ddu + sum, ddu);
                return store_global(scratch.y + sum, y);
            }
            float const u = read<T>(p.u, block.batch, at, channel), dy = shared.dy[row][c];
            float const skip = block.channel(p.skip, c);
            write<T>(p.du, block.batch, at, channel, fmaf(shared.dt[row][c], ddu, skip * dy));
            float d = fmaf(u, ddu, ddt);
            if (p.softplus) d *= sigmoid(block.raw_step(at, c));
            write<T>(p.ddt, block.batch, at, channel, d);
            if (p.z.data != nullptr) {
                float const z = read<T>(p.z, block.batch, at, channel), gate = sigmoid(z);
                float const out = read<T>(p.grad_y, block.batch, at, channel);
                write<T>(p.dz, block.batch, at, channel,
                         out * fmaf(skip, u, y) * gate * fmaf(z, 1.f - gate, 1.f));
            }
            dskip = fmaf(u, dy, dskip);
            dbias += d;
        });
        for (int i = threadIdx.x; i < K::kTile * K::kStates; i += kThreads) {
            int const row = i / K::kStates, s = i % K::kStates;
            i64 const token = block.token_at(t + row);
            if (token < 0 || s0 + s >= p.S) continue;
            N db = number<N>(0.f), dc = number<N>(0.f);
            LSM_UNROLL
            for (int w = 0; w < kWarps; ++w) {
                if (!p.channel_B) db = add(db, shared.db[row][s][w]);
                if (!p.channel_C) dc = add(dc, shared.dc[row][s][w]);
            }
            if (!p.channel_B) store_global(share(0, token, s0 + s), db);
            if (!p.channel_C) store_global(share(1, token, s0 + s), dc);
        }
        __syncthreads();
    }
    block.store_states(p.grad_initial_state, g);
    store_state_shares(0, dA);
    if constexpr (K::kChannelBC) store_state_shares(1, dB), store_state_shares(2, dC);
    if (!is_last) return;
    // A channel's pairs lie in threads kChannels apart.
    float* const all = reinterpret_cast<float*>(dyn_smem());
    all[threadIdx.x] = dskip, all[kThreads + threadIdx.x] = dbias;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < block.count) {
        float skip = 0.f, bias = 0.f;
        for (int i = threadIdx.x; i < kThreads; i += K::kChannels)
            skip += all[i], bias += all[kThreads + i];
        store_channel_shares(skip, bias);
    }
}

// dB or dC of tokens: [B, T, G, S], over a group's blocks of channels in order.
template <class N>
__global__ void __launch_bounds__(128)
    add_tokens(SelectiveParams const p, i64 blocks_of_group, N const* shares, N* sums) {
    i64 const at = i64(blockIdx.x) * 128 + threadIdx.x;
    if (at >= p.B * p.T * p.G * p.S) return;
    i64 const s = at % p.S, group = at / p.S % p.G, row = at / (p.S * p.G);
    N sum = number<N>(0.f);
    for (i64 k = 0; k < blocks_of_group; ++k) {
        i64 const part = group * blocks_of_group + k;
        sum = add(sum, load_global(shares + (part * p.B * p.T + row) * p.S + s));
    }
    store_global(sums + at, sum);
}

// [D, states], from shares [states][N][D], over sequences in order.
template <class N>
__global__ void __launch_bounds__(128)
    add_sequences(i64 sequences, i64 D, i64 states, N const* shares, N* sums) {
    i64 const index = i64(blockIdx.x) * 128 + threadIdx.x;
    i64 const s = index / D, channel = index % D;
    if (s >= states) return;
    N sum = number<N>(0.f);
    for (i64 n = 0; n < sequences; ++n)
        sum = add(sum, load_global(shares + (s * sequences + n) * D + channel));
    store_global(sums + channel * states + s, sum);
}

template <class K>
struct Launch {
    using N = typename K::N;
    SelectiveParams const& p;
    unsigned blocks_of_group;
    Segments plan;
    Scratch scratch;
    i64 bytes = 0;

    // Lays the workspace out; with a null base it only counts its bytes.
    Launch(SelectiveParams const& p, Direction direction, void* base) : p(p) {
        blocks_of_group = static_cast<unsigned>((p.D / p.G + K::kChannels - 1) / K::kChannels);
        auto const take = [&](i64 count, std::size_t size) {
            void* const at = static_cast<char*>(base) + bytes;
            bytes += (count * static_cast<i64>(size) + 255) / 256 * 256;
            return base == nullptr ? nullptr : at;
        };
        auto const floats = [&](i64 count) { return static_cast<float*>(take(count, 4)); };
        plan = plan_segments(p, p.T, take(segments_bytes(p, p.T), 1));
        bool const rounds = p.S > K::kStates;
        if (rounds) scratch.y = floats(p.B * p.T * p.D);
        if (direction == Direction::forward) return;
        if (rounds) scratch.ddt = floats(p.B * p.T * p.D), scratch.ddu = floats(p.B * p.T * p.D);
        i64 const tiles = p.cu_seqlens == nullptr ? p.N * ((p.T + K::kTile - 1) / K::kTile)
                                                  : p.T / K::kTile + p.N + 1;
        scratch.checkpoints = take(tiles * p.D * p.S, sizeof(N));
        scratch.tokens = take(2 * i64(blocks_of_group) * p.G * p.B * p.T * p.S, sizeof(N));
        scratch.channels = floats(2 * p.N * p.D);
        scratch.states = take((K::kChannelBC ? 3 : 1) * p.S * p.N * p.D, sizeof(N));
    }

    template <class Kernel>
    void rounds(Kernel kernel, std::size_t shared, void* stream) const {
        if (plan.count == 0) return;
        build_segments(p, plan, stream);
        dim3 const grid(static_cast<unsigned>(plan.count * p.G) * blocks_of_group);
        for (int s0 = 0; s0 < p.S; s0 += K::kStates)
            launch(kernel, grid, dim3(kThreads), shared, stream, p, plan, blocks_of_group, s0,
                   scratch);
    }
    void forward(void* stream) const {
        rounds(selective_kernel::forward<K>, sizeof(typename K::Shared), stream);
    }
    void backward(void* stream) const {
        rounds(selective_kernel::backward<K>, sizeof(typename K::SharedBackward), stream);
        auto const blocks = [](i64 count) {
            return dim3(static_cast<unsigned>((count + 127) / 128));
        };
        auto const states = [&](int which) {
            return static_cast<N const*>(scratch.states) + which * p.S * p.N * p.D;
        };
        auto const sum_sequences = [&](auto const* shares, void* to, i64 count) {
            using Number = std::remove_cv_t<std::remove_pointer_t<decltype(shares)>>;
            if (to == nullptr) return;
            launch(add_sequences<Number>, blocks(count * p.D), dim3(128), 0, stream, p.N, p.D,
                   count, shares, static_cast<Number*>(to));
        };
        i64 const tokens = p.B * p.T * p.G * p.S;
        for (int which = 0; which < 2; ++which) {
            void* const to = which == 0 ? p.db : p.dc;
            if (which == 0 ? p.channel_B : p.channel_C) {
                sum_sequences(states(1 + which), to, p.S);
            } else if (tokens > 0) {
                i64 const first = which * i64(blocks_of_group) * p.G * p.B * p.T * p.S;
                launch(add_tokens<N>, blocks(tokens), dim3(128), 0, stream, p, i64(blocks_of_group),
                       static_cast<N const*>(scratch.tokens) + first, static_cast<N*>(to));
            }
        }
        sum_sequences(states(0), p.dA, p.S);
        sum_sequences(static_cast<float const*>(scratch.channels), p.dskip, 1);
        sum_sequences(static_cast<float const*>(scratch.channels) + p.N * p.D, p.ddt_bias, 1);
    }
};

template <class T, class N>
int64_t launch_typed(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    auto const run = [&](auto kind) -> int64_t {
        Launch<decltype(kind)> const launcher(p, direction, workspace);
        if (workspace == nullptr) return launcher.bytes;
        direction == Direction::forward ? launcher.forward(stream) : launcher.backward(stream);
        return 0;
    };
    bool const few = p.S <= 16;
    if constexpr (std::is_same_v<N, float>) {
        if (!p.channel_B && !p.channel_C)
            return few ? run(Kind<T, N, 4, false>{}) : run(Kind<T, N, 16, false>{});
    }
    return few ? run(Kind<T, N, 4, true>{}) : run(Kind<T, N, 16, true>{});
}

}  // namespace lsm::selective_kernel
