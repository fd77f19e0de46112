// What the tensor-core kernels of the delta engine share: how time is cut, scratch memory, tiles
// and fragments.
//
// A chunk has up to kC = 32 rows, one per micro-step (one per token unless n > 1), of whole tokens.
// With S the state before it, in the folded form (docs/math.md, section 12),
//
//     E = w (V + e X S)        O = c Y S + R E        S <- gamma S + Z^T E
//
// X: what erases, Y: queries, [rows, K]; w, e, c: one number per row; gamma: one per head or per
// key channel. Z [rows, K] and R [rows, rows] hold the chunk's triangular inverse. Rows past the
// end have w = e = c = 0 and zeros everywhere.
#pragma once

#include "kernels/delta/cuts.cuh"
#include "kernels/platform.cuh"
#include "kernels/tile/tile.cuh"
#include "params/delta.h"

namespace lsm::delta {

inline constexpr int kC = 32;  // rows of a chunk
inline constexpr int kV = 64;  // values of a tile of V
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kForget =
    -256.f;  // log2: a stronger gate leaves nothing either, and sums stay exact

// What a chunk's decay and sources are. whole: one decay for the state, or none. channels: by key
// channel; X and Y carry it. sources: that, and rows write k v^T beside what they erase (dplr), so
// that with W = V and two more tiles
//
//     E = e X S        O = c Y S + R E + R_v W        S <- gamma S + Z^T E + Z_v^T W.
enum class Form { whole, channels, sources };

// A [rows, kC] tile of bf16. Rows are 16 bytes longer than they need to be, so that eight of them
// fall into different banks.
struct Square {
    static constexpr int kRowBytes = kC * 2 + 16, kBytes = kC * kRowBytes;

    LSM_DEVICE static u32 offset(int row, int column) { return row * kRowBytes + column * 2; }
    // As in Tile.
    LSM_DEVICE static u32 rows_first(int row, int column, int lane) {
        return offset(row + (lane & 15), column + (lane >> 4) * 8);
    }
    LSM_DEVICE static u32 columns_first(int row, int column, int lane) {
        return offset(row + (lane & 7) + (lane >> 4) * 8, column + ((lane >> 3) & 1) * 8);
    }
};

// One number per row of a chunk, as prepare leaves them: E's w and e, O's c; and gamma, then the
// largest |T_ts|, t > s.
using Coefficients = float[4][kC];
enum Coefficient { kWrite, kErase, kRead, kKeep };

// Where |T| exceeds 1, keys repeat and beta > 1: the state turns over along a key instead of
// shrinking, and what rounds off its writes adds up. There E and Z get twice the bits.
LSM_DEVICE bool amplifies(Coefficients const& by) {
    return by[kKeep][1] > 1.f;
}

// Scratch, per chunk slot and value head. K is the bucket, V rounded up to whole tiles.
struct Scratch {
    float* coefficients;  // [4, kC]
    bf16* z;              // [kC, K]
    bf16* z_rest;         // [kC, K]: what rounding left out of z; written only if T amplifies
    bf16* r;              // [kC, kC]
    // Decay by key channel: X and Y with the decay since the chunk began, and gamma.
    bf16 *erase, *query;        // [kC, K]
    float* decay;               // [K]
    bf16 *z_values, *r_values;  // Z_v, R_v: as z and r
    bf16* solve_values;         // T A_v as high + low: as solve
    // Backward.
    bf16* solve;     // [2, kC, kC]: T diag(w) as high + low
    bf16* state;     // [V, K]: before the chunk
    bf16* dstate;    // [V, K]: gradient of the state after it
    bf16* residual;  // [kC, V]: V + e X S
    bf16* de;        // [kC, V]: gradient of E
};

struct DeltaWork {
    DeltaParams p;
    Segments segments;
    Cuts cuts;
    Scratch scratch;
    int tokens;           // per chunk
    int v_tiles;          // of kV values
    int tiles;            // of a chain's launch: v_tiles and, for transitions, of their columns
    bool transfer;        // chains leave what their piece makes of a state, and nothing else
    i64 slots_per_piece;  // dense only

    // Slots hold the chunks of the current window.
    LSM_DEVICE i64 first_slot(Segment const& segment, i64 record) const {
        i64 const from = segment.t0 - cuts.begin();
        if (segments.table != nullptr) return from / tokens + record;
        return (segment.batch * cuts.pieces + from / cuts.L) * slots_per_piece;
    }
    LSM_DEVICE int chunks(Segment const& segment) const {
        return static_cast<int>((segment.t1 - segment.t0 + tokens - 1) / tokens);
    }
    LSM_DEVICE i64 record_of(i64 unit) const { return cuts.record_of(segments, unit); }
    LSM_DEVICE int key_head(int head) const { return head / static_cast<int>(p.HV / p.H); }
};

// One chunk's place in the tensors.
struct Chunk {
    i64 batch, token, row;  // first token; first row of k, v, beta, ... in time
    int rows;
    i64 slot;  // of scratch: slot * HV + head
};

LSM_DEVICE Chunk chunk_at(DeltaWork const& work, Segment const& segment, i64 first_slot, int index,
                          int head) {
    i64 const token = segment.t0 + static_cast<i64>(index) * work.tokens;
    i64 const end = token + work.tokens < segment.t1 ? token + work.tokens : segment.t1;
    return {segment.batch, token, token * work.p.n, static_cast<int>((end - token) * work.p.n),
            (first_slot + index) * work.p.HV + head};
}

// The last record whose first slot is not past this one, of a packed call.
LSM_DEVICE i64 record_of_slot(DeltaWork const& work, i64 slot) {
    i64 low = 0, high = work.segments.count;
    while (high - low > 1) {
        i64 const middle = (low + high) / 2;
        Segment const segment = work.segments[middle];
        bool const past = segment.unused() || work.first_slot(segment, middle) > slot;
        (past ? high : low) = middle;
    }
    return work.cuts.holds(work.segments[low]) ? low : -1;
}

// For kernels with a block per (slot, head): the chunk in that slot. rows == 0: none.
LSM_DEVICE Chunk chunk_of_block(DeltaWork const& work, int& head, bool& poison) {
    head = static_cast<int>(blockIdx.x % work.p.HV);
    i64 const slot = blockIdx.x / work.p.HV;
    i64 const record = work.segments.table != nullptr ? record_of_slot(work, slot)
                                                      : work.record_of(slot / work.slots_per_piece);
    poison = false;
    if (record < 0) return {0, 0, 0, 0, 0};
    Segment const segment = work.segments[record];
    i64 const first = work.first_slot(segment, record);
    poison = segment.poison;
    if (segment.unused() || slot - first >= work.chunks(segment)) return {0, 0, 0, 0, 0};
    return chunk_at(work, segment, first, static_cast<int>(slot - first), head);
}

// ---- Copies ----

// Rows of a [B, T, H, D] tensor into a tile of kC rows: row i of the chunk is the row of token i /
// n, for its last micro-step only, as q and o have them; n = 1 for what has a row per micro-step.
// The rest becomes zeros.
template <int Columns, int Threads>
LSM_DEVICE void load_rows(Rows const& x, i64 batch, i64 time, int head, int rows, int n,
                          int column0, int columns, u32 destination) {
    constexpr int kPieces = Columns / 8;
    bf16 const* const base = static_cast<bf16 const*>(x.data) + batch * x.batch + time * x.time +
                             head * x.head + column0;
    LSM_UNROLL_BY(2)
    for (int i = threadIdx.x; i < kC * kPieces; i += Threads) {
        int const row = i / kPieces, column = i % kPieces * 8;
        bool const valid = row < rows && column < columns && (n == 1 || (row + 1) % n == 0);
        i64 const at = valid ? (n == 1 ? row : row / n) * x.time + column : 0;
        cp_async16(destination + Tile<Columns>::offset(row, column), base + at, valid);
    }
}

// A contiguous [rows, Columns] piece of scratch into a tile; rows are `pitch` elements apart.
template <int Rows_, int Columns, int Threads>
LSM_DEVICE void load_tile(bf16 const* from, i64 pitch, u32 destination) {
    constexpr int kPieces = Columns / 8;
    LSM_UNROLL_BY(2)
    for (int i = threadIdx.x; i < Rows_ * kPieces; i += Threads) {
        int const row = i / kPieces, column = i % kPieces * 8;
        cp_async16(destination + Tile<Columns>::offset(row, column), from + row * pitch + column,
                   true);
    }
}

template <int Threads>
LSM_DEVICE void load_square(bf16 const* from, u32 destination) {
    LSM_UNROLL_BY(2)
    for (int i = threadIdx.x; i < kC * kC / 8; i += Threads) {
        cp_async16(destination + Square::offset(i / (kC / 8), i % (kC / 8) * 8), from + 8 * i,
                   true);
    }
}

template <int Threads>
LSM_DEVICE void load_floats(float const* from, int count, u32 destination) {
    for (int i = threadIdx.x; i < count / 4; i += Threads)
        cp_async16(destination + 16 * i, from + 4 * i, true);
}

// ---- Fragments ----

// One number per row or column of an accumulator tile pair.
LSM_DEVICE float2 pair_at(float const* x, int i) {
    return *reinterpret_cast<float2 const*>(x + i);
}

LSM_DEVICE u32 scaled(u32 pair, float2 by) {
    float2 const x = unpack(pair);
    return pack_bf16(x.x * by.x, x.y * by.y);
}

// high + low = x to 16 bits.
LSM_DEVICE void split(float x, bf16& high, bf16& low) {
    high = bf16(x);
    low = bf16(x - static_cast<float>(high));
}

// Stores a warp's [16 values, kC tokens] of an output token by token; row(t) gives the address of
// value 0 of this warp in row t, or null.
template <class Row>
LSM_DEVICE void store_transposed(float const (&x)[kC / 8][4], int values, Row row) {
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int n = 0; n < kC / 8; ++n) {
        u32 const low = movmatrix(pack_bf16(x[n][0], x[n][1]));
        u32 const high = movmatrix(pack_bf16(x[n][2], x[n][3]));
        bf16* const to = row(8 * n + lane / 4);
        if (to == nullptr) continue;
        u32* const words = reinterpret_cast<u32*>(to) + lane % 4;
        if (values > 0) store_global(words, low);
        if (values > 8) store_global(words + 4, high);
    }
}

}  // namespace lsm::delta
