// Sums that outputs are divided by: a vector n beside the state, written to and decayed as a column of S whose values are
// 1. In o's sweep and those of states it lies along the contraction, and every warp that has a use for it walks it, in
// sixteen-channel pieces: a product of a fragment with eight columns, of which only that of the fragment's own piece is
// not zero, is one piece per column. dq's and dk's sweeps have it on their rows, each warp its own; the products are those
// of one more channel of the contraction, which is 1 in v and `below` in dO.
//
// It lives in shared memory that no two warps share.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

// visit(value, channel) for what this lane has of n.
template <class Config>
template <class Visit>
LSM_DEVICE void Sweep<Config>::for_sums(Visit visit) {
    if constexpr (kSumsOnRows) {
        int const row = warp * RowsPerWarp + lane;
        if (lane < RowsPerWarp) visit(s.sums[row], row0 + row);
    } else {
        LSM_UNROLL
        for (int h = 0; h < kSumTiles; ++h) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e)
                visit(s.sums[((warp * kSumTiles + h) * 32 + lane) * 4 + e],
                      128 * h + 16 * (lane % 4 * 2 + e % 2) + lane / 4 + e / 2 * 8);
        }
    }
}

// Of an owner: a sequence, or a record.
template <class Config>
LSM_DEVICE void Sweep<Config>::start_sums(i64 owner) {
    int const size = kSumsOnRows ? p.rows : p.contraction;
    i64 const at = (owner * p.heads + head) * size;
    bool const given = p.sums_start != nullptr && !segment.poison;
    for_sums([&](float& value, int channel) {
        value = segment.poison            ? nan_value()
                : given && channel < size ? load_global(p.sums_start + at + channel)
                                          : 0.f;
    });
}

template <class Config>
LSM_DEVICE void Sweep<Config>::end_sums(i64 owner) {
    if (p.sums_end == nullptr || (kSumsOnContraction && (row0 != 0 || warp != 0))) return;
    int const size = kSumsOnRows ? p.rows : p.contraction;
    i64 const at = (owner * p.heads + head) * size;
    for_sums([&](float value, int channel) {
        if (channel < size) store_global(p.sums_end + at + channel, value);
    });
}

// By the square of a factor, like the state.
template <class Config>
LSM_DEVICE void Sweep<Config>::scale_sums(float factor) {
    if constexpr (kSumsOnRows) __syncwarp();
    for_sums([&](float& value, int) { value = value * factor * factor; });
    if constexpr (kSumsOnRows) __syncwarp();
}

template <class Config>
LSM_DEVICE void Sweep<Config>::save_sums(float* sums, i64 owner, float by) {
    float const factor = exp2_approx(by);
    i64 const at = (owner * p.heads + head) * p.rows;
    for_sums([&](float value, int row) {
        if (row < p.rows) store_global(sums + at + row, value * factor);
    });
}

// This lane's share of n . dn, of saved sums; owner counts heads too.
template <class Config>
LSM_DEVICE float Sweep<Config>::contract_sums(float const* sums, i64 owner) {
    float sum = 0.f;
    for_sums([&](float value, int row) {
        if (row < p.rows) sum = value * load_global(sums + owner * p.rows + row);
    });
    return sum;
}

// Whether this warp keeps n up to date: where it divides by it, or leaves it.
template <class Config>
LSM_DEVICE bool Sweep<Config>::walks_sums() const {
    return StateOnly ? row0 == 0 && warp == 0 : !p.reverse;
}

// Scores with what sums add to them, the product of `below` with 1; or, where outputs are divided, q . n in pieces: of
// token lane / 4 elements 0 and 1, of the one eight later 2 and 3.
template <class Config>
LSM_DEVICE void Sweep<Config>::relate_sums(Stage const& tiles, int b, float (&scores)[2][4],
                                           float (&read)[4]) {
    if constexpr (kSumsOnRows) {
        relate_tokens(tiles, b, scores);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const n = i / 4, e = i % 4, row = lane / 4 + e / 2 * 8;
            scores[n][e] += kKind == SweepKind::query_gradient
                                ? number_of_token(tiles, kBelow, b * kBlock + row)
                                : number_of(tiles, kBelow, b, 2 * n + e % 2);
        }
    } else {
        u32 sums[kSumTiles][2];
        LSM_UNROLL
        for (int h = 0; h < kSumTiles; ++h) {
            float4 const n =
                reinterpret_cast<float4 const*>(s.sums)[(warp * kSumTiles + h) * 32 + lane];
            sums[h][0] = movmatrix(pack_bf16(n.x, n.y));
            sums[h][1] = movmatrix(pack_bf16(n.z, n.w));
        }
        relate_tokens(tiles, b, scores, [&](int kk, u32 const(&query)[4]) {
            bool const own = lane / 4 == kk % 8;
            auto const piece = [&](int i) { return kk < 8 ? sums[0][i] : sums[kSumTiles - 1][i]; };
            mma(read, query, own ? piece(0) : 0u, own ? piece(1) : 0u);
        });
    }
}

// out += n below, of one row tile.
template <class Config>
LSM_DEVICE void Sweep<Config>::read_sums(Stage const& tiles, int b, int m,
                                         float (&out)[2][4]) const {
    float const upper = s.sums[state_row(m, 0)], lower = s.sums[state_row(m, 2)];
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) {
        float const below =
            kKind == SweepKind::query_gradient ? number_of(tiles, kBelow, b, i) : 1.f;
        out[i / 2][i % 2] += upper * below, out[i / 2][2 + i % 2] += lower * below;
    }
}

template <class Config>
LSM_DEVICE typename Sweep<Config>::Readers Sweep<Config>::readers_of(Stage const& tiles, int b,
                                                                     int number) const {
    Readers readers;
    LSM_UNROLL
    for (int h = 0; h < 2; ++h)
        readers.row[h] = number_of_token(tiles, number, b * kBlock + lane / 4 + 8 * h);
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) readers.column[i] = number_of(tiles, number, b, i);
    return readers;
}

// Of o: from what is read of n and the decayed, weighted scores.
template <class Config>
LSM_DEVICE typename Sweep<Config>::Readers Sweep<Config>::divide(int stage, int b,
                                                                 BlockGates const& gates,
                                                                 float const (&scores)[2][4],
                                                                 float const (&read)[4]) const {
    Stage const& tiles = s.stage[stage % kStages];
    bool const divides = p.size.rows.data != nullptr;
    Readers readers;
    LSM_UNROLL
    for (int h = 0; h < 2; ++h) {
        int const i = lane / 4 + 8 * h, t = token(stage * kStageTokens + b * kBlock + i);
        float size = exp2_approx(gates.row[h] + exponent) * (read[2 * h] + read[2 * h + 1]);
        LSM_UNROLL
        for (int e = 0; e < 4; ++e) {
            int const j = 8 * (e / 2) + lane % 4 * 2 + e % 2;
            if (j <= i) size += scores[e / 2][2 * h + e % 2];
        }
        size += __shfl_xor_sync(0xffffffffu, size, 1);
        size += __shfl_xor_sync(0xffffffffu, size, 2);
        size *= p.read_scale;
        if (divides && row0 == 0 && warp == 0 && lane % 4 == 0 && inside(t))
            store_global(static_cast<float*>(p.size.rows.data) + row_offset(p.size, t), size);
        float const least = number_of_token(tiles, kReader, b * kBlock + i);
        readers.row[h] = divides ? 1.f / (fmaxf(fabsf(size), least) + p.eps) : 1.f;
    }
    LSM_UNROLL
    for (int i = 0; i < 4; ++i)
        readers.column[i] =
            __shfl_sync(0xffffffffu, readers.row[i / 2], (lane % 4 * 2 + i % 2) * 4);
    return readers;
}

// What the block's tokens write, to n too. On rows all eight columns of the product are n.
template <class Config>
LSM_DEVICE void Sweep<Config>::write_sums(Stage const& tiles, int b, float const (&write)[4]) {
    float ones[4];
    LSM_UNROLL
    for (int i = 0; i < 4; ++i)
        ones[i] =
            kKind == SweepKind::query_gradient || !p.reverse ? 1.f : number_of(tiles, kBelow, b, i);
    if constexpr (kSumsOnRows) {
        u32 const early = pack_bf16(ones[0], ones[1]), late = pack_bf16(ones[2], ones[3]);
        write_state(tiles, b, [&](int m, u32(&value)[4]) {
            scale_value(value, write);
            float& upper = s.sums[state_row(m, 0)];
            float& lower = s.sums[state_row(m, 2)];
            float n[4] = {upper, upper, lower, lower};
            mma(n, value, early, late);
            __syncwarp();
            if (lane % 4 == 0) upper = n[0], lower = n[2];
        });
        __syncwarp();
    } else {
        float4* const at = reinterpret_cast<float4*>(s.sums) + warp * kSumTiles * 32 + lane;
        float n[kSumTiles][4];
        LSM_UNROLL
        for (int h = 0; h < kSumTiles; ++h) {
            float4 const before = at[h * 32];
            n[h][0] = before.x, n[h][1] = before.y, n[h][2] = before.z, n[h][3] = before.w;
        }
        u32 const early = pack_bf16(write[0] * ones[0], write[1] * ones[1]),
                  late = pack_bf16(write[2] * ones[2], write[3] * ones[3]);
        write_state(
            tiles, b, [&](int, u32(&value)[4]) { scale_value(value, write); },
            [&](int kk, u32 const(&key)[4]) {  // channels are rows of this product
                u32 const turned[4] = {key[0], key[2], key[1], key[3]};
                bool const own = lane / 4 == kk % 8;
                mma(n[kk / 8], turned, own ? early : 0u, own ? late : 0u);
            });
        LSM_UNROLL
        for (int h = 0; h < kSumTiles; ++h) at[h * 32] = float4{n[h][0], n[h][1], n[h][2], n[h][3]};
    }
}

}  // namespace lsm
