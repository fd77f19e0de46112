// What a tile attends to, as a short list in shared memory: units of at most a step's tokens, first those that need no
// mask, then those that do. One warp writes it, a part at a time if the lists are long.
#pragma once

#include "kernels/sparse_attn/geometry.cuh"

namespace lsm::sparse_attn {

constexpr int kPlan = 256;

struct Unit {
    int first;  // token of the sequence
    int tag;    // forward: place in the list, or with `unite` which tokens; keys: of Inverse
};

struct Plan {
    Unit units[kPlan];  // full ones from the front, partial ones from the back
    int full, partial;
    int next;  // candidate
    bool more;

    LSM_DEVICE int steps(int each) const { return (full + partial + each - 1) / each; }
    LSM_DEVICE Unit at(int i) const {
        if (i < full) return units[i];
        return i < full + partial ? units[kPlan - 1 - (i - full)] : Unit{kNoKey, 0};
    }
};

// Goes on with the candidates from plan.next up to `count`; look(i, unit) says what one is. In order, so that a row's sums
// do not depend on anything but its list.
template <class Look>
LSM_DEVICE void fill_plan(Plan& plan, int count, Look look) {
    int const lane = threadIdx.x % 32;
    int next = plan.next;
    u32 const below = (1u << lane) - 1;
    int full = 0, partial = 0;
    for (; next < count && full + partial <= kPlan - 32; next += 32) {
        Unit unit = {kNoKey, 0};
        Kind const kind = next + lane < count ? look(next + lane, unit) : Kind::skip;
        u32 const fulls = __ballot_sync(0xffffffffu, kind == Kind::full);
        u32 const partials = __ballot_sync(0xffffffffu, kind == Kind::partial);
        if (kind == Kind::full) plan.units[full + __popc(fulls & below)] = unit;
        if (kind == Kind::partial)
            plan.units[kPlan - 1 - partial - __popc(partials & below)] = unit;
        full += __popc(fulls), partial += __popc(partials);
    }
    __syncwarp();
    if (lane == 0)
        plan.full = full, plan.partial = partial, plan.next = next, plan.more = next < count;
}

// The union of ascending lists, one per lane, where a tag says which lanes have the block: the lowest of all next blocks
// again and again. look(block, sub, unit) as above, for each of `subs` units of a block. `at`: how far each lane is.
template <class Look>
LSM_DEVICE void merge_plan(Plan& plan, Blocks const& blocks, int& at, int subs, Look look) {
    constexpr int kEnd = 0x7fffffff;
    int const lane = threadIdx.x % 32;
    auto const get = [&](int i) {
        int const block = i < blocks.count ? blocks[i] : -1;
        return block < 0 ? kEnd : block;
    };
    int place = at, now = get(place), then = get(place + 1);
    int full = 0, partial = 0;
    bool more = true;
    while (full + partial + subs <= kPlan) {
        int const block = __reduce_min_sync(0xffffffffu, now);
        more = block != kEnd;
        if (!more) break;
        bool const member = now == block;
        u32 const members = __ballot_sync(0xffffffffu, member);
        if (member) {
            ++place, now = then;
            then = get(place + 1);
        }
        for (int sub = 0; sub < subs; ++sub) {
            Unit unit = {kNoKey, static_cast<int>(members)};
            Kind const kind = look(block, sub, unit);
            if (kind == Kind::skip) continue;
            if (lane == 0) plan.units[kind == Kind::full ? full : kPlan - 1 - partial] = unit;
            kind == Kind::full ? ++full : ++partial;
        }
    }
    at = place;
    if (lane == 0) plan.full = full, plan.partial = partial, plan.more = more;
}

// The sums over a tile's rows that each warp left for every unit, block by block, to where other tiles' are added to them.
// All units of such a plan are partial ones. `entry`: of the tile's list.
template <int Warps, int Threads>
LSM_DEVICE void store_bias_sums(Work const& work, Plan const& plan,
                                float const (&sums)[Warps][kPlan], int token, int key_head,
                                int first_head, i64 entry) {
    SparseAttnParams const& p = work.p;
    int const tiles = work.block_q / work.tokens;
    int const list_heads = static_cast<int>(p.lists.heads);
    int const head_tile = (first_head - key_head * work.group) / work.heads;
    int const part = list_heads == p.Hq    ? 0
                     : list_heads == p.Hkv ? head_tile
                                           : key_head * work.head_tiles + head_tile;
    float* const to =
        work.bias_parts +
        (static_cast<i64>(part) * tiles + token % work.block_q / work.tokens) * p.lists.entries +
        entry;
    auto const tag = [&](int k) { return plan.units[kPlan - 1 - k].tag; };
    for (int i = threadIdx.x; i < plan.partial; i += Threads) {
        if (i > 0 && tag(i - 1) == tag(i)) continue;
        float sum = 0.f;
        for (int k = i; k < plan.partial && tag(k) == tag(i); ++k)
            for (int w = 0; w < Warps; ++w) sum += sums[w][k];
        store_global(to + tag(i), sum);
    }
}

// A tile's steps, of `each` units: those without a masked unit come first, without the mask's arithmetic.
template <class Kernel>
LSM_DEVICE void go_through(Kernel& kernel, Plan const& plan, int each) {
    int const count = plan.steps(each), plain = plan.full / each;
    if (count == 0) return;
    kernel.load(0);
    int step = 0;
    LSM_UNROLL_BY(1)
    for (; step < plain; ++step) {
        kernel.advance(step, count);
        kernel.template attend<false>(step);
    }
    LSM_UNROLL_BY(1)
    for (; step < count; ++step) {
        kernel.advance(step, count);
        kernel.template attend<true>(step);
    }
}

}  // namespace lsm::sparse_attn
