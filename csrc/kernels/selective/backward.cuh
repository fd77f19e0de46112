// The selective scan, backward.
//
// The backward walks forwards once, leaving the states at every tile's beginning in the workspace, then takes the tiles
// from the last to the first: walks each again, keeping the states at every kMicro-th token in shared memory, and then
// those tokens backwards with their states and decays in registers. Shares of dB and dC of a block's channels are
// added over the blocks, in order, by a second kernel, as are the sequences' shares of the channels' gradients.
#pragma once

#include "kernels/selective/block.cuh"

namespace lsm::selective_kernel {

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

}  // namespace lsm::selective_kernel
