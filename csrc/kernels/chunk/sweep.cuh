// The chunk engine's one kernel. With a state S [rows x contraction] and tokens in processing order,
//
//     out_i = sum_{j<=i} d_ij (query_i . key_j) value_j + d_i S query_i,      S += value key^T,
//
// it is the forward (query, key, value = q, k, v) and, with the arguments permuted, each gradient:
//
//     o   forward   q,  k,  v     decay on the contraction      dv  reverse   k,  q,  dO    decay on the contraction
//     dq  forward   dO, v,  k     decay on the rows             dk  reverse   v,  dO, q     decay on the rows
//
// A block owns kRows rows of the state of one value head and walks one segment of time. Each warp keeps its rows of
// the state in accumulators (fp32); their layout is that of an A operand, so the state reaches the tensor cores
// without touching shared memory. Tokens go by blocks of 16; warps share nothing but the tiles they read.
//
// Vector decay by frames (docs/kernels/chunk.md): per gated channel c an exponent a_c with S_true = S 2^a_c. Inside
// it, query and key (or value and output) are scaled by 2^e and 2^-e, e = a_c + cumulative log2 gate, and nothing
// else changes. |e| <= 80 always: when a channel would leave that range the state is rescaled and the frame reopens
// at +80; a 16-token block whose own gates span more than 160 is walked token by token.
#pragma once

#include "kernels/chunk/chunks.cuh"
#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm {

enum class DecaySide { contraction, rows };

template <int Contraction, int RowsPerWarp, DecaySide Side, bool StateOnly>
struct Sweep {
    static constexpr bool kOnRows = Side == DecaySide::rows;
    static constexpr bool kStateOnly = StateOnly;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kRows = kWarps * RowsPerWarp;
    static constexpr int kBlock = 16, kStageTokens = 32, kStages = 2;
    static constexpr int kStagesPerChunk = kChunk / kStageTokens, kBlocksPerChunk = kChunk / kBlock;
    static constexpr int kGated = kOnRows ? kRows : Contraction;
    static constexpr int kRowTiles = RowsPerWarp / 16, kColumnTiles = Contraction / 8;
    static constexpr int kExponentPitch = kGated + 4;  // floats; keeps the epilogue's column reads off one bank
    static constexpr int kStripPitch = RowsPerWarp * 2 + 16;
    static constexpr float kLog2e = 1.4426950408889634f;
    static constexpr int kBlocksPerMultiprocessor = Contraction <= 128 ? 2 : 1;
    static constexpr float kRange = 80.f;  // exponents in log2: a product of two scaled operands stays finite
    static constexpr bool kStrict = kOnRows && !StateOnly;

    using WideTile = Tile<Contraction>;
    using RowTile = Tile<kRows>;

    struct Stage {
        alignas(128) char query[StateOnly ? 16 : kStageTokens * Contraction * 2];
        alignas(128) char key[kStageTokens * Contraction * 2];
        alignas(128) char value[kStageTokens * kRows * 2];
        alignas(128) char gate[kStageTokens * kGated * 4];  // as loaded: fp32, or 16-bit in the first half
    };
    struct SharedStorage {
        Stage stage[kStages];
        alignas(16) float exponents[kStageTokens * kExponentPitch];  // cumulative gate; on the rows, then 2^e
        float low[2][kGated], high[2][kGated];  // range of the cumulative gate in each block
        float sum[2][kGated];                   // its last value
        float shift[2][kGated];                 // log2 factor of the state where a block reopens its frame
        float frame[2][kGated];                 // a_c before even and odd stages
        float total[StateOnly ? kGated : 4];
        Segment segment;
        i64 record;
        alignas(16) char strip[StateOnly ? 16 : kWarps * kBlock * kStripPitch];
    };

    enum Mode { kKeep, kReopen, kTokenwise };

    SweepParams const& p;
    SharedStorage& s;
    Segment const& segment;  // in shared memory: a dozen registers less in the loop
    int const t0, t1;        // its tokens
    int const head, row0;  // value head, first row of the tile
    int const tid, lane, warp;
    int const origin, sign;  // token of position i is origin + sign * i
    int const stages;
    float S[kRowTiles][kColumnTiles][4];

    LSM_DEVICE Sweep(SweepParams const& params, SharedStorage& storage, int value_head, int tile)
        : p(params),
          s(storage),
          segment(storage.segment),
          t0(static_cast<int>(storage.segment.t0)),
          t1(static_cast<int>(storage.segment.t1)),
          head(value_head),
          row0(tile * kRows),
          tid(threadIdx.x),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          origin(params.reverse ? t0 + round_up(t1 - t0) - 1 : t0),
          sign(params.reverse ? -1 : 1),
          stages(round_up(t1 - t0) / kStageTokens) {}

    // The grid of 16-token blocks is laid from the segment's first token in both directions, so that a reverse sweep
    // passes the same chunk boundaries as the forward one; positions past the end read zeros.
    LSM_DEVICE static int round_up(int n) { return (n + kStageTokens - 1) / kStageTokens * kStageTokens; }

    LSM_DEVICE int token(int position) const { return origin + sign * position; }
    LSM_DEVICE bool inside(int t) const { return t >= t0 && t < t1; }

    // --- loading ---------------------------------------------------------------------------------------------------

    LSM_DEVICE i64 row_offset(Operand const& x, int t) const {
        return segment.batch * x.rows.batch + t * x.rows.time + head / x.heads_per_group * x.rows.head;
    }

    // One [kStageTokens x Columns] tile; rows outside the segment and columns past `columns` become zeros.
    template <int Columns, class Address>
    LSM_DEVICE void load_tile(Operand const& x, int column0, int columns, int stage, u32 destination, int element_bytes,
                              int lag, Address address) const {
        int const per_piece = 16 / element_bytes, pieces = Columns / per_piece;
        char const* const base = static_cast<char const*>(x.rows.data);
        LSM_UNROLL_BY(2)
        for (int i = tid; i < kStageTokens * pieces; i += kThreads) {
            int const row = i / pieces, column = i % pieces * per_piece;
            int const t = token(stage * kStageTokens + row) + lag;
            bool const valid = inside(t) && column < columns;
            i64 const offset = valid ? row_offset(x, t) + column0 + column : 0;
            cp_async16(destination + address(row, column), base + offset * element_bytes, valid);
        }
    }

    LSM_DEVICE void load_stage(int stage) const {
        Stage& to = s.stage[stage % kStages];
        auto const wide = [](int row, int column) { return WideTile::offset(row, column); };
        auto const tall = [](int row, int column) { return RowTile::offset(row, column); };
        int const rows = p.rows - row0;
        if constexpr (!StateOnly) {
            load_tile<Contraction>(p.query, 0, p.contraction, stage, smem_u32(to.query), 2, 0, wide);
        }
        load_tile<Contraction>(p.key, 0, p.contraction, stage, smem_u32(to.key), 2, 0, wide);
        load_tile<kRows>(p.value, row0, rows, stage, smem_u32(to.value), 2, 0, tall);
        int const gate0 = kOnRows ? row0 : 0, gates = kOnRows ? rows : p.contraction;
        int const bytes = p.gate_is_fp32 ? 4 : 2;
        load_tile<kGated>(p.gate, gate0, gates, stage, smem_u32(to.gate), bytes, p.reverse ? 1 : 0,
                          [&](int row, int column) { return u32(row * kGated + column) * bytes; });
    }

    // --- gates -----------------------------------------------------------------------------------------------------

    // log2 gates of channels c and c + 1 (c even) at a row of a stage, as loaded.
    LSM_DEVICE float2 gate_pair(int stage, int row, int c) const {
        char const* const gate = s.stage[stage % kStages].gate;
        int const i = row * kGated + c;
        float2 const g = p.gate_is_fp32 ? *reinterpret_cast<float2 const*>(gate + i * 4)
                                        : unpack(*reinterpret_cast<u32 const*>(gate + i * 2));
        return {g.x * kLog2e, g.y * kLog2e};
    }

    LSM_DEVICE float2& pair_of(float* row, int c) const { return *reinterpret_cast<float2*>(row + c); }
    LSM_DEVICE float* exponent_row(int row) const { return s.exponents + row * kExponentPitch; }

    // Cumulative gates of each 16-token block and their range. A work item is (channel pair, block).
    LSM_DEVICE void accumulate_gates(int stage) {
        LSM_UNROLL_BY(1)
        for (int item = tid; item < kGated; item += kThreads) {
            int const c = item % (kGated / 2) * 2, b = item / (kGated / 2);
            float2 sum = {0.f, 0.f}, low = {0.f, 0.f}, high = {0.f, 0.f};
            LSM_UNROLL_BY(4)
            for (int i = 0; i < kBlock; ++i) {
                float2 const g = gate_pair(stage, b * kBlock + i, c);
                sum.x += g.x, sum.y += g.y;
                low.x = fminf(low.x, sum.x), low.y = fminf(low.y, sum.y);
                high.x = fmaxf(high.x, sum.x), high.y = fmaxf(high.y, sum.y);
                pair_of(exponent_row(b * kBlock + i), c) = sum;
            }
            pair_of(s.low[b], c) = low;
            pair_of(s.high[b], c) = high;
            pair_of(s.sum[b], c) = sum;
        }
    }

    // The exponent a block starts from and the one it leaves, per channel.
    LSM_DEVICE static float opened(Mode mode, float frame, float high) {
        return mode == kKeep ? frame : mode == kReopen ? kRange - high : 0.f;
    }
    LSM_DEVICE static float closed(Mode mode, float start, float sum) { return mode == kTokenwise ? 0.f : start + sum; }

    LSM_DEVICE float frame_before(int stage, int b, Mode mode0, int c) const {
        float const frame = s.frame[stage % 2][c];
        return b == 0 ? frame : closed(mode0, opened(mode0, frame, s.high[0][c]), s.sum[0][c]);
    }

    // Every warp takes the same decision from the same numbers. A NaN gate compares false and goes on to the output.
    LSM_DEVICE Mode choose_mode(int stage, int b, Mode mode0) const {
        bool leaves = false, wide = false;
        LSM_UNROLL_BY(2)
        for (int c = lane; c < kGated; c += 32) {
            float const frame = frame_before(stage, b, mode0, c);
            wide |= s.high[b][c] - s.low[b][c] > 2 * kRange;
            leaves |= frame + s.low[b][c] < -kRange || frame + s.high[b][c] > kRange;
        }
        if (__any_sync(0xffffffffu, wide)) return kTokenwise;
        return __any_sync(0xffffffffu, leaves) ? kReopen : kKeep;
    }

    LSM_DEVICE static void scale_pair(char* at, float low, float high) {
        u32& pair = *reinterpret_cast<u32*>(at);
        float2 const x = unpack(pair);
        pair = pack_bf16(x.x * low, x.y * high);
    }

    // Turns cumulative gates into exponents e and scales the operands by them; notes where the state must follow, and
    // what brings outputs with decay on their rows out of the frame.
    LSM_DEVICE void apply_gates(int stage, Mode mode0, Mode mode1) {
        Stage& tiles = s.stage[stage % kStages];
        LSM_UNROLL_BY(1)
        for (int item = tid; item < kGated; item += kThreads) {
            int const c = item % (kGated / 2) * 2, b = item / (kGated / 2);
            Mode const mode = b == 0 ? mode0 : mode1;
            float2 const frame = {frame_before(stage, b, mode0, c), frame_before(stage, b, mode0, c + 1)};
            float2 const start = {opened(mode, frame.x, s.high[b][c]), opened(mode, frame.y, s.high[b][c + 1])};
            pair_of(s.shift[b], c) = {frame.x - start.x, frame.y - start.y};
            LSM_UNROLL_BY(4)
            for (int i = 0; i < kBlock; ++i) {
                int const row = b * kBlock + i;
                float2& exponent = pair_of(exponent_row(row), c);
                if (mode == kTokenwise) {
                    exponent = {p.out_scale, p.out_scale};
                    continue;
                }
                float2 const e = {start.x + exponent.x, start.y + exponent.y};
                float2 const down = {exp2_approx(-e.x), exp2_approx(-e.y)};
                if constexpr (kOnRows) {
                    exponent = {p.out_scale * exp2_approx(e.x), p.out_scale * exp2_approx(e.y)};
                    scale_pair(tiles.value + RowTile::offset(row, c), p.value_scale * down.x, p.value_scale * down.y);
                } else {
                    u32 const at = WideTile::offset(row, c);
                    scale_pair(tiles.key + at, p.key_scale * down.x, p.key_scale * down.y);
                    if constexpr (!StateOnly) {
                        scale_pair(tiles.query + at, p.query_scale * exp2_approx(e.x), p.query_scale * exp2_approx(e.y));
                    }
                }
            }
            if (b == 1) {
                float2 const sum = pair_of(s.sum[1], c);
                pair_of(s.frame[(stage + 1) % 2], c) = {closed(mode, start.x, sum.x), closed(mode, start.y, sum.y)};
                if constexpr (StateOnly) {
                    s.total[c] += s.sum[0][c] + sum.x;
                    s.total[c + 1] += s.sum[0][c + 1] + sum.y;
                }
            }
        }
    }

    // For a block walked token by token: zeros in all its rows but `i`, in the two tiles through which a token acts;
    // the state follows by that token's own gate.
    template <int Columns>
    LSM_DEVICE void isolate(Operand const& x, char* tile, int column0, int columns, float scale, int first_row, int stage,
                            int i) {
        LSM_UNROLL_BY(1)
        for (int item = tid; item < kBlock * Columns / 2; item += kThreads) {
            int const row = item / (Columns / 2), c = item % (Columns / 2) * 2;
            int const t = token(stage * kStageTokens + first_row + row);
            u32 pair = 0;
            if (row == i && inside(t) && c < columns) {
                bf16 const* const at = static_cast<bf16 const*>(x.rows.data) + row_offset(x, t) + column0 + c;
                float2 const raw = unpack(load_global(reinterpret_cast<u32 const*>(at)));
                pair = pack_bf16(raw.x * scale, raw.y * scale);
            }
            *reinterpret_cast<u32*>(tile + Tile<Columns>::offset(first_row + row, c)) = pair;
        }
    }

    LSM_DEVICE void isolate_token(int stage, int b, int i) {
        Stage& tiles = s.stage[stage % kStages];
        int const row = b * kBlock;
        LSM_UNROLL_BY(1)
        for (int c = 2 * tid; c < kGated; c += 2 * kThreads) pair_of(s.shift[b], c) = gate_pair(stage, row + i, c);
        if constexpr (!StateOnly) {
            isolate<Contraction>(p.query, tiles.query, 0, p.contraction, p.query_scale, row, stage, i);
        }
        if constexpr (kOnRows) {
            isolate<kRows>(p.value, tiles.value, row0, p.rows - row0, p.value_scale, row, stage, i);
        } else {
            isolate<Contraction>(p.key, tiles.key, 0, p.contraction, p.key_scale, row, stage, i);
        }
    }

    // --- the state -------------------------------------------------------------------------------------------------

    // Accumulator element e of tile (m, n) is row state_row(m, e), contraction channel 8 n + 2 (lane % 4) + e % 2.
    LSM_DEVICE int state_row(int m, int e) const { return warp * RowsPerWarp + 16 * m + lane / 4 + e / 2 * 8; }
    LSM_DEVICE int state_column(int n) const { return 8 * n + lane % 4 * 2; }

    // S *= 2^exponent[channel], channel being of the gated side. By halves: reopening a frame takes up to 2^-160, less
    // than fp32 holds, to a state that large.
    LSM_DEVICE void scale_state(float const* exponent) {
        if constexpr (kOnRows) {
            LSM_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                float const upper = exp2_approx(0.5f * exponent[state_row(m, 0)]);
                float const lower = exp2_approx(0.5f * exponent[state_row(m, 2)]);
                LSM_UNROLL
                for (int n = 0; n < kColumnTiles; ++n) {
                    LSM_UNROLL
                    for (int e = 0; e < 4; ++e) S[m][n][e] = S[m][n][e] * (e < 2 ? upper : lower) * (e < 2 ? upper : lower);
                }
            }
        } else {
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; ++n) {
                float2 const e = *reinterpret_cast<float2 const*>(exponent + state_column(n));
                float const even = exp2_approx(0.5f * e.x), odd = exp2_approx(0.5f * e.y);
                LSM_UNROLL
                for (int m = 0; m < kRowTiles; ++m) {
                    LSM_UNROLL
                    for (int i = 0; i < 4; ++i) S[m][n][i] = S[m][n][i] * (i % 2 == 0 ? even : odd) * (i % 2 == 0 ? even : odd);
                }
            }
        }
    }

    // visit(value, offset) for every element of the state that exists, offset into a [K, V] matrix.
    template <class Visit>
    LSM_DEVICE void for_state(StateView const& view, Visit visit) {
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; ++n) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e) {
                    int const row = row0 + state_row(m, e), c = state_column(n) + e % 2;
                    if (row < p.rows && c < p.contraction) visit(S[m][n][e], c * view.contraction + row * view.row);
                }
            }
        }
    }

    LSM_DEVICE i64 state_offset(i64 owner) const {
        return (owner * p.heads + head) * static_cast<i64>(p.rows) * p.contraction;
    }

    LSM_DEVICE void start_state() {
        float const fill = segment.poison ? __int_as_float(0x7fc00000) : 0.f;
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; ++n) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e) S[m][n][e] = fill;
            }
        }
        i64 const owner = p.start_per_record ? s.record : segment.sequence;
        if (p.start.data != nullptr && !segment.poison) {
            float const* const from = p.start.data + state_offset(owner);
            for_state(p.start, [&](float& value, int offset) { value = load_global(from + offset); });
        }
        LSM_UNROLL_BY(1)
        for (int c = tid; c < kGated; c += kThreads) {
            s.frame[0][c] = 0.f;
            if constexpr (StateOnly) s.total[c] = 0.f;
        }
    }

    // The decay still owed when a reverse sweep leaves its first token (log2).
    LSM_DEVICE float trailing_gate(int c) const {
        int const channel = (kOnRows ? row0 : 0) + c;
        if (!p.reverse || t0 == t1 || channel >= (kOnRows ? p.rows : p.contraction)) return 0.f;
        i64 const at = row_offset(p.gate, t0) + channel;
        float const g = p.gate_is_fp32 ? load_global(static_cast<float const*>(p.gate.rows.data) + at)
                                       : static_cast<float>(load_global(static_cast<bf16 const*>(p.gate.rows.data) + at));
        return g * kLog2e;
    }

    LSM_DEVICE void end_state() {
        bool const owns = StateOnly || (segment.sequence >= 0 && (p.reverse ? segment.index == 0 : segment.is_last));
        if (p.end.data == nullptr || !owns) return;
        LSM_UNROLL_BY(1)
        for (int c = tid; c < kGated; c += kThreads) s.shift[0][c] = s.frame[stages % 2][c] + trailing_gate(c);
        __syncthreads();
        scale_state(s.shift[0]);
        float* const to = p.end.data + state_offset(StateOnly ? s.record : segment.sequence);
        for_state(p.end, [&](float value, int offset) { store_global(to + offset, value); });
        if constexpr (StateOnly) {
            float* const sums = p.gate_sum + (s.record * p.heads + head) * p.contraction;
            LSM_UNROLL_BY(1)
            for (int c = tid; row0 == 0 && c < p.contraction; c += kThreads) {
                store_global(sums + c, s.total[c] + trailing_gate(c));
            }
        }
    }

    // --- one block of 16 tokens ------------------------------------------------------------------------------------

    using Output = float[kRowTiles][2][4];  // out^T: row tile, token tile; token 8 n + 2 (lane % 4) + e % 2

    // ldmatrix addresses along a row of a wide tile: four exclusive-ors, the rest immediates.
    struct WideAddress {
        u32 row, swizzle;
        LSM_DEVICE u32 operator()(int kk) const { return row + ((kk % 4 * 32) ^ swizzle) + kk / 4 * 128; }
    };
    LSM_DEVICE WideAddress rows_first(char const* tile, int b) const {
        return {smem_u32(tile) + (b * kBlock + (lane & 15)) * WideTile::kRowBytes, u32((lane >> 4) ^ (lane & 7)) * 16};
    }
    LSM_DEVICE WideAddress columns_first(char const* tile, int b) const {
        return {smem_u32(tile) + (b * kBlock + (lane & 7) + (lane >> 4) * 8) * WideTile::kRowBytes,
                u32(((lane >> 3) & 1) ^ (lane & 7)) * 16};
    }

    // scores = query key^T, and out += S query with the state as it was before the block.
    LSM_DEVICE void read_state(Stage const& tiles, int b, float (&scores)[2][4], Output& o) {
        WideAddress const query_a = rows_first(tiles.query, b), query_b = columns_first(tiles.query, b);
        WideAddress const key_b = columns_first(tiles.key, b);
        LSM_UNROLL
        for (int kk = 0; kk < Contraction / 16; ++kk) {
            u32 qa[4], qb[4], kb[4];
            ldmatrix_x4(qa, query_a(kk));
            ldmatrix_x4(kb, key_b(kk));
            mma(scores[0], qa, kb[0], kb[1]);
            mma(scores[1], qa, kb[2], kb[3]);
            ldmatrix_x4(qb, query_b(kk));
            LSM_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                float const(&left)[4] = S[m][2 * kk];
                float const(&right)[4] = S[m][2 * kk + 1];
                u32 const state[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                                      pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
                mma(o[m][0], state, qb[0], qb[1]);
                mma(o[m][1], state, qb[2], qb[3]);
            }
        }
    }

    // Scores as B operand of value^T scores^T, kept where keep(i, j). Select, never multiply: what is dropped may be inf.
    template <class Keep>
    LSM_DEVICE void pack_scores(float const (&scores)[2][4], u32 (&packed)[2][2], Keep keep) const {
        int const i = lane / 4, j = lane % 4 * 2;
        LSM_UNROLL
        for (int half_ = 0; half_ < 2; ++half_) {  // tokens i and i + 8
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                int const token_i = i + 8 * half_, token_j = j + 8 * n;
                packed[half_][n] = pack_bf16(keep(token_i, token_j) ? scores[n][2 * half_] : 0.f,
                                             keep(token_i, token_j + 1) ? scores[n][2 * half_ + 1] : 0.f);
            }
        }
    }

    // The diagonal alone: token tile n meets only token tile n.
    LSM_DEVICE void pack_diagonal(float const (&scores)[2][4], u32 (&packed)[2]) const {
        int const i = lane / 4, j = lane % 4 * 2;
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            packed[n] = pack_bf16(i == j ? scores[n][2 * n] : 0.f, i == j + 1 ? scores[n][2 * n + 1] : 0.f);
        }
    }

    // out += value scores for one row tile.
    LSM_DEVICE static void read_values(u32 const (&value)[4], u32 const (&packed)[2][2], float (&out)[2][4]) {
        mma(out[0], value, packed[0][0], packed[0][1]);
        mma(out[1], value, packed[1][0], packed[1][1]);
    }

    LSM_DEVICE void load_value(Stage const& tiles, int b, int m, u32 (&value)[4]) const {
        int const column = warp * RowsPerWarp + 16 * m;
        ldmatrix_x4_trans(value, smem_u32(tiles.value) + RowTile::columns_first(b * kBlock, column, lane));
    }

    // S += value key^T
    LSM_DEVICE void write_state(Stage const& tiles, int b) {
        u32 value[kRowTiles][4];
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) load_value(tiles, b, m, value[m]);
        WideAddress const key = rows_first(tiles.key, b);
        LSM_UNROLL
        for (int kk = 0; kk < Contraction / 16; ++kk) {
            u32 k[4];
            ldmatrix_x4_trans(k, key(kk));
            LSM_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                mma(S[m][2 * kk], value[m], k[0], k[1]);
                mma(S[m][2 * kk + 1], value[m], k[2], k[3]);
            }
        }
    }

    // out += what the block's tokens read, from the state and from each other; then the state takes them in. Where the
    // output without a token's own term is wanted, that is stored on the way (of token `only`, or of all).
    LSM_DEVICE void block(int stage, int b, int only, Output& o) {
        Stage const& tiles = s.stage[stage % kStages];
        if constexpr (!StateOnly) {
            float scores[2][4] = {};
            read_state(tiles, b, scores, o);
            u32 packed[2][2], own[2];
            pack_scores(scores, packed, [](int i, int j) { return kStrict ? j < i : j <= i; });
            if constexpr (kStrict) pack_diagonal(scores, own);
            LSM_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                u32 value[4];
                load_value(tiles, b, m, value);
                if constexpr (kStrict) {
                    float local[2][4] = {};
                    read_values(value, packed, local);
                    store_strict(stage, b, m, only, o[m], local);
                    u32 const diagonal[2][2] = {{own[0], 0}, {0, own[1]}};
                    read_values(value, diagonal, local);
                    LSM_UNROLL
                    for (int i = 0; i < 8; ++i) o[m][i / 4][i % 4] += local[i / 4][i % 4];
                } else {
                    read_values(value, packed, o[m]);
                }
            }
        }
        write_state(tiles, b);
    }

    // --- output ----------------------------------------------------------------------------------------------------

    // For rows with decay, in the frame: what brings element e of token tile n out of it.
    LSM_DEVICE float factor(int b, int m, int n, int e) const {
        return exponent_row(b * kBlock + 8 * n + lane % 4 * 2 + e % 2)[state_row(m, e)];
    }

    LSM_DEVICE void store_strict(int stage, int b, int m, int only, float const (&o)[2][4], float const (&local)[2][4]) const {
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            LSM_UNROLL
            for (int odd = 0; odd < 2; ++odd) {
                int const i = 8 * n + lane % 4 * 2 + odd, t = token(stage * kStageTokens + b * kBlock + i);
                if (!inside(t) || (only >= 0 && i != only)) continue;
                i64 const at = row_offset(p.strict, t) + row0;
                LSM_UNROLL
                for (int e = odd; e < 4; e += 2) {
                    int const row = state_row(m, e);
                    if (row0 + row < p.rows) store_strict_element(at + row, o[n][e], local[n][e], factor(b, m, n, e));
                }
            }
        }
    }

    LSM_DEVICE void store_strict_element(i64 at, float o, float local, float f) const {
        void* const data = p.strict.rows.data;
        if (p.strict_is_split) {
            store_global(static_cast<u32*>(data) + at, pack_bf16(o * f, local * f));
        } else if (p.gate_is_fp32) {
            store_global(static_cast<float*>(data) + at, (o + local) * f);
        } else {
            store_global(static_cast<bf16*>(data) + at, bf16((o + local) * f));
        }
    }

    // Through a strip of shared memory private to the warp, so that global memory sees whole 16-byte pieces of rows.
    LSM_DEVICE void store_output(int stage, int b, Output const& o) {
        char* const strip = s.strip + warp * kBlock * kStripPitch;
        __syncwarp();
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                LSM_UNROLL
                for (int e = 0; e < 4; ++e) {
                    int const row = 8 * n + lane % 4 * 2 + e % 2, column = 16 * m + lane / 4 + e / 2 * 8;
                    float const f = kOnRows ? factor(b, m, n, e) : 1.f;
                    reinterpret_cast<bf16*>(strip + row * kStripPitch)[column] = bf16(o[m][n][e] * f);
                }
            }
        }
        __syncwarp();
        constexpr int pieces = RowsPerWarp / 8;
        LSM_UNROLL
        for (int i = lane; i < kBlock * pieces; i += 32) {
            int const row = i / pieces, column = warp * RowsPerWarp + i % pieces * 8;
            int const t = token(stage * kStageTokens + b * kBlock + row);
            if (!inside(t) || row0 + column >= p.rows) continue;
            bf16* const to = static_cast<bf16*>(p.out.rows.data) + row_offset(p.out, t) + row0 + column;
            store_global(reinterpret_cast<uint4*>(to),
                         *reinterpret_cast<uint4 const*>(strip + row * kStripPitch + i % pieces * 16));
        }
    }

    // --- anchors of the gate's gradient ----------------------------------------------------------------------------

    LSM_DEVICE i64 chunk_index(int chunk) const {
        return first_chunk(segment, s.record, p.tokens_per_row) + chunk;
    }
    LSM_DEVICE uint4* chunk_state(int chunk) const {
        i64 const tile = (chunk_index(chunk) * p.heads + head) * ((p.rows + kRows - 1) / kRows) + row0 / kRows;
        return reinterpret_cast<uint4*>(p.chunk_states) + ((tile * kWarps + warp) * kRowTiles * kColumnTiles / 2) * 32 + lane;
    }

    LSM_DEVICE void save_chunk_state(int stage) const {
        uint4* const to = chunk_state(stage / kStagesPerChunk);
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            float const upper = exp2_approx(s.frame[(stage + 1) % 2][state_row(m, 0)]);
            float const lower = exp2_approx(s.frame[(stage + 1) % 2][state_row(m, 2)]);
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; n += 2) {
                float const(&a)[4] = S[m][n];
                float const(&b)[4] = S[m][n + 1];
                store_global(to + (m * kColumnTiles + n) / 2 * 32,
                             uint4{pack_bf16(a[0] * upper, a[1] * upper), pack_bf16(a[2] * lower, a[3] * lower),
                                   pack_bf16(b[0] * upper, b[1] * upper), pack_bf16(b[2] * lower, b[3] * lower)});
            }
        }
    }

    // flux_c = sum_v S_cv dS_cv at a chunk's end: everything written before it and read after it.
    LSM_DEVICE void contract_chunk_state(int stage, Mode mode) const {
        int const chunk = (stages - stage - 1) / kStagesPerChunk;
        uint4 const* const from = chunk_state(chunk);
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            float upper = 0.f, lower = 0.f;
            LSM_UNROLL
            for (int n = 0; n < kColumnTiles; n += 2) {
                uint4 const saved = load_global(from + (m * kColumnTiles + n) / 2 * 32);
                u32 const words[4] = {saved.x, saved.y, saved.z, saved.w};
                LSM_UNROLL
                for (int w = 0; w < 4; ++w) {
                    float2 const x = unpack(words[w]);
                    float const(&y)[4] = S[m][n + w / 2];
                    (w % 2 == 0 ? upper : lower) += x.x * y[w % 2 * 2] + x.y * y[w % 2 * 2 + 1];
                }
            }
            LSM_UNROLL
            for (int h = 0; h < 2; ++h) {
                float flux = h == 0 ? upper : lower;
                flux += __shfl_xor_sync(0xffffffffu, flux, 1);
                flux += __shfl_xor_sync(0xffffffffu, flux, 2);
                int const row = state_row(m, 2 * h);
                if (lane % 4 == 0 && row0 + row < p.rows) {
                    float2 const gate = gate_pair(stage, 0, row & ~1);
                    float const decay = mode == kTokenwise ? exp2_approx(row % 2 == 0 ? gate.x : gate.y) : exponent_row(0)[row];
                    store_global(p.chunk_flux + (chunk_index(chunk) * p.heads + head) * p.rows + row0 + row,
                                 flux * decay);
                }
            }
        }
    }

    // --- the walk --------------------------------------------------------------------------------------------------

    LSM_DEVICE void walk_block(int stage, int b, Mode mode) {
        Output o = {};
        if (mode != kKeep) scale_state(s.shift[b]);
        if constexpr (kStrict) {
            if (p.chunk_flux != nullptr) note_anchors(stage, b, mode);
        }
        bool const whole = mode != kTokenwise;
        LSM_UNROLL_BY(1)
        for (int i = 0; i < (whole ? 1 : kBlock); ++i) {
            if (!whole) {
                __syncthreads();
                isolate_token(stage, b, i);
                __syncthreads();
                scale_state(s.shift[b]);
            }
            block(stage, b, whole ? -1 : i, o);
        }
        if constexpr (!StateOnly) store_output(stage, b, o);
    }

    // dk's sweep, before a block: its mode, and the flux through the end of a chunk.
    LSM_DEVICE void note_anchors(int stage, int b, Mode mode) const {
        int const stages_left = stages - stage;  // counted from the segment's first token
        if (b == 0 && (stage == 0 || stages_left % kStagesPerChunk == 0)) contract_chunk_state(stage, mode);
        if (tid == 0) {
            int const block = (stages_left - 1) * 2 + 1 - b;  // of the segment, in the order of time
            i64 const at = (chunk_index(0) * kBlocksPerChunk + block) * p.heads + head;
            store_global(p.tokenwise + at * ((p.rows + kRows - 1) / kRows) + row0 / kRows, static_cast<uint8_t>(mode == kTokenwise));
        }
    }

    LSM_DEVICE void run() {
        if (stages > 0) load_stage(0);
        cp_async_commit();
        start_state();
        LSM_UNROLL_BY(1)
        for (int stage = 0; stage < stages; ++stage) {
            cp_async_wait<0>();
            __syncthreads();  // the stage has landed, and everybody is done with the other buffer
            if (stage + 1 < stages) load_stage(stage + 1);
            cp_async_commit();
            accumulate_gates(stage);
            __syncthreads();
            Mode const mode0 = choose_mode(stage, 0, kKeep), mode1 = choose_mode(stage, 1, mode0);
            apply_gates(stage, mode0, mode1);
            __syncthreads();
            walk_block(stage, 0, mode0);
            walk_block(stage, 1, mode1);
            if constexpr (kStrict) {
                bool const at_chunk_end = stage + 1 == stages || (stage + 1) % kStagesPerChunk == 0;
                if (at_chunk_end && p.chunk_states != nullptr && p.chunk_flux == nullptr) save_chunk_state(stage);
            }
        }
        __syncthreads();
        end_state();
    }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor) sweep(SweepParams const p, Segments const segments, int tiles) {
    i64 const block = blockIdx.x;
    int const tile = static_cast<int>(block % tiles), head = static_cast<int>(block / tiles % p.heads);
    i64 const record = block / tiles / p.heads;
    Segment const segment = segments[record];
    if (segment.unused()) return;
    if (S::kStateOnly && (p.reverse ? segment.index == 0 : segment.is_last)) return;  // nothing starts from it
    auto& shared = *reinterpret_cast<typename S::SharedStorage*>(dyn_smem());
    if (threadIdx.x == 0) {
        shared.segment = segment;
        shared.record = record;
    }
    __syncthreads();
    S(p, shared, head, tile).run();
}

template <class S>
void run_sweep(SweepParams const& p, Segments const& segments, void* stream) {
    int const tiles = (p.rows + S::kRows - 1) / S::kRows;
    i64 const blocks = segments.count * p.heads * tiles;
    if (blocks == 0) return;
    launch(sweep<S>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads), sizeof(typename S::SharedStorage), stream, p, segments, tiles);
}

}  // namespace lsm
