// The selective scan, forward: one walk over the tiles, whose tensors are asked for a tile ahead. States at the tiles'
// beginnings are kept for a backward that wants them. More states than a round's wait in the workspace while the others
// walk the tile.
#pragma once

#include "kernels/selective/segment.cuh"

namespace lsm::selective_kernel {

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    forward(SelectiveParams const p, Segments const plan, unsigned blocks_of_group,
            Scratch const scratch) {
    auto& shared = *reinterpret_cast<typename K::Shared*>(dyn_smem());
    Block<K> block(p, plan, blocks_of_group, 0, scratch, true);
    if (block.segment.unused()) return;
    typename K::N h[kMine];
    int const rounds = K::kRounds ? static_cast<int>((p.S + K::kStates - 1) / K::kStates) : 1;
    // f(round) for every round, with its states in h, or none yet.
    auto const each_round = [&](bool have_states, auto const& f) {
        LSM_UNROLL_BY(1)
        for (int round = 0; round < rounds; ++round) {
            if (rounds > 1) {
                block.begin_round(round);
                if (have_states)
                    block.load_numbers(scratch.walked, block.row_of(block.record()), h);
            }
            f(round);
            if (rounds > 1) block.store_numbers(scratch.walked, block.row_of(block.record()), h);
        }
    };
    if (block.segment.poison) {
        block.poison_tokens(p.y);
        each_round(false, [&](int) {
            Block<K>::fill(h, nan_value());
            if (block.sequence >= 0) block.store_numbers(p.final_state, block.state_row(), h);
        });
        return;
    }
    typename Block<K>::Elements u, dt, z;
    typename Block<K>::Numbers b, c;
    auto const ask = [&](int t) {
        typename Block<K>::Tokens token;
        block.find(t, token);
        block.load(p.u, token, u), block.load(p.dt, token, dt);
    };
    auto const ask_numbers = [&](int t, int round) {
        int const s0 = round * K::kStates;
        block.load_numbers_of_tokens(p.b, !p.channel_B, t, s0, b);
        block.load_numbers_of_tokens(p.c, !p.channel_C, t, s0, c);
    };
    block.share_channels(shared);
    each_round(false, [&](int) { find_start<K, true>(block, shared, p.initial_state, h); });
    ask(0), ask_numbers(0, 0);
    __syncthreads();
    LSM_UNROLL_BY(1)
    for (int tile = 0, tiles = block.tiles(); tile < tiles; ++tile) {
        int const t = tile * K::kTile;
        typename Block<K>::Tokens token;
        block.find(t, token);
        block.share_steps(shared, token, dt);
        Block<K>::share(shared.u, [&](Spot at) { return Block<K>::value(u, at); });
        each_round(true, [&](int round) {
            bool const is_last = round + 1 == rounds;
            Block<K>::share_numbers(p.b, shared.b, b), Block<K>::share_numbers(p.c, shared.c, c);
            __syncthreads();
            if (is_last) block.load(p.z, token, z), ask(t + K::kTile);
            ask_numbers(is_last ? t + K::kTile : t, is_last ? 0 : round + 1);
            block.store_numbers(p.saved_states, block.tile_row(tile), h);
            LSM_UNROLL_BY((K::kIsComplex ? K::kRounds ? 1 : 2 : 4))
            for (int i = 0; i < K::kTile; ++i) {
                float const y = block.over_states(block.walk(shared, i, h));
                float& sum = shared.y[i][block.own];
                if (block.lane == 0) sum = round > 0 ? sum + y : y;
            }
            __syncthreads();
        });
        block.find(t, token);
        block.store(p.y, token, [&](Spot at) {
            float const y = fmaf(shared.skip[at.c], Block<K>::value(shared.u, at),
                                 Block<K>::value(shared.y, at));
            if (p.z.data == nullptr) return y;
            float const gate = Block<K>::value(z, at);
            return y * gate * sigmoid(gate);
        });
    }
    if (block.segment.is_last)
        each_round(true, [&](int) { block.store_numbers(p.final_state, block.state_row(), h); });
}

}  // namespace lsm::selective_kernel
