// The selective scan on CUDA: states over lanes (docs/kernels/scan.md).
//
// A block owns kThreads / L neighbouring channels of one sequence; a channel's states lie in L lanes, four each. Per
// tile of tokens the block's threads first take the roles of loaders, one token and channel each: softplus once, dt
// and dt u to shared memory, B and C widened beside them. Then every lane walks the tile's tokens with its states in
// registers; sums over states go through shuffles.
//
// The backward walks forwards once, leaving the states at every tile's beginning in the workspace, then takes the tiles
// from the last to the first: walks each again, keeping the states at every eighth token in shared memory, and then
// those eight tokens backwards with their states and decays in registers. Shares of dB and dC of a block's channels
// are added over the blocks, in order, by a second kernel, as are the sequences' shares of the channels' gradients.
#include <stdexcept>

#include "kernels/platform.cuh"
#include "params/selective_scan.h"

namespace lsm::selective_kernel {

constexpr int kThreads = 128;
constexpr int kTile = 32;  // tokens
constexpr int kMicro = 8;  // tokens whose states the backward keeps in registers
constexpr int kMine = 4;   // states of a lane

struct Shares {
    float* checkpoints = nullptr;  // [sequence tile][D][S], tiles numbered over all sequences
    float* tokens = nullptr;       // [2][blocks of channels][B T][S]
    float* channels = nullptr;     // [2 + S][N][D]: dD, d bias, dA by state
};

template <int L>
struct Config {
    static constexpr int kChannels = kThreads / L;
    static constexpr int kStates = L * kMine;  // at most
    static constexpr int kPairs =
        kTile * kChannels / kThreads;  // token and channel pairs of a thread
    static constexpr int kWarpChannels = 32 / L;
};

template <int L>
struct Shared {
    using C = Config<L>;
    float dt[kTile][C::kChannels], du[kTile][C::kChannels], y[kTile][C::kChannels];
    float b[kTile][C::kStates], c[kTile][C::kStates];
};

template <int L>
struct SharedBackward : Shared<L> {
    using C = Config<L>;
    float dy[kTile][C::kChannels], ddt[kTile][C::kChannels], ddu[kTile][C::kChannels];
    float parked[kTile / kMicro][kThreads][kMine];
    float db[kTile][C::kStates][kThreads / 32], dc[kTile][C::kStates][kThreads / 32];
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

LSM_DEVICE i64 boundary(SelectiveParams const& p, i64 n) {
    if (p.cu_seqlens == nullptr) return n == 0 ? 0 : p.T;
    i64 const t = p.cu_seqlens_is_64bit
                      ? load_global(static_cast<int64_t const*>(p.cu_seqlens) + n)
                      : load_global(static_cast<int32_t const*>(p.cu_seqlens) + n);
    return t < 0 ? 0 : t < p.T ? t : p.T;
}

// What a thread knows of its block, channel and states.
template <class T, int L>
struct Block {
    using C = Config<L>;
    SelectiveParams const& p;
    i64 sequence, batch, begin, end;
    i64 group, first;  // channels [first, first + count)
    int count;
    int lane, own;  // of the channel's lanes; the thread's channel
    float a_log2[kMine];

    LSM_DEVICE Block(SelectiveParams const& p, unsigned blocks_of_group) : p(p) {
        unsigned const per_sequence = blocks_of_group * static_cast<unsigned>(p.G);
        sequence = blockIdx.x / per_sequence;
        unsigned const rest = blockIdx.x % per_sequence;
        i64 const channels = p.D / p.G, at = i64(rest % blocks_of_group) * C::kChannels;
        group = rest / blocks_of_group;
        first = group * channels + at;
        count = static_cast<int>(channels - at < C::kChannels ? channels - at : C::kChannels);
        bool const packed = p.cu_seqlens != nullptr;
        batch = packed ? 0 : sequence;
        begin = packed ? boundary(p, sequence) : 0;
        end = packed ? boundary(p, sequence + 1) : p.T;
        lane = threadIdx.x % L, own = threadIdx.x / L;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            a_log2[s] = inside(s) ? 1.44269504f * load_global(static_cast<float const*>(p.A) +
                                                              (first + own) * p.S + state(s))
                                  : 0.f;
        }
    }
    LSM_DEVICE int state(int s) const { return lane * kMine + s; }
    LSM_DEVICE bool inside(int s) const { return own < count && state(s) < p.S; }
    LSM_DEVICE float const* states(void const* from) const {
        return static_cast<float const*>(from) + (sequence * p.D + first + own) * p.S;
    }
    LSM_DEVICE void load_states(void const* from, float (&h)[kMine]) const {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s)
            h[s] = from != nullptr && inside(s) ? load_global(states(from) + state(s)) : 0.f;
    }
    LSM_DEVICE void store_states(void* to, float const (&h)[kMine]) const {
        if (to == nullptr) return;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (inside(s)) store_global(const_cast<float*>(states(to)) + state(s), h[s]);
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
        for (int i = 0; i < C::kPairs; ++i) {
            int const pair = threadIdx.x + i * kThreads;
            f(pair / C::kChannels, pair % C::kChannels);
        }
    }
    LSM_DEVICE bool exists(i64 t, int token, int c) const { return t + token < end && c < count; }

    // B and C, dt and dt u of a tile; tokens past the end have dt = 0, which leaves states alone.
    LSM_DEVICE void load_tile(Shared<L>& shared, i64 t) const {
        for (int i = threadIdx.x; i < kTile * C::kStates; i += kThreads) {
            int const token = i / C::kStates, s = i % C::kStates;
            bool const there = t + token < end && s < p.S;
            i64 const at = group;
            shared.b[token][s] = there ? read<T>(p.b, batch, t + token, at * p.b.head + s) : 0.f;
            shared.c[token][s] = there ? read<T>(p.c, batch, t + token, at * p.c.head + s) : 0.f;
        }
        pairs([&](int token, int c) {
            float const dt = exists(t, token, c) ? step_size(t + token, c) : 0.f;
            float const u = exists(t, token, c) ? read<T>(p.u, batch, t + token, first + c) : 0.f;
            shared.dt[token][c] = dt, shared.du[token][c] = dt * u;
        });
    }
    LSM_DEVICE float raw_step(i64 token, int c) const {
        return read<T>(p.dt, batch, token, first + c) + channel(p.dt_bias, c);
    }
    LSM_DEVICE float step_size(i64 token, int c) const {
        float const x = raw_step(token, c);
        return p.softplus ? fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))) : x;
    }
    // h after a token; y, the lane's share of what C reads.
    LSM_DEVICE float walk(Shared<L> const& shared, int token, float (&h)[kMine]) const {
        float const dt = shared.dt[token][own], du = shared.du[token][own];
        float y = 0.f;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            h[s] = fmaf(exp2_approx(dt * a_log2[s]), h[s], du * shared.b[token][state(s)]);
            y = fmaf(shared.c[token][state(s)], h[s], y);
        }
        return y;
    }
    LSM_DEVICE static float over_states(float x) {
        LSM_UNROLL
        for (int d = 1; d < L; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
        return x;
    }
    LSM_DEVICE static float over_channels(float x) {
        LSM_UNROLL
        for (int d = L; d < 32; d *= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
        return x;
    }
};

template <class T, int L>
__global__ void __launch_bounds__(kThreads)
    forward(SelectiveParams const p, unsigned blocks_of_group) {
    auto& shared = *reinterpret_cast<Shared<L>*>(dyn_smem());
    Block<T, L> const block(p, blocks_of_group);
    float h[kMine];
    block.load_states(p.initial_state, h);
    for (i64 t = block.begin; t < block.end; t += kTile) {
        block.load_tile(shared, t);
        __syncthreads();
        for (int i = 0; i < kTile; ++i) {
            float const y = block.over_states(block.walk(shared, i, h));
            if (block.lane == 0) shared.y[i][block.own] = y;
        }
        __syncthreads();
        block.pairs([&](int token, int c) {
            if (!block.exists(t, token, c)) return;
            float y = shared.y[token][c];
            if (p.skip != nullptr) {
                float const u = read<T>(p.u, block.batch, t + token, block.first + c);
                y = fmaf(block.channel(p.skip, c), u, y);
            }
            if (p.z.data != nullptr) {
                float const z = read<T>(p.z, block.batch, t + token, block.first + c);
                y *= z * sigmoid(z);
            }
            write<T>(p.y, block.batch, t + token, block.first + c, y);
        });
        __syncthreads();
    }
    block.store_states(p.final_state, h);
}

// The number of tiles of earlier sequences; packed ones have room for one more each.
LSM_DEVICE i64 first_tile(SelectiveParams const& p, i64 sequence, i64 begin) {
    if (p.cu_seqlens == nullptr) return sequence * ((p.T + kTile - 1) / kTile);
    return begin / kTile + sequence;
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads)
    backward(SelectiveParams const p, unsigned blocks_of_group, Shares const shares) {
    using C = Config<L>;
    auto& shared = *reinterpret_cast<SharedBackward<L>*>(dyn_smem());
    Block<T, L> const block(p, blocks_of_group);
    i64 const tiles = (block.end - block.begin + kTile - 1) / kTile;
    i64 const tile0 = first_tile(p, block.sequence, block.begin);
    int const warp = threadIdx.x / 32;
    auto const checkpoint = [&](i64 tile, int s) {
        return shares.checkpoints + ((tile0 + tile) * p.D + block.first + block.own) * p.S +
               block.state(s);
    };
    float h[kMine], g[kMine], dA[kMine] = {};
    block.load_states(p.initial_state, h);
    for (i64 tile = 0; tile < tiles; ++tile) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (block.inside(s)) store_global(checkpoint(tile, s), h[s]);
        }
        if (tile + 1 == tiles) break;
        block.load_tile(shared, block.begin + tile * kTile);
        __syncthreads();
        for (int i = 0; i < kTile; ++i) block.walk(shared, i, h);
        __syncthreads();
    }
    block.load_states(p.grad_final_state, g);
    float dskip = 0.f, dbias = 0.f;  // a thread's pairs are of one channel
    for (i64 tile = tiles; tile-- > 0;) {
        i64 const t = block.begin + tile * kTile;
        block.load_tile(shared, t);
        block.pairs([&](int token, int c) {
            float dy = 0.f;
            if (block.exists(t, token, c)) {
                dy = read<T>(p.grad_y, block.batch, t + token, block.first + c);
                if (p.z.data != nullptr) {
                    float const z = read<T>(p.z, block.batch, t + token, block.first + c);
                    dy *= z * sigmoid(z);
                }
            }
            shared.dy[token][c] = dy;
        });
        __syncthreads();
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s)
            h[s] = block.inside(s) ? load_global(checkpoint(tile, s)) : 0.f;
        for (int i = 0; i < kTile; ++i) {
            if (i % kMicro == 0) {
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) shared.parked[i / kMicro][threadIdx.x][s] = h[s];
            }
            float const y = block.over_states(block.walk(shared, i, h));
            if (block.lane == 0) shared.y[i][block.own] = y;
        }
        for (int m = kTile / kMicro; m-- > 0;) {
            float kept[kMicro + 1][kMine];
            LSM_UNROLL
            for (int s = 0; s < kMine; ++s) kept[0][s] = shared.parked[m][threadIdx.x][s];
            LSM_UNROLL
            for (int i = 0; i < kMicro; ++i) {
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) kept[i + 1][s] = kept[i][s];
                block.walk(shared, m * kMicro + i, kept[i + 1]);
            }
            LSM_UNROLL
            for (int i = kMicro; i-- > 0;) {
                int const token = m * kMicro + i;
                float const dt = shared.dt[token][block.own], du = shared.du[token][block.own];
                float const dy = shared.dy[token][block.own];
                float ddt = 0.f, ddu = 0.f;
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) {
                    int const state = block.state(s);
                    g[s] = fmaf(dy, shared.c[token][state], g[s]);
                    float const dc = block.over_channels(dy * kept[i + 1][s]);
                    float const db = block.over_channels(g[s] * du);
                    if (threadIdx.x % 32 < L) {
                        shared.db[token][state][warp] = db;
                        shared.dc[token][state][warp] = dc;
                    }
                    ddu = fmaf(g[s], shared.b[token][state], ddu);
                    g[s] *= exp2_approx(dt * block.a_log2[s]);
                    float const q = g[s] * kept[i][s];
                    ddt = fmaf(q, block.a_log2[s] * 0.693147181f, ddt);
                    dA[s] = fmaf(q, dt, dA[s]);
                }
                ddt = block.over_states(ddt), ddu = block.over_states(ddu);
                if (block.lane == 0) {
                    shared.ddt[token][block.own] = ddt;
                    shared.ddu[token][block.own] = ddu;
                }
            }
        }
        __syncthreads();
        block.pairs([&](int token, int c) {
            if (!block.exists(t, token, c)) return;
            i64 const at = t + token, channel = block.first + c;
            float const u = read<T>(p.u, block.batch, at, channel), dy = shared.dy[token][c];
            float const skip = block.channel(p.skip, c);
            write<T>(p.du, block.batch, at, channel,
                     fmaf(shared.dt[token][c], shared.ddu[token][c], skip * dy));
            float d = fmaf(u, shared.ddu[token][c], shared.ddt[token][c]);
            if (p.softplus) d *= sigmoid(block.raw_step(at, c));
            write<T>(p.ddt, block.batch, at, channel, d);
            if (p.z.data != nullptr) {
                float const z = read<T>(p.z, block.batch, at, channel), gate = sigmoid(z);
                float const out = read<T>(p.grad_y, block.batch, at, channel);
                float const y = fmaf(skip, u, shared.y[token][c]);
                write<T>(p.dz, block.batch, at, channel, out * y * gate * fmaf(z, 1.f - gate, 1.f));
            }
            dskip = fmaf(u, dy, dskip);
            dbias += d;
        });
        i64 const part = blockIdx.x % (blocks_of_group * static_cast<unsigned>(p.G));
        i64 const parts = i64(blocks_of_group) * p.G;
        for (int i = threadIdx.x; i < kTile * C::kStates; i += kThreads) {
            int const token = i / C::kStates, s = i % C::kStates;
            if (t + token >= block.end || s >= p.S) continue;
            float db = 0.f, dc = 0.f;
            for (int w = 0; w < kThreads / 32; ++w)
                db += shared.db[token][s][w], dc += shared.dc[token][s][w];
            i64 const row = block.batch * p.T + t + token;
            store_global(shares.tokens + (part * p.B * p.T + row) * p.S + s, db);
            store_global(shares.tokens + ((parts + part) * p.B * p.T + row) * p.S + s, dc);
        }
        __syncthreads();
    }
    block.store_states(p.grad_initial_state, g);
    i64 const row = block.sequence * p.D + block.first;
    LSM_UNROLL
    for (int s = 0; s < kMine; ++s) {
        if (block.inside(s))
            store_global(shares.channels + (2 + block.state(s)) * p.N * p.D + row + block.own,
                         dA[s]);
    }
    // A channel's pairs lie in threads kChannels apart.
    float* const all = &shared.dt[0][0];
    all[threadIdx.x] = dskip, all[kThreads + threadIdx.x] = dbias;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < block.count) {
        float skip = 0.f, bias = 0.f;
        for (int i = threadIdx.x; i < kThreads; i += C::kChannels)
            skip += all[i], bias += all[kThreads + i];
        store_global(shares.channels + row + threadIdx.x, skip);
        store_global(shares.channels + p.N * p.D + row + threadIdx.x, bias);
    }
}

// dB and dC: [B, T, G, S], over a group's blocks of channels in order.
__global__ void __launch_bounds__(128)
    add_tokens(SelectiveParams const p, i64 blocks_of_group, Shares const shares) {
    i64 const index = i64(blockIdx.x) * 128 + threadIdx.x, count = p.B * p.T * p.G * p.S;
    if (index >= 2 * count) return;
    i64 const which = index / count, at = index % count;
    i64 const s = at % p.S, group = at / p.S % p.G, row = at / (p.S * p.G);
    float sum = 0.f;
    for (i64 k = 0; k < blocks_of_group; ++k) {
        i64 const part = which * blocks_of_group * p.G + group * blocks_of_group + k;
        sum += load_global(shares.tokens + (part * p.B * p.T + row) * p.S + s);
    }
    store_global(static_cast<float*>(which == 0 ? p.db : p.dc) + at, sum);
}

// dD, d bias and dA, over sequences in order.
__global__ void __launch_bounds__(128) add_channels(SelectiveParams const p, Shares const shares) {
    i64 const index = i64(blockIdx.x) * 128 + threadIdx.x;
    i64 const kind = index / p.D, channel = index % p.D;
    if (kind >= 2 + p.S) return;
    float sum = 0.f;
    for (i64 n = 0; n < p.N; ++n)
        sum += load_global(shares.channels + (kind * p.N + n) * p.D + channel);
    if (kind == 0) {
        if (p.dskip != nullptr) store_global(static_cast<float*>(p.dskip) + channel, sum);
    } else if (kind == 1) {
        if (p.ddt_bias != nullptr) store_global(static_cast<float*>(p.ddt_bias) + channel, sum);
    } else {
        store_global(static_cast<float*>(p.dA) + channel * p.S + kind - 2, sum);
    }
}

template <int L>
unsigned blocks_of(SelectiveParams const& p) {
    i64 const channels = p.D / p.G;
    return static_cast<unsigned>((channels + Config<L>::kChannels - 1) / Config<L>::kChannels);
}

// f(element type, lanes)
template <class F>
auto dispatch(SelectiveParams const& p, F const& f) {
    if (p.is_complex || p.channel_B || p.channel_C || p.S > 64) {
        throw std::runtime_error(
            "lsm::selective_scan: the CUDA kernels take real A, B and C of tokens, and up to 64 "
            "states; the rest runs on CPU tensors");
    }
    auto const sized = [&](auto* type) {
        return p.S <= 16 ? f(type, std::integral_constant<int, 4>{})
                         : f(type, std::integral_constant<int, 16>{});
    };
    switch (p.dtype) {
        case Dtype::bf16:
            return sized(static_cast<bf16*>(nullptr));
        case Dtype::f16:
            return sized(static_cast<half*>(nullptr));
        default:
            return sized(static_cast<float*>(nullptr));
    }
}

// Lays the workspace out; with a null base it only counts its bytes.
template <int L>
Shares plan_shares(SelectiveParams const& p, void* base, i64& bytes) {
    bytes = 0;
    auto const take = [&](i64 count) {
        float* const at = reinterpret_cast<float*>(static_cast<char*>(base) + bytes);
        bytes += (count * 4 + 255) / 256 * 256;
        return base == nullptr ? nullptr : at;
    };
    i64 const tiles =
        p.cu_seqlens == nullptr ? p.N * ((p.T + kTile - 1) / kTile) : p.T / kTile + p.N + 1;
    Shares shares;
    shares.checkpoints = take(tiles * p.D * p.S);
    shares.tokens = take(2 * i64(blocks_of<L>(p)) * p.G * p.B * p.T * p.S);
    shares.channels = take((2 + p.S) * p.N * p.D);
    return shares;
}

}  // namespace lsm::selective_kernel

namespace lsm {

using namespace selective_kernel;

int64_t selective_fwd_workspace(SelectiveParams const&) {
    return 0;
}

int64_t selective_bwd_workspace(SelectiveParams const& p) {
    return dispatch(p, [&](auto*, auto lanes) {
        i64 bytes = 0;
        plan_shares<decltype(lanes)::value>(p, nullptr, bytes);
        return bytes;
    });
}

void selective_fwd(SelectiveParams const& p, void*, void* stream) {
    dispatch(p, [&](auto* type, auto lanes) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int L = decltype(lanes)::value;
        unsigned const blocks = blocks_of<L>(p);
        if (p.N > 0) {
            launch(forward<T, L>, dim3(static_cast<unsigned>(p.N * p.G) * blocks), dim3(kThreads),
                   sizeof(Shared<L>), stream, p, blocks);
        }
        return 0;
    });
}

void selective_bwd(SelectiveParams const& p, void* workspace, void* stream) {
    dispatch(p, [&](auto* type, auto lanes) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int L = decltype(lanes)::value;
        unsigned const blocks = blocks_of<L>(p);
        i64 bytes = 0;
        Shares const shares = plan_shares<L>(p, workspace, bytes);
        if (p.N > 0) {
            launch(backward<T, L>, dim3(static_cast<unsigned>(p.N * p.G) * blocks), dim3(kThreads),
                   sizeof(SharedBackward<L>), stream, p, blocks, shares);
        }
        i64 const tokens = 2 * p.B * p.T * p.G * p.S, channels = (2 + p.S) * p.D;
        if (tokens > 0) {
            launch(add_tokens, dim3(static_cast<unsigned>((tokens + 127) / 128)), dim3(128), 0,
                   stream, p, i64(blocks), shares);
        }
        launch(add_channels, dim3(static_cast<unsigned>((channels + 127) / 128)), dim3(128), 0,
               stream, p, shares);
        return 0;
    });
}

}  // namespace lsm
