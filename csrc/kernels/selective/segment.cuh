// Segments of time, where blocks are fewer than the card holds: a block folds its segment into what that does to a
// state, waits for the state that comes to it, leaves the state after it for the next block, and only then walks. Forwards
// a state is h, backwards the gradient of h before a token. The inputs are read twice by the same block, a segment's walk
// apart, which the second-level cache bridges.
#pragma once

#include "kernels/selective/block.cuh"

namespace lsm::selective_kernel {

// state <- product state + sum
template <class K, bool kForwards>
LSM_DEVICE void fold(Block<K> const& block, typename K::Shared& shared,
                     typename K::N (&product)[kMine], typename K::N (&sum)[kMine]) {
    using N = typename K::N;
    SelectiveParams const& p = block.p;
    Rows const& rows = kForwards ? p.u : p.grad_y;
    Projection const& numbers = kForwards ? p.b : p.c;
    bool const of_tokens = kForwards ? !p.channel_B : !p.channel_C;
    Block<K>::fill(product, 1.f), Block<K>::fill(sum, 0.f);
    LSM_UNROLL_BY(1)
    for (int step = 0, tiles = block.tiles(); step < tiles; ++step) {
        int const t = (kForwards ? step : tiles - 1 - step) * K::kTile;
        typename Block<K>::Tokens token;
        typename Block<K>::Elements x, dt, z;
        typename Block<K>::Numbers of_state;
        block.find(t, token);
        block.load(rows, token, x), block.load(p.dt, token, dt);
        if (!kForwards) block.load(p.z, token, z);
        block.load_numbers_of_tokens(numbers, of_tokens, t, block.s0, of_state);
        __syncthreads();  // the tile before has been walked
        block.share_steps(shared, token, dt);
        Block<K>::share(shared.u, [&](Spot at) {
            float const value = Block<K>::value(x, at);
            if (kForwards || p.z.data == nullptr) return value;
            float const gate = Block<K>::value(z, at);
            return value * gate * sigmoid(gate);
        });
        Block<K>::share_numbers(numbers, kForwards ? shared.b : shared.c, of_state);
        __syncthreads();
        float steps = 0.f;
        LSM_UNROLL_BY(4)
        for (int k = 0; k < K::kTile; ++k) {
            int const i = kForwards ? k : K::kTile - 1 - k;
            float const dt = shared.dt[i][block.own], value = shared.u[i][block.own];
            steps += dt;
            LSM_UNROLL
            for (int s = 0; s < kMine; ++s) {
                N const a = block.decay(dt, s);
                if constexpr (kForwards) {
                    sum[s] = multiply_add(a, sum[s], scaled(block.b(shared, i, s), dt * value));
                } else {
                    N const of_y = scaled(conj(block.c(shared, i, s)), K::kReadFactor * value);
                    sum[s] = multiply(conj(a), add(sum[s], of_y));
                }
            }
        }
        // Of a tile, not of the segment: angles of thousands of turns would have no digits left.
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            N const a = block.decay(steps, s);
            product[s] = multiply(kForwards ? a : conj(a), product[s]);
        }
    }
}

// The state that comes to the block's segment; `edge` [N][D][S] is what comes to the sequence, nullable.
template <class K, bool kForwards>
LSM_DEVICE void find_start(Block<K> const& block, typename K::Shared& shared, void const* edge,
                           typename K::N (&state)[kMine]) {
    Chain const& chain = block.scratch.chain;
    void* const ends = block.scratch.ends;
    bool const begins = kForwards ? block.segment.index == 0 : block.segment.is_last;
    bool const finishes = kForwards ? block.segment.is_last : block.segment.index == 0;
    bool const leaves = chain.exists() && !finishes;
    typename K::N product[kMine], sum[kMine];
    if (leaves) fold<K, kForwards>(block, shared, product, sum);
    if (begins) {
        block.load_numbers(edge, block.state_row(), state);
    } else {
        i64 const before = block.record() + (kForwards ? -1 : 1);
        if (threadIdx.x == 0) chain.await(before * block.per_record + block.part, block.round());
        __syncthreads();
        block.load_numbers(ends, block.row_of(before), state);
    }
    if (!leaves) return;
    LSM_UNROLL
    for (int s = 0; s < kMine; ++s) sum[s] = multiply_add(product[s], state[s], sum[s]);
    block.store_numbers(ends, block.row_of(block.record()), sum);
    __syncthreads();
    if (threadIdx.x == 0)
        chain.raise(block.record() * block.per_record + block.part, block.round());
}

}  // namespace lsm::selective_kernel
