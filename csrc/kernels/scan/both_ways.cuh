// Passes over sequences by blocks that need what lies on either side of them (docs/kernels/scan.md).
//
// A block has a segment of a sequence and a column of channels, all of it in shared memory; a warp a run of the
// segment's tokens, a lane neighbouring channels. A pass (Averages, Gradients) over it:
//   - a warp folds its run into what it adds to the sums that pass it, one from each side;
//   - the segment's two sums are left for other blocks, and when all segments have left theirs, what comes to this one
//     is added up;
//   - the warp steps through its run backwards, with the sums from the left made again a piece (some tokens) at a time.
//     In the last pass, the rows of the block's next column arrive where it has been.
//
// Blocks that wait for what lies on both sides have to run at once (launch_together). Where a sequence has more segments
// than the card holds blocks, a launch only leaves the sums of a pass, and the next one begins again and goes on.
#pragma once

#include "kernels/scan/passes.cuh"
#include "kernels/scan/weights.cuh"
#include "params/wkv4.h"

namespace lsm::scan_kernel {

constexpr int kSides = 2;     // past and future
constexpr int kChannels = 2;  // of a lane
constexpr int kColumn = 32 * kChannels;

// Of some tokens, numerators and denominators (the values of gradients' sums) over 2^scale.
struct alignas(16) Sum {
    float tokens, scale, top, bottom;
};
// With their slopes, sums in which each term counts as often as tokens have followed it: minus the derivatives by the
// rate.
struct alignas(8) SlopedSum {
    float tokens, scale, top, bottom, top_slope, bottom_slope;
};

template <class S>
LSM_DEVICE S nothing() {
    S sum{};
    sum.scale = -__uint_as_float(0x7f800000u);
    return sum;
}

// What a sum becomes on its way through further tokens.
template <class S>
LSM_DEVICE void append(S& sum, S const& next, float rate) {
    Weights const w = weigh(fmaf(-rate, next.tokens, sum.scale), next.scale);
    if constexpr (std::is_same_v<S, SlopedSum>) {
        sum.top_slope =
            fmaf(w.first, fmaf(next.tokens, sum.top, sum.top_slope), w.second * next.top_slope);
        sum.bottom_slope = fmaf(w.first, fmaf(next.tokens, sum.bottom, sum.bottom_slope),
                                w.second * next.bottom_slope);
    }
    sum.tokens += next.tokens;
    sum.scale = w.scale;
    sum.top = fmaf(w.first, sum.top, w.second * next.top);
    sum.bottom = fmaf(w.first, sum.bottom, w.second * next.bottom);
}

LSM_DEVICE void store_sum(Sum* to, Sum const& sum) {
    store_global(to, sum);
}
LSM_DEVICE Sum load_sum(Sum const* from) {
    return load_global(from);
}
LSM_DEVICE void store_sum(SlopedSum* to, SlopedSum const& sum) {
    float2* const pairs = reinterpret_cast<float2*>(to);
    store_global(pairs, {sum.tokens, sum.scale});
    store_global(pairs + 1, {sum.top, sum.bottom});
    store_global(pairs + 2, {sum.top_slope, sum.bottom_slope});
}
LSM_DEVICE SlopedSum load_sum(SlopedSum const* from) {
    float2 const* const pairs = reinterpret_cast<float2 const*>(from);
    float2 const a = load_global(pairs), b = load_global(pairs + 1), c = load_global(pairs + 2);
    return {a.x, a.y, b.x, b.y, c.x, c.y};
}

// Sequences on blocks: a chain is a sequence's column, and blocks b, b + 1, ... its segments. With fewer groups of
// blocks than chains, a group goes from one chain to the next.
struct Chains {
    i64 length;  // of a segment, in tokens
    int count;
    unsigned segments, columns;
    bool
        at_once;  // blocks wait for each other; else the launch leaves the sums of pass `ready`, and ends there
    int ready;        // passes whose sums have all been left before
    u32* arrived[2];  // [count], of a pass: how many segments have left its sums
    void* left[2];    // [count][segments][side][channel of the column]
};

// ---- What a block keeps of its segment ----

// A lane's channels at a token of the segment.
template <class Op>
struct SegmentRow {
    int token;

    template <int I>
    LSM_DEVICE void read(float (&x)[kChannels]) const {
        using Lane = Lane<typename Op::T>;
        auto const* const rows =
            reinterpret_cast<typename Lane::Raw const*>(dyn_smem() + I * Op::kInputBytes);
        Lane::unpack(load_shared(rows + token * 32 + threadIdx.x % 32), x);
    }
    template <int I>
    LSM_DEVICE float2* kept() const {
        auto* const rows = reinterpret_cast<float2*>(dyn_smem() + Op::kInputs * Op::kInputBytes);
        return rows + (I * Op::kLength + token) * 32 + threadIdx.x % 32;
    }
    template <int I>
    LSM_DEVICE void keep(float const (&x)[kChannels]) const {
        store_shared(kept<I>(), {x[0], x[1]});
    }
    template <int I>
    LSM_DEVICE void read_kept(float (&x)[kChannels]) const {
        float2 const pair = load_shared(kept<I>());
        x[0] = pair.x, x[1] = pair.y;
    }
};

// kRun: tokens of a warp; kInputs: rows read, kKept: made.
template <class T_, int kRun_, int kInputs_, int kKept_>
struct Operator {
    using T = T_;
    static constexpr int kRun = kRun_, kInputs = kInputs_, kKept = kKept_;
    static constexpr int kLength = kWarps * kRun;
    static constexpr int kInputBytes = kLength * kColumn * static_cast<int>(sizeof(T));
    static constexpr int kRowBytes =
        kInputs * kInputBytes + kKept * kLength * kColumn * static_cast<int>(sizeof(float));
};
struct Place {
    i64 batch, token, channel;
    bool inside;
};

// ---- The walk ----

template <class Op>
struct Block {
    using T = typename Op::T;
    static constexpr int kPiece = Op::kPiece, kPieces = Op::kRun / kPiece;
    static constexpr int kSharedBytes =
        Op::kRowBytes +
        kSides * kChannels * kThreads * static_cast<int>(sizeof(typename Op::Largest));
    static_assert(Op::kRun % kPiece == 0 && kPieces <= 4 && Op::kRowBytes % 16 == 0);

    Wkv4Params const& p;
    Chains const& chains;
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned segment;
    i64 t0;           // of the segment
    int first, last;  // of the warp's run, from t0 on
    float rate[kChannels], bonus[kChannels];

    LSM_DEVICE Block(Wkv4Params const& p, Chains const& chains)
        : p(p), chains(chains), segment(blockIdx.x % chains.segments), t0(segment * chains.length) {
        int const tokens = static_cast<int>(p.T - t0 < chains.length ? p.T - t0 : chains.length);
        int const each = (tokens + kWarps - 1) / kWarps;
        first = warp * each < tokens ? warp * each : tokens;
        last = first + each < tokens ? first + each : tokens;
    }
    LSM_DEVICE i64 batch_of(unsigned chain) const { return chain / chains.columns; }
    LSM_DEVICE i64 column_of(unsigned chain) const { return i64(chain % chains.columns) * kColumn; }
    LSM_DEVICE i64 channel_of(int chain) const { return column_of(chain) + kChannels * lane; }

    LSM_DEVICE void load_channels(int chain) {
        i64 const channel = channel_of(chain);
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) rate[j] = bonus[j] = 0.f;
        if (channel >= p.D) return;
        load_lane(static_cast<float const*>(p.channel) + channel, rate);
        load_lane(static_cast<float const*>(p.bonus) + channel, bonus);
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) rate[j] *= kLog2e, bonus[j] *= kLog2e;
    }

    template <int I>
    LSM_DEVICE void ask_input(int chain, int piece) const {
        constexpr int kPer16 = 16 / sizeof(T), kPerRow = kColumn / kPer16;
        Rows const rows = Op::template rows<I>(p);
        u32 const to = smem_u32(dyn_smem() + I * Op::kInputBytes);
        LSM_UNROLL
        for (int n = lane; n < kPiece * kPerRow; n += 32) {
            int const token = first + piece * kPiece + n / kPerRow;
            i64 const channel = column_of(chain) + n % kPerRow * kPer16;
            if (token >= last) continue;
            bool const valid = channel < p.D;
            cp_async16(to + (token * kPerRow + n % kPerRow) * 16,
                       row_at<T const>(rows, batch_of(chain), t0 + token) + (valid ? channel : 0),
                       valid);
        }
    }
    template <int... I>
    LSM_DEVICE void ask(int chain, int piece, std::integer_sequence<int, I...>) const {
        if (chain < chains.count) (ask_input<I>(chain, piece), ...);
        cp_async_commit();
    }
    // For the rows of a piece of the warp's run, which are the warp's alone.
    LSM_DEVICE void ask(int chain, int piece) const {
        ask(chain, piece, std::make_integer_sequence<int, Op::kInputs>{});
    }
    // Pieces arrive in the order in which they are used, the last one first.
    LSM_DEVICE static void await_piece(int piece) {
        if (piece == 0) cp_async_wait<0>();
        if (piece == 1) cp_async_wait<1>();
        if (piece == 2) cp_async_wait<2>();
        if (piece == 3) cp_async_wait<3>();
        __syncwarp();
    }
    LSM_DEVICE static char* carries() { return dyn_smem() + Op::kRowBytes; }
};

// A pass over the segment of a block.
template <class Op, template <class> class Pass>
struct PassOver {
    using P = Pass<Op>;
    using S = typename P::S;
    using B = Block<Op>;
    static constexpr int kPiece = B::kPiece, kPieces = B::kPieces;
    static constexpr bool kIsLast = P::kNumber == Op::kPasses - 1;

    B const& block;
    S piece_past[kPieces][kChannels];  // what each piece of the run leaves

    // Of one of the warps, on a side: its run's sum, and other things between barriers.
    LSM_DEVICE S& carry(int side, int j, int warp) const {
        return reinterpret_cast<S*>(
            B::carries())[((side * kChannels + j) * kWarps + warp) * 32 + block.lane];
    }
    template <class F>
    LSM_DEVICE static void each(F const& f) {
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) f(j);
    }

    // The run, from nothing: what comes out of it on the right (past), and on the left.
    LSM_DEVICE void fold(S (&past)[kChannels], S (&future)[kChannels]) {
        each([&](int j) { past[j] = future[j] = nothing<S>(); });
        LSM_UNROLL_BY(1)
        for (int piece = kPieces - 1; piece >= 0; --piece) {
            B::await_piece(piece);
            int const begin = block.first + piece * kPiece;
            S own[kChannels];
            each([&](int j) { own[j] = nothing<S>(); });
            LSM_UNROLL
            for (int i = kPiece - 1; i >= 0; --i) {
                if (begin + i >= block.last) continue;
                S x[kChannels];
                P::added(SegmentRow<Op>{begin + i}, x);
                each([&](int j) {
                    append(future[j], x[j], block.rate[j]);
                    append(x[j], own[j], block.rate[j]);
                    own[j] = x[j];
                });
            }
            each([&](int j) {
                LSM_UNROLL
                for (int n = 0; n < kPieces; ++n) {
                    if (n == piece) piece_past[n][j] = own[j];
                }
                append(own[j], past[j], block.rate[j]);
                past[j] = own[j];
            });
        }
    }

    // From what the warps' runs give to what surrounds each.
    LSM_DEVICE void surround(S (&past)[kChannels], S (&future)[kChannels]) const {
        int const warp = block.warp;
        __syncthreads();  // what the carries were before has been read
        each([&](int j) {
            carry(0, j, warp) = past[j], carry(1, j, warp) = future[j];
            past[j] = future[j] = nothing<S>();
        });
        __syncthreads();
        LSM_UNROLL_BY(1)
        for (int w = 0; w < warp; ++w)
            each([&](int j) { append(past[j], carry(0, j, w), block.rate[j]); });
        LSM_UNROLL_BY(1)
        for (int w = kWarps; --w > warp;)
            each([&](int j) { append(future[j], carry(1, j, w), block.rate[j]); });
    }

    // What a segment has left on a side, of the lane's channels.
    LSM_DEVICE S* left(i64 chain, unsigned segment, int side) const {
        return static_cast<S*>(block.chains.left[P::kNumber]) +
               ((chain * block.chains.segments + segment) * kSides + side) * kColumn +
               kChannels * block.lane;
    }
    // By the warps that see all others on one side.
    LSM_DEVICE void leave(int chain, S const (&past)[kChannels],
                          S const (&future)[kChannels]) const {
        if (block.warp != 0 && block.warp != kWarps - 1) return;
        int const side = block.warp == 0;
        each([&](int j) {
            S sum = side ? future[j] : past[j];
            append(sum, carry(side, j, block.warp), block.rate[j]);
            store_sum(left(chain, block.segment, side) + j, sum);
        });
        __syncwarp();
        if (block.lane != 0) return;
        __threadfence();
        atomicAdd(block.chains.arrived[P::kNumber] + chain, 1u);
    }
    // Waits for all segments; the sums that come to this one from all of those on either side: a warp adds up an eighth
    // of them, and then a warp those sums of one side and channel.
    LSM_DEVICE void link(int chain, S (&past)[kChannels], S (&future)[kChannels]) const {
        Chains const& chains = block.chains;
        if (threadIdx.x == 0) {
            u32 const volatile& arrived = chains.arrived[P::kNumber][chain];
            while (arrived < kSides * chains.segments) __nanosleep(20);
            __threadfence();
        }
        __syncthreads();
        LSM_UNROLL_BY(1)
        for (int side = 0; side < kSides; ++side) {
            unsigned const others = side == 0 ? block.segment : chains.segments - 1 - block.segment;
            S sum[kChannels];
            each([&](int j) { sum[j] = nothing<S>(); });
            unsigned const end = others * (block.warp + 1) / kWarps;
            LSM_UNROLL_BY(2)
            for (unsigned n = others * block.warp / kWarps; n < end; ++n) {
                S const* const from = left(chain, side == 0 ? n : chains.segments - 1 - n, side);
                each([&](int j) { append(sum[j], load_sum(from + j), block.rate[j]); });
            }
            each([&](int j) { carry(side, j, block.warp) = sum[j]; });
        }
        __syncthreads();
        if (block.warp < kSides * kChannels) {
            int const side = block.warp / kChannels, j = block.warp % kChannels;
            float const rate = j == 0 ? block.rate[0] : block.rate[1];
            S sum = carry(side, j, 0);
            LSM_UNROLL_BY(1)
            for (int w = 1; w < kWarps; ++w) append(sum, carry(side, j, w), rate);
            carry(side, j, 0) = sum;
        }
        __syncthreads();
        each([&](int j) { past[j] = carry(0, j, 0), future[j] = carry(1, j, 0); });
    }

    // The sums from the left wait in the warp's own carries, rather than in registers.
    LSM_DEVICE void put_aside(S const (&past)[kChannels]) const {
        __syncthreads();  // the carries have been read
        each([&](int j) { carry(0, j, block.warp) = past[j]; });
    }
    // Through the run from its end; asks for the next chain's rows.
    LSM_DEVICE void step(P& pass, int chain, int next, S (&future)[kChannels]) const {
        i64 const channel = block.channel_of(chain);
        Place at{block.batch_of(chain), 0, channel, channel < block.p.D};
        LSM_UNROLL_BY(1)
        for (int piece = kPieces - 1; piece >= 0; --piece) {
            int const begin = block.first + piece * kPiece;
            S before[kPiece][kChannels], past[kChannels];
            each([&](int j) {
                past[j] = carry(0, j, block.warp);
                LSM_UNROLL
                for (int n = 0; n < kPieces - 1; ++n) {
                    S whole = piece_past[n][j];
                    whole.tokens = kPiece;
                    if (n < piece) append(past[j], whole, block.rate[j]);
                }
            });
            LSM_UNROLL
            for (int i = 0; i < kPiece; ++i) {
                if (begin + i >= block.last) continue;
                S x[kChannels];
                P::added(SegmentRow<Op>{begin + i}, x);
                each([&](int j) {
                    before[i][j] = past[j];
                    append(past[j], x[j], block.rate[j]);
                });
            }
            LSM_UNROLL
            for (int i = kPiece - 1; i >= 0; --i) {
                if (begin + i >= block.last) continue;
                SegmentRow<Op> const row{begin + i};
                S x[kChannels];
                P::added(row, x);
                at.token = block.t0 + begin + i;
                pass.emit(block.p, row, block.bonus, before[i], future, at);
                each([&](int j) { append(future[j], x[j], block.rate[j]); });
            }
            if constexpr (kIsLast) {
                __syncwarp();  // all lanes have left the rows
                block.ask(next, piece);
            }
        }
    }

    // False: the launch ends here.
    LSM_DEVICE bool run(P& pass, int chain, int next) {
        Chains const& chains = block.chains;
        S past[kChannels], future[kChannels], from_left[kChannels], from_right[kChannels];
        fold(past, future);
        surround(past, future);
        each([&](int j) { from_left[j] = from_right[j] = nothing<S>(); });
        if (chains.segments > 1) {
            bool const leaves = chains.at_once || chains.ready == P::kNumber;
            if (leaves) leave(chain, past, future);
            if (leaves && !chains.at_once) return false;
            link(chain, from_left, from_right);
        }
        each([&](int j) {
            append(from_left[j], past[j], block.rate[j]);
            append(from_right[j], future[j], block.rate[j]);
        });
        put_aside(from_left);
        step(pass, chain, next, from_right);
        return true;
    }
};

}  // namespace lsm::scan_kernel
