// Segments of time, where blocks are fewer than the card holds: what each segment does to a state that comes to it, and
// then, sequence by sequence, the states that come to each. Forwards a state is h, backwards the gradient of h before a
// token.
#pragma once

#include "kernels/selective/block.cuh"

namespace lsm::selective_kernel {

// state <- product state + sum
template <class N>
using Aggregate = Piece<N, 2>;

template <class K, bool kForwards>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    fold(SelectiveParams const p, Segments const plan, unsigned blocks_of_group, int s0,
         Scratch const scratch) {
    using N = typename K::N;
    auto& shared = *reinterpret_cast<typename K::Shared*>(dyn_smem());
    Block<K> const block(p, plan, blocks_of_group, s0, scratch);
    if (block.segment.unused() || block.segment.poison) return;
    // Nothing comes from the last.
    if (kForwards ? block.segment.is_last : block.segment.index == 0) return;
    Rows const& rows = kForwards ? p.u : p.grad_y;
    Projection const& numbers = kForwards ? p.b : p.c;
    bool const of_tokens = kForwards ? !p.channel_B : !p.channel_C;
    N product[kMine], sum[kMine];
    Block<K>::fill(product, 1.f), Block<K>::fill(sum, 0.f);
    block.share_channels(shared);
    for (int step = 0, tiles = block.tiles(); step < tiles; ++step) {
        int const t = (kForwards ? step : tiles - 1 - step) * K::kTile;
        typename Block<K>::Tokens token;
        typename Block<K>::Elements x, dt, z;
        typename Block<K>::Numbers of_state;
        block.find(t, token);
        block.load(rows, token, x), block.load(p.dt, token, dt);
        if (!kForwards) block.load(p.z, token, z);
        block.load_numbers_of_tokens(numbers, of_tokens, t, of_state);
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
    auto* const to = static_cast<Aggregate<N>*>(scratch.aggregates) + block.record_row() * p.S;
    LSM_UNROLL
    for (int s = 0; s < kMine; ++s) {
        if (block.inside(s)) store_global(to + block.state(s), Aggregate<N>{product[s], sum[s]});
    }
}

// The states that come to every segment, one thread per channel and state of a sequence; `edge` [N][D][S] is what
// comes to the sequence, nullable.
template <class N, bool kForwards>
__global__ void __launch_bounds__(128)
    join(SelectiveParams const p, Segments const plan, N const* edge, Scratch const scratch) {
    i64 const index = i64(blockIdx.x) * 128 + threadIdx.x, numbers = p.D * p.S;
    i64 const first = index / numbers, at = index % numbers;
    if (first >= plan.count) return;
    Segment const segment = plan[first];
    if (segment.unused() || segment.poison) return;
    if (kForwards ? segment.index != 0 : !segment.is_last) return;
    N state =
        edge == nullptr ? number<N>(0.f) : load_global(edge + segment.sequence * numbers + at);
    for (i64 record = first;; record += kForwards ? 1 : -1) {
        store_global(static_cast<N*>(scratch.starts) + record * numbers + at, state);
        if (kForwards ? plan[record].is_last : plan[record].index == 0) return;
        auto const* const does = static_cast<Aggregate<N> const*>(scratch.aggregates);
        Aggregate<N> const both = load_global(does + record * numbers + at);
        state = multiply_add(both.element[0], state, both.element[1]);
    }
}

}  // namespace lsm::selective_kernel
