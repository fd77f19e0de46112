// The selective scan on CUDA: states over lanes (docs/kernels/scan.md).
//
// A block owns kThreads / L neighbouring channels of a segment of a sequence; a channel's states lie in L lanes, four
// each. Per tile of tokens the block's threads first take the roles of loaders, four channels of a token each, or four
// tokens of a channel where channels lie first: softplus once, dt and u to shared memory, B and C widened beside them,
// from there on tokens are rows whatever the layout. Then every lane walks the tile's tokens with
// its states in registers; sums over states go through shuffles. More states than fit go in rounds: of a tile in the
// forward; of all tokens in the backward, whose sums over states meet in the workspace.
#pragma once

#include "kernels/chain.cuh"
#include "kernels/prefetch.cuh"
#include "kernels/scan/numbers.cuh"
#include "kernels/segments.cuh"
#include "params/selective_scan.h"

namespace lsm::selective_kernel {

constexpr int kMine = 4;  // states of a lane

template <class T, int n>
struct alignas(n * sizeof(T)) Piece {
    T element[n];
};

LSM_DEVICE float real_product(float a, float b) {
    return a * b;
}
LSM_DEVICE float real_product(Complex a, Complex b) {
    return fmaf(a.re, b.re, -a.im * b.im);
}
LSM_DEVICE float scaled(float a, float x) {
    return a * x;
}
LSM_DEVICE Complex scaled(Complex a, float x) {
    return {a.re * x, a.im * x};
}
// 2^a, of a decay's logarithm: not positive where it is legal.
LSM_DEVICE float power_of_two(float a) {
    return exp2_approx(a);
}
LSM_DEVICE Complex power_of_two(Complex a) {
    return scaled(exponential(Complex{0.f, 0.693147181f * a.im}), exp2_approx(a.re));
}
LSM_DEVICE float shuffle_xor(float x, int d) {
    return __shfl_xor_sync(0xffffffffu, x, d);
}
LSM_DEVICE Complex shuffle_xor(Complex x, int d) {
    return {shuffle_xor(x.re, d), shuffle_xor(x.im, d)};
}

// Sums of kCount numbers each over lanes that differ in the bits kFrom, kFrom / 2, ... kTo: halves of the numbers change
// places as halves of the lanes are added, until one is left. A lane ends up with the first numbers_left() of x,
// which are the sums from number first_left() on.
template <int kCount, int kFrom, int kTo>
struct Exchange {
    static constexpr int numbers_left() {
        int width = kCount;
        for (int d = kFrom; d >= kTo && width > 1; d /= 2) width /= 2;
        return width;
    }
    LSM_DEVICE static int first_left() {
        int first = 0, width = kCount;
        LSM_UNROLL
        for (int d = kFrom; d >= kTo; d /= 2) {
            width /= 2;
            if (threadIdx.x & d) first += width;
        }
        return first;
    }
    template <class N>
    LSM_DEVICE static void add_up(N (&x)[kCount]) {
        step<kCount / 2, kFrom>(x);
    }

  private:
    template <int kHalf, int kBit, class N>
    LSM_DEVICE static void step(N (&x)[kCount]) {
        if constexpr (kBit >= kTo) {
            bool const upper = threadIdx.x & kBit;
            LSM_UNROLL
            for (int i = 0; i < kHalf; ++i) {
                N const mine = upper ? x[i + kHalf] : x[i], other = upper ? x[i] : x[i + kHalf];
                x[i] = add(mine, shuffle_xor(other, kBit));
            }
            if constexpr (kHalf == 0) x[0] = add(x[0], shuffle_xor(x[0], kBit));
            step<kHalf / 2, kBit / 2>(x);
        }
    }
};

// What lies side by side in memory, and so what a loader's piece is.
enum class Layout {
    last,   // channels: four of a token
    first,  // tokens, in rows that are aligned: four of a channel
    lines  // tokens, as they come: four channels of a token, whose neighbours are the neighbouring lanes'
};

// Numbers N in registers of tensors of T; kChannelBC: B or C may be a channel's.
template <class T_, class N_, int L_, bool kChannelBC_, Layout kLayout_, int kThreads_ = 256>
struct Kind {
    using T = T_;
    using N = N_;
    // The same with twice as many channels to a block, which then read B and C once.
    using Wide = Kind<T_, N_, L_, kChannelBC_, kLayout_, 2 * kThreads_>;
    static constexpr int L = L_;  // lanes of a channel
    static constexpr int kThreads = kThreads_, kWarps = kThreads / 32;
    static constexpr bool kChannelBC = kChannelBC_;
    static constexpr Layout kLayout = kLayout_;
    static constexpr bool kFirst = kLayout != Layout::last;   // channels are, in memory
    static constexpr bool kAlong = kLayout == Layout::first;  // pieces go along tokens
    static constexpr bool kIsComplex = std::is_same_v<N, Complex>;
    using TokenNumber = std::conditional_t<kIsComplex, N, T>;  // of B and C of tokens
    static constexpr int kChannels = kThreads / L;             // of a block
    static constexpr int kStates = L * kMine;                  // of a round
    static constexpr bool kRounds = L == 16;                   // one may not do
    static constexpr int kTile = selective_tile(kIsComplex);   // tokens
    static constexpr int kAllNumbers = kTile * kStates;        // of B, in a tile
    static constexpr int kNumbers = (kAllNumbers + kThreads - 1) / kThreads;  // of a thread
    static constexpr int kVector = 4;                       // elements of a loader's piece
    static constexpr int kRow = kAlong   ? kTile / kVector  // pieces side by side
                                : kFirst ? kTile
                                         : kChannels / kVector;
    static constexpr int kAll = kTile * kChannels / kVector;          // pieces of a tile
    static constexpr int kPieces = (kAll + kThreads - 1) / kThreads;  // of a thread, of one place
    static constexpr int kMicro = kIsComplex ? 4 : 8;  // tokens whose states the backward keeps
    static constexpr int kBlocks =                     // of a multiprocessor, at least
        L == 4 && !kChannelBC && kThreads == 256 ? 2 : 1;
    static constexpr float kReadFactor = kIsComplex ? 2.f : 1.f;  // y = 2 Re(C h) of pairs
    static_assert(kAllNumbers % kThreads == 0 || kThreads % kAllNumbers == 0);
    static_assert(kThreads % kRow == 0);
    static_assert(kThreads % kStates == 0 && kThreads % kTile == 0);

    // Padded so that a warp's pieces, which begin four rows apart where channels lie first, are in banks of their own.
    using Row = float[kTile][kChannels + (kFirst ? 32 / kTile : 0)];
    // Padded by a piece, for lanes that are tokens.
    using NumberRow = N[kStates + 16 / sizeof(N)];
    struct Shared {
        Row dt, u, y;
        alignas(16) NumberRow b[kTile], c[kTile];
        float skip[kChannels], bias[kChannels];
    };
    struct SharedBackward : Shared {
        Row dy, ddu;  // ddt takes the place of y
        N parked[kTile / kMicro][kThreads][kMine];
        N shares[2][kMicro][kWarps][2 * kStates];  // of dC and dB, of every other kMicro tokens
    };
};

// The workspace.
struct Scratch {
    // The backward's sums over the states of earlier rounds, [B T][D], or [B][D][T] where channels lie first; null where
    // there is one round.
    float *y = nullptr, *ddt = nullptr, *ddu = nullptr;
    void* walked = nullptr;     // [records][D][S]: states between the forward's rounds, or null
    void* tokens = nullptr;     // [2][blocks of channels][B T][S]: shares of dB and dC
    float* channels = nullptr;  // [2][records][D]: of dD and the bias
    void* states = nullptr;     // [1 or 3][S][records][D]: of dA, and of channels' dB and dC
    Chain chain;                // of the blocks of a sequence's segments, if it is cut
    void* ends = nullptr;       // [records][D][S]: the states that they leave
    bool pieces = false;        // channels last: whether rows lie in aligned pieces of four
};

// An element of a tile: number e of the thread's piece i, at a row (token) and channel of the block.
struct Spot {
    int i, e, row, c;
};

// What a thread knows of its block, channel and states.
template <class K>
struct Block {
    using T = typename K::T;
    using N = typename K::N;
    using Elements = Piece<T, K::kVector>[K::kPieces];  // of one tensor, that a thread loads
    using Tokens = i64[K::kPieces];                     // whose they are, or -1

    SelectiveParams const& p;
    Scratch const& scratch;
    Segment segment;
    unsigned record_;           // of the segment
    unsigned per_record, part;  // blocks of a segment, and which of them
    int sequence;
    i64 begin;  // tokens [begin, begin + length) of the segment
    int length;
    int tile0;         // its first tile, over all sequences; segments are whole tiles
    int group, first;  // channels [first, first + count)
    int count, s0;     // states of this round: [s0, s0 + K::kStates)
    int lane, own;     // of the channel's lanes; the thread's channel
    N a_log2[kMine];
    N own_b[kMine], own_c[kMine];  // where they are the channel's

    // Blocks of segments are in the order of the walk.
    LSM_DEVICE Block(SelectiveParams const& p, Segments const& plan, unsigned blocks_of_group,
                     int s0, Scratch const& scratch, bool forwards)
        : p(p), scratch(scratch), s0(K::kRounds ? s0 : 0) {
        per_record = blocks_of_group * static_cast<unsigned>(p.G);
        unsigned place = scratch.chain.take_place(reinterpret_cast<u32*>(dyn_smem()), round());
        if (!forwards && scratch.chain.exists()) place = gridDim.x - 1 - place;
        record_ = place / per_record, part = place % per_record;
        segment = plan[record_];
        int const channels = static_cast<int>(p.D / p.G);
        int const at = static_cast<int>(part % blocks_of_group) * K::kChannels;
        group = static_cast<int>(part / blocks_of_group);
        first = group * channels + at;
        count = channels - at < K::kChannels ? channels - at : K::kChannels;
        sequence = segment.sequence;
        begin = segment.t0, length = static_cast<int>(segment.t1 - segment.t0);
        // Packed sequences have room for one tile more each.
        i64 const start = begin - segment.index * plan.L;
        tile0 =
            static_cast<int>((p.cu_seqlens == nullptr ? sequence * ((p.T + K::kTile - 1) / K::kTile)
                                                      : start / K::kTile + sequence) +
                             segment.index * plan.L / K::kTile);
        lane = threadIdx.x % K::L, own = threadIdx.x / K::L;
        load_channel();
    }
    LSM_DEVICE void load_channel() {
        int const row = first + own;
        load_numbers(p.A, row, a_log2);
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) a_log2[s] = scaled(a_log2[s], 1.44269504f);
        if constexpr (K::kChannelBC) {
            load_numbers(p.channel_B ? p.b.data : nullptr, row, own_b);
            load_numbers(p.channel_C ? p.c.data : nullptr, row, own_c);
        }
    }
    LSM_DEVICE void begin_round(int round) {
        s0 = round * K::kStates;
        load_channel();
    }
    LSM_DEVICE i64 record() const { return record_; }
    LSM_DEVICE int round() const { return s0 / K::kStates; }
    LSM_DEVICE i64 batch() const { return p.cu_seqlens == nullptr ? sequence : 0; }
    LSM_DEVICE bool is_last() const { return !K::kRounds || s0 + K::kStates >= p.S; }
    LSM_DEVICE int column(int s) const { return lane * kMine + s; }  // of the round's states
    LSM_DEVICE int state(int s) const { return s0 + column(s); }
    LSM_DEVICE bool inside(int s) const { return own < count && state(s) < p.S; }

    // The thread's states of a row of a tensor [rows][S]; zeros of none. Four lie side by side.
    static constexpr int kPer = 16 / sizeof(N);
    LSM_DEVICE bool are_pieces(void const* at) const {
        return inside(kMine - 1) && reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
    }
    LSM_DEVICE void load_numbers(void const* from, i64 row, N (&x)[kMine]) const {
        N const* const at = static_cast<N const*>(from) + row * p.S + state(0);
        if (from != nullptr && are_pieces(at)) {
            LSM_UNROLL
            for (int s = 0; s < kMine; s += kPer) {
                auto const piece = load_global(reinterpret_cast<Piece<N, kPer> const*>(at + s));
                LSM_UNROLL
                for (int i = 0; i < kPer; ++i) x[s + i] = piece.element[i];
            }
            return;
        }
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s)
            x[s] = from != nullptr && inside(s) ? load_global(at + s) : number<N>(0.f);
    }
    LSM_DEVICE void ask_numbers(void const* from, i64 row) const {
        if (inside(0)) prefetch_l2(static_cast<N const*>(from) + row * p.S + state(0));
    }
    LSM_DEVICE void store_numbers(void* to, i64 row, N const (&x)[kMine]) const {
        if (to == nullptr) return;
        N* const at = static_cast<N*>(to) + row * p.S + state(0);
        if (are_pieces(at)) {
            LSM_UNROLL
            for (int s = 0; s < kMine; s += kPer) {
                Piece<N, kPer> piece;
                LSM_UNROLL
                for (int i = 0; i < kPer; ++i) piece.element[i] = x[s + i];
                store_global(reinterpret_cast<Piece<N, kPer>*>(at + s), piece);
            }
            return;
        }
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            if (inside(s)) store_global(at + s, x[s]);
        }
    }
    LSM_DEVICE i64 state_row() const { return sequence * p.D + first + own; }
    LSM_DEVICE i64 row_of(i64 record) const { return record * p.D + first + own; }
    LSM_DEVICE int tiles() const { return (length + K::kTile - 1) / K::kTile; }
    LSM_DEVICE i64 tile_row(int tile) const { return i64(tile0 + tile) * p.D + first + own; }
    // f(the first spot of every piece of the thread)
    template <class F>
    LSM_DEVICE static void pieces(F const& f) {
        LSM_UNROLL
        for (int i = 0; i < K::kPieces; ++i) {
            int const piece = threadIdx.x + i * K::kThreads;
            if (K::kAll % K::kThreads != 0 && piece >= K::kAll) return;
            int const line = piece / K::kRow, along = piece % K::kRow;
            f(K::kAlong   ? Spot{i, 0, along * K::kVector, line}
              : K::kFirst ? Spot{i, 0, along, line * K::kVector}
                          : Spot{i, 0, line, along * K::kVector});
        }
    }
    // f(spot) of every element of a piece, given its first spot.
    template <class F>
    LSM_DEVICE static void elements(Spot first, F const& f) {
        LSM_UNROLL
        for (int e = 0; e < K::kVector; ++e)
            f(Spot{first.i, e, first.row + (K::kAlong ? e : 0), first.c + (K::kAlong ? 0 : e)});
    }
    // The token of a position of the segment, or -1: past the end, or of an order that is none.
    LSM_DEVICE i64 token_at(int position) const {
        if (K::kFirst || position >= length || p.order == nullptr)
            return position < length ? begin + position : -1;
        i64 const token = load_global(p.order + begin + position);
        return token >= 0 && token < p.T ? token : -1;
    }
    // Of pieces' first elements.
    LSM_DEVICE void find(int t, Tokens& token) const {
        pieces([&](Spot first) { token[first.i] = token_at(t + first.row); });
    }
    // Whether there is such a token and such a channel.
    LSM_DEVICE bool exists(Tokens const& token, Spot at) const {
        bool const inside = !K::kAlong || token[at.i] + at.e < begin + length;
        return token[at.i] >= 0 && inside && at.c < count;
    }
    LSM_DEVICE bool is_piece(Rows const& r, Tokens const& token, Spot first) const {
        if constexpr (K::kAlong) {
            return r.time == 1 && first.c < count && token[first.i] + K::kVector <= begin + length;
        }
        return !K::kFirst && scratch.pieces && first.c + K::kVector <= count;
    }
    LSM_DEVICE T* place(Rows const& r, i64 token, int c) const {
        i64 const row = batch() * r.batch, channel = first + c;
        return static_cast<T*>(r.data) + row +
               (K::kFirst ? channel * r.head + token * r.time : token * r.time + channel);
    }
    // Between elements of a piece.
    LSM_DEVICE static i64 step(Rows const& r) {
        return K::kAlong ? r.time : K::kFirst ? r.head : 1;
    }
    LSM_DEVICE void load(Rows const& r, Tokens const& token, Elements& x) const {
        pieces([&](Spot first) {
            auto& piece = x[first.i];
            LSM_UNROLL
            for (int e = 0; e < K::kVector; ++e) piece.element[e] = static_cast<T>(0.f);
            if (token[first.i] < 0 || r.data == nullptr) return;
            T const* const from = place(r, token[first.i], first.c);
            if (is_piece(r, token, first)) {
                piece = load_global(reinterpret_cast<Piece<T, K::kVector> const*>(from));
                return;
            }
            elements(first, [&](Spot at) {
                if (!exists(token, at)) return;
                piece.element[at.e] = load_global(from + at.e * step(r));
            });
        });
    }
    // Brings what load() will read into the second-level cache: of every sector, the lane whose piece begins it.
    LSM_DEVICE void ask(Rows const& r, Tokens const& token) const {
        pieces([&](Spot first) {
            bool const is_line = !K::kFirst || r.time == 1;
            if (r.data == nullptr || !is_line || !exists(token, first)) return;
            T const* const from = place(r, token[first.i], first.c);
            constexpr int kAsks = K::kLayout == Layout::lines ? K::kVector : 1;  // of a piece
            constexpr int kBytes = static_cast<int>(sizeof(T)) * K::kVector / kAsks;
            LSM_UNROLL
            for (int e = 0; e < kAsks; ++e) {
                T const* const own = from + e * step(r);
                if (first.c + e < count && reinterpret_cast<std::uintptr_t>(own) % 32 < kBytes)
                    prefetch_l2(own);
            }
        });
    }
    // f(spot) to every element of a tensor.
    template <class F>
    LSM_DEVICE void store(Rows const& r, Tokens const& token, F const& f) const {
        pieces([&](Spot first) {
            Piece<T, K::kVector> x;
            elements(first, [&](Spot at) { x.element[at.e] = static_cast<T>(f(at)); });
            if (token[first.i] < 0) return;
            T* const to = place(r, token[first.i], first.c);
            if (is_piece(r, token, first)) {
                store_global(reinterpret_cast<Piece<T, K::kVector>*>(to), x);
                return;
            }
            elements(first, [&](Spot at) {
                if (exists(token, at)) store_global(to + at.e * step(r), x.element[at.e]);
            });
        });
    }
    // f(spot) to rows in shared memory; channels four at a time.
    template <class F>
    LSM_DEVICE static void share(typename K::Row& to, F const& f) {
        pieces([&](Spot first) {
            float x[4];
            static_assert(K::kVector == 4);
            elements(first, [&](Spot at) { x[at.e] = f(at); });
            if constexpr (K::kFirst) {
                elements(first, [&](Spot at) { to[at.row][at.c] = x[at.e]; });
            } else {
                *reinterpret_cast<float4*>(&to[first.row][first.c]) = {x[0], x[1], x[2], x[3]};
            }
        });
    }
    // An element of rows in shared memory; channels that lie side by side are read at once.
    LSM_DEVICE static float value(typename K::Row const& rows, Spot at) {
        if constexpr (K::kFirst) return rows[at.row][at.c];
        float4 const x = *reinterpret_cast<float4 const*>(&rows[at.row][at.c - at.e]);
        return at.e == 0 ? x.x : at.e == 1 ? x.y : at.e == 2 ? x.z : x.w;
    }
    LSM_DEVICE static float value(Elements const& x, Spot at) {
        return static_cast<float>(x[at.i].element[at.e]);
    }
    // A pair's place in the sums of rounds.
    LSM_DEVICE i64 sum_at(Tokens const& token, Spot at) const {
        i64 const channel = first + at.c;
        i64 const own = token[at.i] + (K::kAlong ? at.e : 0);
        return K::kFirst ? (batch() * p.D + channel) * p.T + own
                         : (batch() * p.T + own) * p.D + channel;
    }

    LSM_DEVICE void share_channels(typename K::Shared& shared) const {
        for (int c = threadIdx.x; c < K::kChannels; c += K::kThreads) {
            auto const load = [&](void const* data) {
                return data != nullptr && c < count
                           ? load_global(static_cast<float const*>(data) + first + c)
                           : 0.f;
            };
            shared.skip[c] = load(p.skip), shared.bias[c] = load(p.dt_bias);
        }
    }
    // Tokens past the end have dt = 0, which leaves states alone.
    LSM_DEVICE void share_steps(typename K::Shared& shared, Tokens const& token,
                                Elements const& dt) const {
        share(shared.dt, [&](Spot at) {
            float const x = value(dt, at) + shared.bias[at.c];
            float const step = p.softplus ? fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))) : x;
            return exists(token, at) ? step : 0.f;
        });
    }

    // B or C of a tile, in the order of memory: f(which of the thread's, row of the tile, state of the round).
    using Numbers = typename K::TokenNumber[K::kNumbers];
    template <class F>
    LSM_DEVICE static void numbers(Projection const& r, F const& f) {
        bool const states_first = r.state == 1;
        int const i = threadIdx.x, rows = states_first ? K::kThreads / K::kStates : 0;
        int const row = states_first ? i / K::kStates : i % K::kTile;
        int const s = states_first ? i % K::kStates : i / K::kTile;
        int const states = states_first ? 0 : K::kThreads / K::kTile;
        if (K::kAllNumbers < K::kThreads && i >= K::kAllNumbers) return;
        LSM_UNROLL
        for (int j = 0; j < K::kNumbers; ++j) f(j, row + j * rows, s + j * states);
    }
    LSM_DEVICE void load_numbers_of_tokens(Projection const& r, bool wanted, int t, int s0,
                                           Numbers& x) const {
        numbers(r, [&](int j, int row, int s) {
            i64 const token = wanted && s0 + s < p.S ? token_at(t + row) : -1;
            x[j] = zero(static_cast<typename K::TokenNumber*>(nullptr));
            if (token < 0) return;
            x[j] = load_global(static_cast<typename K::TokenNumber const*>(r.data) +
                               batch() * r.batch + token * r.time + group * r.head +
                               (s0 + s) * r.state);
        });
    }
    LSM_DEVICE static void share_numbers(Projection const& r, typename K::NumberRow (&to)[K::kTile],
                                         Numbers const& x) {
        numbers(r, [&](int j, int row, int s) { to[row][s] = static_cast<N>(x[j]); });
    }
    LSM_DEVICE static Complex zero(Complex*) { return {0.f, 0.f}; }
    template <class U>
    LSM_DEVICE static U zero(U*) {
        return static_cast<U>(0.f);
    }

    // One of the two is zero: a sum is no branch in the innermost loop.
    LSM_DEVICE N b(typename K::Shared const& shared, int token, int s) const {
        N const x = shared.b[token][column(s)];
        if constexpr (K::kChannelBC) return add(x, own_b[s]);
        return x;
    }
    LSM_DEVICE N c(typename K::Shared const& shared, int token, int s) const {
        N const x = shared.c[token][column(s)];
        if constexpr (K::kChannelBC) return add(x, own_c[s]);
        return x;
    }
    LSM_DEVICE N decay(float dt, int s) const { return power_of_two(scaled(a_log2[s], dt)); }
    // h after a token; y, the lane's share of what C reads.
    LSM_DEVICE float walk(typename K::Shared const& shared, int token, N (&h)[kMine]) const {
        float const dt = shared.dt[token][own], du = dt * shared.u[token][own];
        float y = 0.f;
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) {
            h[s] = multiply_add(decay(dt, s), h[s], scaled(b(shared, token, s), du));
            y += real_product(c(shared, token, s), h[s]);
        }
        return K::kReadFactor * y;
    }
    LSM_DEVICE static float over_states(float x) {
        LSM_UNROLL
        for (int d = 1; d < K::L; d *= 2) x += shuffle_xor(x, d);
        return x;
    }
    LSM_DEVICE static void fill(N (&x)[kMine], float value) {
        LSM_UNROLL
        for (int s = 0; s < kMine; ++s) x[s] = number<N>(value);
    }
    // NaN to every token of a tensor.
    LSM_DEVICE void poison_tokens(Rows const& rows) const {
        if (rows.data == nullptr) return;
        for (i64 i = threadIdx.x; i < i64(length) * count; i += K::kThreads)
            store_global(place(rows, begin + i / count, static_cast<int>(i % count)),
                         static_cast<T>(nan_value()));
    }
};

}  // namespace lsm::selective_kernel
