// One pass over a segment of a sequence by one block per column of channels. Tokens arrive through a ring of
// shared-memory stages filled by cp.async; a tile is kTokens consecutive positions per warp, a lane owns neighbouring
// channels. Per tile every warp
//   - reads its elements and folds them, from nothing, into one aggregate,
//   - publishes it, and after a barrier walks all warps' aggregates in order: so it knows the state before its own
//     positions, and the state after the tile without asking again,
//   - steps through its positions from the right state and stores what they give.
// The order is fixed, so results repeat to the last bit. Where few channels and sequences would leave multiprocessors
// idle, segments are as long as the stages hold: they are folded first, blocks tell each other what their segments do
// (link), and then steps go through what is still in the stages. What an element is, how it changes the state and what
// it gives is the pass P (passes.cuh):
//
//     T, Monoid                    element type of most tensors; Aggregate and State of one channel
//     kInputs, Input<I>            streamed tensors and their types; Input I of kBefore == I is read one position
//                                  ahead of the walk (the state before, in a backward)
//     rows(I), start(), end()      where they are; states at the two ends
//     begin, read, fold, step      see passes.cuh
//     kRecomputes                  tiles lie where a forward's tiles of kTile positions do, so that recompute() can walk
//                                  each forwards again, from a state that the forward left, and fill the elements
#pragma once

#include <type_traits>

#include "kernels/chain.cuh"
#include "kernels/scan/numbers.cuh"
#include "kernels/segments.cuh"
#include "params/scan.h"

namespace lsm::scan_kernel {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class P>
struct Config {
    using T = typename P::T;
    static constexpr int kLane = Lane<T>::kChannels;
    static constexpr int kColumn = 32 * kLane;  // channels of a block
    static constexpr int kTokens = P::kTokens;  // positions of a warp in a tile
    static constexpr int kTile = kWarps * kTokens;
    static constexpr int kStages = P::kInputs <= 2 ? 4 : P::kInputs == 3 ? 3 : 2;

    // Bytes of a stage before input I.
    template <int I>
    static constexpr int offset() {
        if constexpr (I == 0) {
            return 0;
        } else {
            return offset<I - 1>() +
                   kTile * kColumn * static_cast<int>(sizeof(typename P::template Input<I - 1>));
        }
    }
    static constexpr int kStageBytes = offset<P::kInputs>();
    using Aggregate = typename P::Monoid::Aggregate;
    // Segments of a sequence in a group. A segment waits for the aggregates of those of its group before it, all at once,
    // and for the state after the group before: a sixteenth, or an eighth, of the waits that one after another would be.
    // Their aggregates are 8 KiB, a twelfth of what a segment moves.
    static constexpr int kGroup = 8192 / (kColumn * static_cast<int>(sizeof(Aggregate)));
    static constexpr int kSharedBytes =
        kStages * kStageBytes +
        (P::kRecomputes ? 2 : 1) * kThreads * kLane * static_cast<int>(sizeof(Aggregate));
    static_assert(kStageBytes % 16 == 0 && kSharedBytes <= 160 * 1024);
};

// The positions of a segment in the order of a pass.
struct Walk {
    Segment segment;
    i64 begin;   // of the sequence
    i64 first;   // position of step 0
    i64 length;  // steps
    i64 record;  // of the segment
    i64 before;  // segments of the sequence that the pass meets first
    int direction;
    bool starts, ends;  // the sequence does, with this segment

    LSM_DEVICE Walk(Segment const& s, i64 L, i64 record, int direction)
        : segment(s),
          begin(s.t0 - s.index * L),
          first(direction > 0 ? s.t0 : s.t1 - 1),
          length(s.t1 - s.t0),
          record(record),
          before(direction > 0 ? s.index : (s.end - s.t1 + L - 1) / L),
          direction(direction),
          starts(direction > 0 ? s.index == 0 : s.is_last),
          ends(direction > 0 ? s.is_last : s.index == 0) {}

    LSM_DEVICE i64 position(i64 step) const { return first + direction * step; }
};

// -1 for an order that is none.
LSM_DEVICE i64 token_at(ScanParams const& p, i64 position) {
    if (p.order == nullptr) return position;
    i64 const token = load_global(p.order + position);
    return token >= 0 && token < p.T ? token : -1;
}

template <class T>
LSM_DEVICE T* row_at(Rows const& r, i64 batch, i64 token) {
    return static_cast<T*>(r.data) + batch * r.batch + token * r.time;
}

template <class P>
struct Stream {
    using C = Config<P>;
    using Monoid = typename P::Monoid;
    using Aggregate = typename Monoid::Aggregate;
    using State = typename Monoid::State;

    typename P::Params const& p;
    Walk const& walk;
    i64 column;  // first channel of the block
    int shift;   // rows of the first tile before step 0

    LSM_DEVICE char* stage(i64 tile) const {
        return dyn_smem() + static_cast<int>(tile % C::kStages) * C::kStageBytes;
    }
    LSM_DEVICE Aggregate* carry() const {
        return reinterpret_cast<Aggregate*>(dyn_smem() + C::kStages * C::kStageBytes);
    }
    LSM_DEVICE Aggregate* second_carry() const { return carry() + kThreads * C::kLane; }
    // Of the first row of a warp in a tile; those of a shifted first tile begin below zero.
    LSM_DEVICE i64 step_of(i64 tile, int warp) const {
        return tile * C::kTile + warp * C::kTokens - shift;
    }

    // Asks for input I of a tile; rows outside the walk and channels outside the tensor become zeros.
    template <int I>
    LSM_DEVICE void ask(i64 tile) const {
        using In = typename P::template Input<I>;
        constexpr int kPerPiece = 16 / sizeof(In), kPerRow = C::kColumn / kPerPiece;
        constexpr bool kIsBefore = I == P::kBefore;
        Rows const rows = P::template rows<I>(p);
        if (rows.data == nullptr) return;
        u32 const destination = smem_u32(stage(tile) + C::template offset<I>());
        LSM_UNROLL
        for (int piece = threadIdx.x; piece < C::kTile * kPerRow; piece += kThreads) {
            i64 const step = step_of(tile, 0) + piece / kPerRow;
            i64 const channel = column + piece % kPerRow * kPerPiece;
            bool valid = step < walk.length && channel < p.D;
            if (P::kRecomputes) valid = valid && step >= 0;
            // The state before the sequence is nobody's output.
            if (kIsBefore) valid = valid && (step + 1 < walk.length || !walk.ends);
            i64 const position = walk.position(step + (kIsBefore ? 1 : 0));
            i64 const token = valid ? token_at(p, position) : -1;
            valid = valid && token >= 0;
            In const* const source = row_at<In const>(rows, walk.segment.batch, valid ? token : 0) +
                                     (valid ? channel : 0);
            cp_async16(destination + piece * 16, source, valid);
        }
    }

    template <int... I>
    LSM_DEVICE void ask_all(i64 tile, i64 tiles, std::integer_sequence<int, I...>) const {
        if (tile < tiles) (ask<I>(tile), ...);
        cp_async_commit();
    }
    LSM_DEVICE void ask_all(i64 tile, i64 tiles) const {
        ask_all(tile, tiles, std::make_integer_sequence<int, P::kInputs>{});
    }
};

// A lane's channels of input I, at a row of a stage.
template <class P>
struct TileRow {
    char const* stage;
    int row;

    template <int I>
    LSM_DEVICE void read(
        typename Lane<typename P::template Input<I>>::V (&x)[Config<P>::kLane]) const {
        using In = typename P::template Input<I>;
        using Raw = typename Lane<In>::Raw;
        auto const* const at = reinterpret_cast<Raw const*>(
            stage + Config<P>::template offset<I>() + row * Config<P>::kColumn * sizeof(In));
        Lane<In>::unpack(load_shared(at + threadIdx.x % 32), x);
    }
};

// What blocks leave for those after them where sequences are cut, [record][D].
template <class Monoid>
struct Links {
    Chain chain;
    typename Monoid::Aggregate* aggregates = nullptr;
    typename Monoid::State* states = nullptr;  // after the last segment of a group
    unsigned columns = 1;                      // blocks of a record
};

// By one warp: leaves `total`, what the segment does to a state, for the segments after it, and finds the state that
// comes to it.
template <class P>
LSM_DEVICE void link(typename P::Params const& p, Walk const& walk,
                     Links<typename P::Monoid> const& links, unsigned column, i64 channel,
                     bool inside, typename P::Monoid::Aggregate const (&total)[P::kLane],
                     typename P::Monoid::State (&state)[P::kLane]) {
    using Monoid = typename P::Monoid;
    constexpr int kGroup = Config<P>::kGroup;
    static_assert(kGroup <= 32);  // a lane waits for each
    int const lane = threadIdx.x % 32, place = static_cast<int>(walk.before % kGroup);
    bool const is_first = walk.before == place;  // the group is
    bool const closes = place == kGroup - 1;     // its group
    auto const earlier = [&](int n) { return walk.record - walk.direction * n; };
    auto const leave = [&](auto* to, auto const& x) {
        if (walk.ends) return;  // nobody comes after
        LSM_UNROLL
        for (int j = 0; j < P::kLane; ++j) {
            if (inside) store_global(to + walk.record * p.D + channel + j, x[j]);
        }
        __syncwarp();
        if (lane == 0) links.chain.raise(walk.record * links.columns + column);
    };
    if (!closes) leave(links.aggregates, total);
    if (lane < place + !is_first) links.chain.await(earlier(lane + 1) * links.columns + column);
    __syncwarp();
    if (is_first && inside) P::start(p, walk.segment.sequence, channel, state);
    for (int n = place + !is_first; inside && n > 0; --n) {
        LSM_UNROLL
        for (int j = 0; j < P::kLane; ++j) {
            i64 const at = earlier(n) * p.D + channel + j;
            if (n > place) {
                state[j] = load_global(links.states + at);
            } else {
                Monoid::apply(state[j], load_global(links.aggregates + at));
            }
        }
    }
    if (closes) {
        typename Monoid::State after[P::kLane];
        LSM_UNROLL
        for (int j = 0; j < P::kLane; ++j) after[j] = state[j], Monoid::apply(after[j], total[j]);
        leave(links.states, after);
    }
}

// Blocks of a multiprocessor, at least. What recomputes and folds before it walks takes a few registers more than two
// leave it, and on sm_80 shared memory for one.
template <class P, bool kIsCut>
constexpr int kBlocks = kIsCut && P::kRecomputes ? 1 : 2;

template <class P, bool kIsCut>
__global__ void __launch_bounds__(kThreads, kBlocks<P, kIsCut>)
    stream(typename P::Params const p, Segments const plan, Links<typename P::Monoid> const links,
           void* partial) {
    using C = Config<P>;
    using Monoid = typename P::Monoid;
    using Aggregate = typename Monoid::Aggregate;
    using State = typename Monoid::State;
    constexpr int kLane = C::kLane;
    unsigned place = blockIdx.x;
    if constexpr (kIsCut) {
        place = links.chain.take_place(reinterpret_cast<u32*>(dyn_smem()));
        if (P::direction(p) < 0) place = gridDim.x - 1 - place;  // in the order of the walk
    }
    unsigned const record = place / links.columns, block_column = place % links.columns;
    Segment const segment = plan[record];
    if (segment.unused()) return;
    Walk const walk(segment, plan.L, record, P::direction(p));
    int const shift =
        P::kRecomputes ? static_cast<int>((C::kTile - walk.length % C::kTile) % C::kTile) : 0;
    Stream<P> const self{p, walk, i64(block_column) * C::kColumn, shift};
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 const channel = self.column + lane * kLane;
    bool const inside = channel < p.D;
    P pass;
    pass.begin(p, walk, channel, inside);

    if (segment.poison) {
        for (i64 t = segment.t0 + warp; inside && t < segment.t1; t += kWarps)
            pass.poison(p, segment.batch, t, channel);
        if (inside && warp == 0) pass.poison_ends(p, segment.sequence, channel, partial, record);
        return;
    }

    State state[kLane];
    Aggregate total[kLane];
    LSM_UNROLL
    for (int j = 0; j < kLane; ++j) state[j] = Monoid::nothing(), total[j] = Monoid::identity();

    i64 const tiles = (walk.length + shift + C::kTile - 1) / C::kTile;
    LSM_UNROLL_BY(1)
    for (int tile = 0; tile < C::kStages - 1; ++tile) self.ask_all(tile, tiles);
    // Through all tiles. kFolds: leaves `total`, and all tiles in the stages; else steps, from `state` on.
    auto const go = [&](auto folds) {
        constexpr bool kFolds = decltype(folds)::value, kAsks = kFolds || !kIsCut;
        LSM_UNROLL_BY(1)
        for (i64 tile = 0; tile < tiles; ++tile) {
            if (kAsks) cp_async_wait<C::kStages - 2>();
            __syncthreads();  // the tile is there for all, and all have left the one before
            if (kAsks) self.ask_all(tile + C::kStages - 1, tiles);
            char const* const stage = self.stage(tile);
            i64 const first = self.step_of(tile, warp);

            // kWhole: no bounds in the loops.
            auto const run = [&](auto whole) {
                constexpr bool kWhole = decltype(whole)::value;
                auto const outside = [&](int i) {
                    return !kWhole &&
                           (first + i >= walk.length || (P::kRecomputes && first + i < 0));
                };
                typename P::Element element[C::kTokens];
                if constexpr (P::kRecomputes) pass.recompute(self, stage, tile, outside, element);
                Aggregate mine[kLane];
                LSM_UNROLL
                for (int j = 0; j < kLane; ++j) mine[j] = Monoid::identity();
                LSM_UNROLL
                for (int i = 0; i < C::kTokens; ++i) {
                    if (outside(i)) continue;
                    TileRow<P> const row{stage, warp * C::kTokens + i};
                    pass.read(row, walk, first + i, element[i]);
                    LSM_UNROLL
                    for (int j = 0; j < kLane; ++j) pass.fold(mine[j], element[i], j);
                }
                LSM_UNROLL
                for (int j = 0; j < kLane; ++j)
                    self.carry()[(j * kWarps + warp) * 32 + lane] = mine[j];
                __syncthreads();
                State before[kLane];
                LSM_UNROLL
                for (int j = 0; j < kLane; ++j) {
                    LSM_UNROLL
                    for (int w = 0; w < kWarps; ++w) {
                        if (w == warp) before[j] = state[j];
                        Aggregate const other = self.carry()[(j * kWarps + w) * 32 + lane];
                        if (kFolds) {
                            Monoid::combine(total[j], other);
                        } else {
                            Monoid::apply(state[j], other);
                        }
                    }
                }
                if constexpr (!kFolds) {
                    LSM_UNROLL
                    for (int i = 0; i < C::kTokens; ++i) {
                        if (outside(i)) continue;
                        i64 const token = token_at(p, walk.position(first + i));
                        pass.step(p, walk, TileRow<P>{stage, warp * C::kTokens + i}, first + i,
                                  token, channel, inside && token >= 0, element[i], before);
                    }
                }
            };
            i64 const tile_step = self.step_of(tile, 0);
            if (tile_step >= 0 && walk.length - tile_step >= C::kTile) {
                run(std::true_type{});
            } else {
                run(std::false_type{});
            }
        }
    };
    if constexpr (kIsCut) {
        go(std::true_type{});
        State* const shared = reinterpret_cast<State*>(self.carry());
        __syncthreads();  // the carries have been read
        if (warp == 0) {
            link<P>(p, walk, links, block_column, channel, inside, total, state);
            LSM_UNROLL
            for (int j = 0; j < kLane; ++j) shared[j * 32 + lane] = state[j];
        }
        __syncthreads();
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) state[j] = shared[j * 32 + lane];
        pass.begin(p, walk, channel, inside);  // rather than be kept in registers
    } else if (inside) {
        P::start(p, segment.sequence, channel, state);
    }
    go(std::false_type{});
    if (inside && warp == 0 && walk.ends) P::end(p, segment.sequence, channel, state);
    if constexpr (P::kChannelSums > 0) {
        pass.store_sums(p, reinterpret_cast<char*>(self.carry()), partial, record, channel, inside);
    }
}

// The records' shares of sums per channel, added in order.
template <class V>
__global__ void __launch_bounds__(128)
    add_shares(Segments const plan, V const* shares, V* sums, i64 count) {
    i64 const channel = i64(blockIdx.x) * 128 + threadIdx.x;
    if (channel >= count) return;
    V sum = number<V>(0.f);
    for (i64 record = 0; record < plan.count; ++record) {
        // Only a table has unused records, and reading it costs no division.
        bool const unused = plan.table != nullptr && plan.table[record].unused();
        if (!unused) sum = add(sum, load_global(shares + record * count + channel));
    }
    store_global(sums + channel, sum);
}

template <class P>
struct Plan {
    using Monoid = typename P::Monoid;
    Segments segments;
    Links<Monoid> links;
    void* partial = nullptr;
    i64 bytes = 0;

    // Lays the workspace out; with a null base it only counts its bytes.
    Plan(typename P::Params const& p, void* base) {
        using C = Config<P>;
        Carver carver(base);
        links.columns = static_cast<unsigned>((p.D + C::kColumn - 1) / C::kColumn);
        // One block per multiprocessor keeps enough bytes in flight.
        i64 const stages = C::kStages * C::kTile;
        bool const is_cut = p.T > stages && 10 * p.N * links.columns < 9 * multiprocessors();
        i64 const L = is_cut ? stages : p.T;
        segments = plan_segments(p, L, carver.take<char>(segments_bytes(p, L)));
        i64 const numbers = segments.count * p.D;
        if (is_cut) {
            links.chain = Chain(carver, segments.count * links.columns);
            links.aggregates = carver.take<typename Monoid::Aggregate>(numbers);
            links.states = carver.take<typename Monoid::State>(numbers);
        }
        if constexpr (P::kChannelSums > 0)
            partial = carver.take<typename P::V>(P::kChannelSums * numbers);
        bytes = carver.used();
    }
};

// A pass of an operator; a null workspace: only counts its bytes.
template <class P>
int64_t run_pass(typename P::Params const& p, void* workspace, void* stream_) {
    using C = Config<P>;
    Plan<P> const plan(p, workspace);
    if (workspace == nullptr) return plan.bytes;
    if (plan.segments.count > 0) {
        build_segments(p, plan.segments, stream_);
        bool const is_cut = plan.segments.L < p.T;
        if (is_cut) plan.links.chain.reset(stream_);
        launch(is_cut ? stream<P, true> : stream<P, false>,
               dim3(static_cast<unsigned>(plan.segments.count) * plan.links.columns),
               dim3(kThreads), C::kSharedBytes, stream_, p, plan.segments, plan.links,
               plan.partial);
    }
    if constexpr (P::kChannelSums > 0) {
        using V = typename P::V;
        i64 const count = P::kChannelSums * p.D;
        if (p.channel_grad != nullptr) {
            launch(add_shares<V>, dim3(static_cast<unsigned>((count + 127) / 128)), dim3(128), 0,
                   stream_, plan.segments, static_cast<V const*>(plan.partial),
                   static_cast<V*>(p.channel_grad), count);
        }
    }
    return 0;
}

}  // namespace lsm::scan_kernel
