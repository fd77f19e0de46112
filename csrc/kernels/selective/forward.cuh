// The selective scan, forward: one walk over the tiles, whose tensors are asked for a tile ahead. States at the tiles'
// beginnings are kept for a backward that wants them.
#pragma once

#include "kernels/selective/block.cuh"

namespace lsm::selective_kernel {

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    forward(SelectiveParams const p, Segments const plan, unsigned blocks_of_group, int s0,
            Scratch const scratch) {
    auto& shared = *reinterpret_cast<typename K::Shared*>(dyn_smem());
    Block<K> const block(p, plan, blocks_of_group, s0, scratch);
    if (block.segment.unused()) return;
    typename K::N h[kMine];
    if (block.segment.poison) {
        block.poison_tokens(p.y);
        Block<K>::fill(h, nan_value());
        if (block.sequence >= 0) block.store_numbers(p.final_state, block.state_row(), h);
        return;
    }
    bool const is_last = block.is_last();
    typename Block<K>::Elements u, dt, z;
    typename Block<K>::Numbers b, c;
    auto const ask = [&](int t) {
        typename Block<K>::Tokens token;
        block.find(t, token);
        block.load(p.u, token, u), block.load(p.dt, token, dt);
        block.load_numbers_of_tokens(p.b, !p.channel_B, t, b);
        block.load_numbers_of_tokens(p.c, !p.channel_C, t, c);
    };
    block.share_channels(shared);
    block.load_start(p.initial_state, h);
    ask(0);
    __syncthreads();
    LSM_UNROLL_BY(1)
    for (int tile = 0, tiles = block.tiles(); tile < tiles; ++tile) {
        int const t = tile * K::kTile;
        typename Block<K>::Tokens token;
        block.find(t, token);
        block.share_steps(shared, token, dt);
        Block<K>::share(shared.u, [&](Spot at) { return Block<K>::value(u, at); });
        Block<K>::share_numbers(p.b, shared.b, b), Block<K>::share_numbers(p.c, shared.c, c);
        __syncthreads();
        if (is_last) block.load(p.z, token, z);
        ask(t + K::kTile);
        block.store_numbers(p.saved_states, block.tile_row(tile), h);
        LSM_UNROLL_BY((K::kIsComplex ? 2 : 4))
        for (int i = 0; i < K::kTile; ++i) {
            float const y = block.over_states(block.walk(shared, i, h));
            if (block.lane == 0) shared.y[i][block.own] = y;
        }
        __syncthreads();
        block.find(t, token);
        auto const sum = [&](Spot at) {
            float y = Block<K>::value(shared.y, at);
            if (block.s0 > 0 && block.exists(token, at))
                y += load_global(scratch.y + block.sum_at(token, at));
            return y;
        };
        if (!is_last) {
            Block<K>::pieces([&](Spot first) {
                Block<K>::elements(first, [&](Spot at) {
                    if (block.exists(token, at))
                        store_global(scratch.y + block.sum_at(token, at), sum(at));
                });
            });
            continue;
        }
        block.store(p.y, token, [&](Spot at) {
            float const y = fmaf(shared.skip[at.c], Block<K>::value(shared.u, at), sum(at));
            if (p.z.data == nullptr) return y;
            float const gate = Block<K>::value(z, at);
            return y * gate * sigmoid(gate);
        });
    }
    if (block.segment.is_last) block.store_numbers(p.final_state, block.state_row(), h);
}

}  // namespace lsm::selective_kernel
