// The selective scan, backward.
//
// Tiles are taken from the last to the first. Each is walked forwards from the states that the forward kept at its
// beginning, which gives y, for the gate's gradient, and the states at every kMicro-th token, kept in shared memory;
// then those tokens backwards, with their states in registers. Shares of dB and dC of a block's channels are added over
// a warp by shuffles, over warps at the end of every kMicro tokens, and over blocks, in order, by a second kernel, as
// are the segments' shares of the channels' gradients. The second-level cache is asked for a tile while the one after is
// walked.
#pragma once

#include "kernels/selective/segment.cuh"

namespace lsm::selective_kernel {

// 1 - e^-dt, the slope of softplus where its value is dt; by a series where the difference would cancel.
LSM_DEVICE float softplus_slope(float dt) {
    float const series = dt * fmaf(dt, fmaf(dt, fmaf(dt, -1.f / 24.f, 1.f / 6.f), -0.5f), 1.f);
    return dt < 0.05f ? series : 1.f - expf(-dt);
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    backward(SelectiveParams const p, Segments const plan, unsigned blocks_of_group, int s0,
             Scratch const scratch) {
    using N = typename K::N;
    auto& shared = *reinterpret_cast<typename K::SharedBackward*>(dyn_smem());
    Block<K> const block(p, plan, blocks_of_group, s0, scratch, false);
    if (block.segment.unused()) return;
    int const warp = threadIdx.x / 32;
    i64 const parts = i64(blocks_of_group) * p.G;
    bool const is_last = block.is_last();
    // dC (0), then dB (1), of a token.
    auto const share = [&](int which, i64 token, i64 s) {
        i64 const at = (which * parts + block.part) * p.B * p.T + block.batch() * p.T + token;
        return static_cast<N*>(scratch.tokens) + at * p.S + s;
    };
    // Of dA, and of channels' dB and dC.
    auto const store_state_shares = [&](int which, N const(&x)[kMine]) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (!block.inside(s)) continue;
            store_global(static_cast<N*>(scratch.states) +
                             (which * p.S + block.state(s)) * plan.count * p.D +
                             block.row_of(block.record()),
                         x[s]);
        }
    };
    // Of dskip (0) and of the bias's (1).
    auto const store_channel_share = [&](int which, int c, float x) {
        if (c < block.count)
            store_global(
                scratch.channels + (which * plan.count + block.record()) * p.D + block.first + c,
                x);
    };
    N h[kMine], g[kMine];
    if (block.segment.poison) {
        block.poison_tokens(p.du), block.poison_tokens(p.ddt), block.poison_tokens(p.dz);
        i64 const columns = p.S - block.s0 < K::kStates ? p.S - block.s0 : K::kStates;
        for (i64 i = threadIdx.x; i < block.length * columns; i += K::kThreads) {
            for (int which = 0; which < 2; ++which)
                store_global(share(which, block.begin + i / columns, block.s0 + i % columns),
                             number<N>(nan_value()));
        }
        Block<K>::fill(h, nan_value());
        for (int which = 0; which < (K::kChannelBC ? 3 : 1); ++which) store_state_shares(which, h);
        for (int which = 0; which < 2; ++which)
            store_channel_share(which, threadIdx.x, nan_value());
        if (block.sequence >= 0) block.store_numbers(p.grad_initial_state, block.state_row(), h);
        return;
    }

    using OverChannels = Exchange<2 * kMine, 16, K::L>;  // of dC, then of dB
    using OverStates = Exchange<2, K::L / 2, 1>;         // of ddt, then of ddu
    int const sum = OverChannels::first_left();
    int const share_at = sum / kMine * K::kStates + block.column(sum % kMine);
    block.share_channels(shared);
    find_start<K, false>(block, shared, p.grad_final_state, g);
    N dA[kMine], dB[kMine], dC[kMine];
    Block<K>::fill(dA, 0.f), Block<K>::fill(dB, 0.f), Block<K>::fill(dC, 0.f);
    // Of dskip and dbias. Channels last, a thread's pieces are of the same channels, which threads kRow apart share;
    // channels first, each is of a channel of its own, or of four in lines, which kRow threads share. The former meet at
    // the end, the latter, of which a thread would keep too many, after every tile.
    constexpr int kSums = (K::kFirst ? K::kPieces : 1) * (K::kAlong ? 1 : K::kVector);
    using OverRows = Exchange<2 * kSums,
                              K::kAlong   ? 0
                              : K::kFirst ? K::kRow / 2
                                          : 16,
                              K::kFirst ? 1 : K::kRow>;
    auto const sum_of = [](Spot at) {
        return K::kAlong ? at.i : K::kFirst ? at.i * K::kVector + at.e : at.e;
    };
    float of_channels[OverRows::numbers_left()] = {};
    __syncthreads();
    LSM_UNROLL_BY(1)
    for (int tile = block.tiles(); tile-- > 0;) {
        int const t = tile * K::kTile;
        typename Block<K>::Tokens token;
        typename Block<K>::Elements z, dy;
        block.find(t, token);
        {
            typename Block<K>::Elements u, dt;
            typename Block<K>::Numbers b, c;
            block.load(p.u, token, u), block.load(p.dt, token, dt);
            block.load(p.z, token, z), block.load(p.grad_y, token, dy);
            block.load_numbers_of_tokens(p.b, !p.channel_B, t, block.s0, b);
            block.load_numbers_of_tokens(p.c, !p.channel_C, t, block.s0, c);
            block.load_numbers(p.saved_states, block.tile_row(tile), h);
            block.share_steps(shared, token, dt);
            Block<K>::share(shared.u, [&](Spot at) { return Block<K>::value(u, at); });
            Block<K>::share(shared.dy, [&](Spot at) {
                float const grad = Block<K>::value(dy, at);
                if (p.z.data == nullptr) return grad;
                float const gate = Block<K>::value(z, at);
                return grad * gate * sigmoid(gate);
            });
            Block<K>::share_numbers(p.b, shared.b, b), Block<K>::share_numbers(p.c, shared.c, c);
        }
        __syncthreads();
        if (tile > 0) {
            block.find(t - K::kTile, token);
            block.ask(p.u, token), block.ask(p.dt, token);
            block.ask(p.z, token), block.ask(p.grad_y, token);
            block.ask_numbers(p.saved_states, block.tile_row(tile - 1));
        }
        LSM_UNROLL_BY(1)
        for (int m = 0; m < K::kTile / K::kMicro; ++m) {
            LSM_UNROLL
            for (int s = 0; s < kMine; ++s) shared.parked[m][threadIdx.x][s] = h[s];
            LSM_UNROLL
            for (int i = m * K::kMicro, n = 0; n < K::kMicro; ++i, ++n) {
                float const y = block.over_states(block.walk(shared, i, h));
                if (block.lane == 0) shared.y[i][block.own] = y;
            }
        }
        __syncthreads();
        block.find(t, token);
        auto const rounds_sum = [&](float* sums, typename K::Row const& rows, Spot at) {
            float x = Block<K>::value(rows, at);
            if (sums == nullptr || !block.exists(token, at)) return x;
            i64 const place = block.sum_at(token, at);
            if (block.s0 > 0) x += load_global(sums + place);
            if (!is_last) store_global(sums + place, x);
            return x;
        };
        if (is_last && p.z.data != nullptr) {
            block.store(p.dz, token, [&](Spot at) {
                float const y = rounds_sum(scratch.y, shared.y, at);
                float const whole = fmaf(shared.skip[at.c], Block<K>::value(shared.u, at), y);
                float const x = Block<K>::value(z, at), gate = sigmoid(x);
                return Block<K>::value(dy, at) * whole * gate * fmaf(x, 1.f - gate, 1.f);
            });
        } else if (!is_last) {
            Block<K>::pieces([&](Spot first) {
                Block<K>::elements(first, [&](Spot at) { rounds_sum(scratch.y, shared.y, at); });
            });
        }
        __syncthreads();  // the place of y is ddt's from here on
        LSM_UNROLL_BY(1)
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
                int const at = m * K::kMicro + i;
                float const dt = shared.dt[at][block.own], du = dt * shared.u[at][block.own];
                float const grad = K::kReadFactor * shared.dy[at][block.own];
                float ddt = 0.f, ddu = 0.f;
                N of_tokens[2 * kMine];  // dC, then dB
                LSM_UNROLL
                for (int s = 0; s < kMine; ++s) {
                    g[s] = add(g[s], scaled(conj(block.c(shared, at, s)), grad));
                    N const of_c = scaled(conj(kept[i + 1][s]), grad), of_b = scaled(g[s], du);
                    of_tokens[s] = of_c, of_tokens[kMine + s] = of_b;
                    if constexpr (K::kChannelBC) dC[s] = add(dC[s], of_c), dB[s] = add(dB[s], of_b);
                    ddu += real_product(g[s], conj(block.b(shared, at, s)));
                    g[s] = multiply(g[s], conj(block.decay(dt, s)));
                    N const q = multiply(g[s], conj(kept[i][s]));  // of dt A
                    ddt += real_product(q, conj(scaled(block.a_log2[s], 0.693147181f)));
                    dA[s] = add(dA[s], scaled(q, dt));
                }
                OverChannels::add_up(of_tokens);
                LSM_UNROLL
                for (int n = 0; n < OverChannels::numbers_left(); ++n)
                    shared.shares[m % 2][i][warp][share_at + n] = of_tokens[n];
                float both[2] = {ddt, ddu};
                OverStates::add_up(both);
                if (block.lane == 0) shared.y[at][block.own] = both[0];
                if (block.lane == K::L / 2) shared.ddu[at][block.own] = both[0];
            }
            __syncthreads();
            LSM_UNROLL_BY(1)
            for (int i = threadIdx.x; i < K::kMicro * 2 * K::kStates; i += K::kThreads) {
                int const row = i / (2 * K::kStates), at = i % (2 * K::kStates);
                int const which = at / K::kStates, s = at % K::kStates;
                i64 const of = block.token_at(t + m * K::kMicro + row);
                if (of < 0 || block.s0 + s >= p.S || (which == 0 ? p.channel_C : p.channel_B))
                    continue;
                N sum = number<N>(0.f);
                LSM_UNROLL
                for (int w = 0; w < K::kWarps; ++w)
                    sum = add(sum, shared.shares[m % 2][row][w][at]);
                store_global(share(which, of, block.s0 + s), sum);
            }
        }
        if (!is_last) {
            block.find(t, token);
            Block<K>::pieces([&](Spot first) {
                Block<K>::elements(first, [&](Spot at) {
                    rounds_sum(scratch.ddt, shared.y, at);
                    rounds_sum(scratch.ddu, shared.ddu, at);
                });
            });
            continue;
        }
        auto const sum_ddu = [&](Spot at) { return rounds_sum(scratch.ddu, shared.ddu, at); };
        block.find(t, token);
        float sums[2 * kSums] = {};  // of dskip, then of the bias's
        block.store(p.du, token, [&](Spot at) {
            float const grad = Block<K>::value(shared.dy, at);
            float& skip = sums[sum_of(at)];
            skip = fmaf(Block<K>::value(shared.u, at), grad, skip);
            return fmaf(Block<K>::value(shared.dt, at), sum_ddu(at), shared.skip[at.c] * grad);
        });
        block.store(p.ddt, token, [&](Spot at) {
            float d = fmaf(Block<K>::value(shared.u, at), sum_ddu(at),
                           rounds_sum(scratch.ddt, shared.y, at));
            if (p.softplus) d *= softplus_slope(Block<K>::value(shared.dt, at));
            sums[kSums + sum_of(at)] += block.exists(token, at) ? d : 0.f;
            return d;
        });
        OverRows::add_up(sums);
        LSM_UNROLL
        for (int n = 0; n < OverRows::numbers_left(); ++n) of_channels[n] += sums[n];
    }
    if (block.segment.index == 0) block.store_numbers(p.grad_initial_state, block.state_row(), g);
    store_state_shares(0, dA);
    if constexpr (K::kChannelBC) store_state_shares(1, dB), store_state_shares(2, dC);
    if (!is_last) return;
    if constexpr (K::kAlong) {
        LSM_UNROLL
        for (int n = 0; n < 2 * kSums; ++n) {
            LSM_UNROLL
            for (int d = 1; d < K::kRow; d *= 2) of_channels[n] += shuffle_xor(of_channels[n], d);
            int const c = (threadIdx.x + n % kSums * K::kThreads) / K::kRow;
            if (threadIdx.x % K::kRow == 0) store_channel_share(n / kSums, c, of_channels[n]);
        }
        return;
    }
    if constexpr (K::kLayout == Layout::lines) {
        constexpr int kEqual = K::kRow / (2 * kSums);  // lanes that hold one sum
        static_assert(OverRows::numbers_left() == 1 && kEqual > 0);
        int const n = OverRows::first_left(), piece = n % kSums / K::kVector;
        int const line = (threadIdx.x + piece * K::kThreads) / K::kRow;
        if (threadIdx.x % kEqual == 0)
            store_channel_share(n / kSums, line * K::kVector + n % K::kVector, of_channels[0]);
        return;
    }
    __syncthreads();
    auto& all = *reinterpret_cast<float(*)[2][K::kWarps][K::kChannels]>(dyn_smem());
    LSM_UNROLL
    for (int n = 0; n < OverRows::numbers_left(); ++n) {
        int const i = OverRows::first_left() + n, which = i / K::kVector;
        all[which][warp][threadIdx.x % K::kRow * K::kVector + i % K::kVector] = of_channels[n];
    }
    __syncthreads();
    if (int const c = threadIdx.x; c < block.count) {
        float skip = 0.f, bias = 0.f;
        for (int w = 0; w < K::kWarps; ++w) skip += all[0][w][c], bias += all[1][w][c];
        store_channel_share(0, c, skip), store_channel_share(1, c, bias);
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

// [D, states], from shares [states][records][D], over segments in order.
template <class N>
__global__ void __launch_bounds__(128)
    add_segments(Segments const plan, i64 D, i64 states, N const* shares, N* sums) {
    i64 const index = i64(blockIdx.x) * 128 + threadIdx.x;
    i64 const s = index / D, channel = index % D;
    if (s >= states) return;
    N sum = number<N>(0.f);
    for (i64 n = 0; n < plan.count; ++n) {
        // Only a table has unused records.
        if (plan.table != nullptr && plan.table[n].unused()) continue;
        sum = add(sum, load_global(shares + (s * plan.count + n) * D + channel));
    }
    store_global(sums + channel * states + s, sum);
}

}  // namespace lsm::selective_kernel
