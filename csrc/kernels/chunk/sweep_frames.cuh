// Decay by channels, in frames. Per gated channel c the state is kept as S_true = S 2^a_c, and inside a frame query and key
// (or value and output) are scaled by 2^e and 2^-e, e = a_c + the cumulative log2 gate; nothing else changes. |e| <= 80
// always: when a channel would leave that range the state is rescaled and the frame reopens at +80, and a block of 16
// tokens whose own gates span more than 160 is walked token by token, every exponent 0.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

// log2 gates of channels c and c + 1 (c even) at a row of a stage, as loaded.
template <class Config>
LSM_DEVICE float2 Sweep<Config>::gate_pair(int stage, int row, int c) const {
    char const* const gate = s.stage[stage % kStages].gate;
    int const i = row * kGated + c;
    float2 const g = p.gate_is_fp32 ? *reinterpret_cast<float2 const*>(gate + i * 4)
                                    : unpack(*reinterpret_cast<u32 const*>(gate + i * 2));
    return {g.x * kLog2e, g.y * kLog2e};
}

// Cumulative gates of each 16-token block and their range. A work item is (channel pair, block).
template <class Config>
LSM_DEVICE void Sweep<Config>::accumulate_gates(int stage) {
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
        }
        pair_of(s.frames.low[b], c) = low;
        pair_of(s.frames.high[b], c) = high;
        pair_of(s.frames.sum[b], c) = sum;
    }
}

// The exponent a block starts from and the one it leaves, per channel.
template <class Config>
LSM_DEVICE float Sweep<Config>::opened(Mode mode, float frame, float high) {
    return mode == kKeep ? frame : mode == kReopen ? kRange - high : 0.f;
}

template <class Config>
LSM_DEVICE float Sweep<Config>::frame_before(int stage, int b, Mode mode0, int c) const {
    float const frame = s.frames.frame[stage % 2][c];
    return b == 0 ? frame
                  : closed(mode0, opened(mode0, frame, s.frames.high[0][c]), s.frames.sum[0][c]);
}

// Every warp takes the same decision from the same numbers. A NaN gate compares false and goes on to the output.
template <class Config>
LSM_DEVICE typename Sweep<Config>::Mode Sweep<Config>::choose_mode(int stage, int b,
                                                                   Mode mode0) const {
    bool leaves = false, wide = false;
    LSM_UNROLL_BY(2)
    for (int c = lane; c < kGated; c += 32) {
        float const frame = frame_before(stage, b, mode0, c);
        wide |= s.frames.high[b][c] - s.frames.low[b][c] > 2 * kRange;
        leaves |= frame + s.frames.low[b][c] < -kRange || frame + s.frames.high[b][c] > kRange;
    }
    if (__any_sync(0xffffffffu, wide)) return kTokenwise;
    return __any_sync(0xffffffffu, leaves) ? kReopen : kKeep;
}

template <class Config>
LSM_DEVICE void Sweep<Config>::scale_pair(char* at, float low, float high) {
    u32& pair = *reinterpret_cast<u32*>(at);
    float2 const x = unpack(pair);
    pair = pack_bf16(x.x * low, x.y * high);
}

// Turns cumulative gates into exponents e and scales the operands by them; notes where the state must follow, and
// what brings outputs with decay on their rows out of the frame.
template <class Config>
LSM_DEVICE void Sweep<Config>::apply_gates(int stage, Mode mode0, Mode mode1) {
    Stage& tiles = s.stage[stage % kStages];
    LSM_UNROLL_BY(1)
    for (int item = tid; item < kGated; item += kThreads) {
        int const c = item % (kGated / 2) * 2, b = item / (kGated / 2);
        Mode const mode = b == 0 ? mode0 : mode1;
        float2 const frame = {frame_before(stage, b, mode0, c),
                              frame_before(stage, b, mode0, c + 1)};
        float2 const start = {opened(mode, frame.x, s.frames.high[b][c]),
                              opened(mode, frame.y, s.frames.high[b][c + 1])};
        pair_of(s.frames.shift[b], c) = {frame.x - start.x, frame.y - start.y};
        float2 e = start;
        LSM_UNROLL_BY(4)
        for (int i = 0; i < kBlock; ++i) {
            int const row = b * kBlock + i;
            if (mode == kTokenwise) {
                if constexpr (kOnRows) pair_of(factor_row(row), c) = {p.read_scale, p.read_scale};
                continue;
            }
            float2 const gate = gate_pair(stage, row, c);
            e.x += gate.x, e.y += gate.y;
            float2 const up = {p.read_scale * exp2_approx(e.x), p.read_scale * exp2_approx(e.y)};
            float2 const down = {p.write_scale * exp2_approx(-e.x),
                                 p.write_scale * exp2_approx(-e.y)};
            if constexpr (kOnRows) {
                pair_of(factor_row(row), c) = up;
                scale_pair(tiles.value + RowTile::offset(row, c), down.x, down.y);
            } else {
                u32 const at = WideTile::offset(row, c);
                scale_pair(tiles.key + at, down.x, down.y);
                if constexpr (!StateOnly) scale_pair(tiles.query + at, up.x, up.y);
            }
        }
        if (b == 1) {
            float2 const sum = pair_of(s.frames.sum[1], c);
            pair_of(s.frames.frame[(stage + 1) % 2], c) = {closed(mode, start.x, sum.x),
                                                           closed(mode, start.y, sum.y)};
            if constexpr (StateOnly) {
                s.frames.total[c] += s.frames.sum[0][c] + sum.x;
                s.frames.total[c + 1] += s.frames.sum[0][c + 1] + sum.y;
            }
        }
    }
}

// For a block walked token by token: zeros in all its rows but `i`, in the two tiles through which a token acts;
// the state follows by that token's own gate.
template <class Config>
template <int Columns>
LSM_DEVICE void Sweep<Config>::isolate(Operand const& x, char* tile, int column0, int columns,
                                       float scale, int first_row, int stage, int i) {
    LSM_UNROLL_BY(1)
    for (int item = tid; item < kBlock * Columns / 2; item += kThreads) {
        int const row = item / (Columns / 2), c = item % (Columns / 2) * 2;
        int const t = token(stage * kStageTokens + first_row + row);
        u32 pair = 0;
        if (row == i && exists(x, t) && c < columns) {
            bf16 const* const at =
                static_cast<bf16 const*>(x.rows.data) + row_offset(x, t) + column0 + c;
            float2 const raw = unpack(load_global(reinterpret_cast<u32 const*>(at)));
            pair = pack_bf16(raw.x * scale, raw.y * scale);
        }
        *reinterpret_cast<u32*>(tile + Tile<Columns>::offset(first_row + row, c)) = pair;
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::isolate_token(int stage, int b, int i) {
    Stage& tiles = s.stage[stage % kStages];
    int const row = b * kBlock;
    LSM_UNROLL_BY(1)
    for (int c = 2 * tid; c < kGated; c += 2 * kThreads)
        pair_of(s.frames.shift[b], c) = gate_pair(stage, row + i, c);
    if constexpr (!StateOnly) {
        float const scale = kOnRows ? 1.f : p.read_scale;
        isolate<Contraction>(p.query, tiles.query, 0, p.contraction, scale, row, stage, i);
    }
    if constexpr (kOnRows) {
        isolate<kRows>(p.value, tiles.value, row0, p.rows - row0, p.write_scale, row, stage, i);
    } else {
        isolate<Contraction>(p.key, tiles.key, 0, p.contraction, p.write_scale, row, stage, i);
    }
}

}  // namespace lsm
