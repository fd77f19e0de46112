// The selective scan, forward: one walk over the tiles.
#pragma once

#include "kernels/selective/block.cuh"

namespace lsm::selective_kernel {

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

}  // namespace lsm::selective_kernel
