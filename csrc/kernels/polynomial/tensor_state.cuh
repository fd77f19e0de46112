// The state of polynomial attention on tensor cores (tensor.cuh): how features lie in registers, and what that is of the
// states in memory, by the table of pieces there.
#pragma once

#include "kernels/polynomial/tensor.h"
#include "kernels/recurrence/common.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm::polynomial {

// [tokens, 16 channels]: rows of two pieces of 16 bytes, which change places every four rows, for Tile's reasons.
struct ChannelTile {
    static constexpr int kRowBytes = 2 * kTensorChannels;

    LSM_DEVICE static u32 offset(int row, int piece) {
        return row * kRowBytes + (piece ^ (row / 4 % 2)) * 16;
    }
    // As Tile's.
    LSM_DEVICE static u32 rows_first(int row, int lane) {
        return offset(row + lane % 16, lane / 16);
    }
    LSM_DEVICE static u32 columns_first(int row, int lane) {
        return offset(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
};

// Where a feature is in a state, and by what that number becomes ours and ours that: 0 where there is none, or where another
// of ours is the same.
struct alignas(16) Entry {
    int feature;
    float from, to;
};

template <Pass pass>
struct TensorShared {
    static constexpr bool kToRows = pass == Pass::dk;
    static constexpr int kTokens = 32;  // per stage
    static constexpr int kPieces = 26;

    struct Stage {
        alignas(128) char value[kTokens * kColumns * 2];
        alignas(128) char read[kToRows ? kTokens * kColumns * 2 : 16];
        alignas(128) char writer[kTokens * ChannelTile::kRowBytes];
        alignas(128) char reader[pass == Pass::state ? 16 : kTokens * ChannelTile::kRowBytes];
        // Of each token: weight and factor of the writer, of the reader.
        alignas(16) float numbers[kTokens][4];
    };
    Stage stage[2];
    // Of even and odd stages, each warp's share. In every other pair of tokens the halves of the channels change places,
    // so that the rows of half a warp lie in different banks.
    alignas(16) float rows[kToRows ? 2 : 1][4][kToRows ? kTokens : 1][kTensorChannels];
    Entry entries[kPieces][8];
    Segment segment;

    LSM_DEVICE static int at(int token, int channel) { return channel ^ token / 2 % 2 * 8; }
};

// pass: dk stands for dq, which is the same of other operands.
template <Pass pass>
struct TensorState {
    using Storage = TensorShared<pass>;
    using Stage = typename Storage::Stage;
    static constexpr bool kToRows = Storage::kToRows;
    static constexpr bool kHasSums = pass != Pass::dv;  // z
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kTokens = Storage::kTokens;
    static constexpr int kPieces = Storage::kPieces, kQuadratic = 24;

    LSM_DEVICE static int factor_of(int piece) { return piece % 16; }
    LSM_DEVICE static int half_of(int piece) {
        return piece < kQuadratic ? (piece < 8 ? 0 : 1) : piece - kQuadratic;
    }

    PassParams const& p;
    Storage& shared;
    Segment const& segment;
    i64 const record;
    int const head, tile, steps;
    int const tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int const row = lane / 4, pair = lane % 4 * 2;  // of fragments
    bool const taylor = p.basis.constants != 0;
    bool const has_sums;
    float const scale = p.writer.scale * p.reader.scale;
    float const square = scale * scale * (taylor ? 1.f : 2.f);  // 2 c2 scale^2

    // [a step of 16 features] columns: [its piece] rows V, columns features; rows: [8 of V] rows features, columns V.
    float S[kPieces / 2][2][4];
    float constant[2][4];  // of S, columns V, the same in all rows: the sum of values
    // z: that of pairs, [16, 8 n + ..]; that of channels, the same in all rows; the sum of weights.
    float Z[2][4], linear[2][4], count;

    LSM_DEVICE TensorState(PassParams const& params, Storage& storage, i64 unit, int column_tile)
        : p(params),
          shared(storage),
          segment(storage.segment),
          record(unit / params.HV),
          head(static_cast<int>(unit % params.HV)),
          tile(column_tile),
          steps(static_cast<int>(storage.segment.t1 - storage.segment.t0)),
          has_sums(kHasSums &&
                   ((pass == Pass::o && params.divides) || (tile == 0 && threadIdx.x < 32))) {}

    LSM_DEVICE void fill_entries() {
        LSM_UNROLL_BY(1)
        for (int at = tid; at < kPieces * 8; at += kThreads) {
            int const piece = at / 8, constants = p.basis.constants;
            int const i = piece < kQuadratic ? factor_of(piece) : -1,
                      j = 8 * half_of(piece) + at % 8;
            int const low = (i < j ? i : j) + constants, high = (i < j ? j : i) + constants;
            float const weight =
                p.basis.weight(low, high) * p.writer.scale * (i < 0 ? 1.f : p.writer.scale);
            bool const exists = low >= 0 && high < p.basis.n;
            shared.entries[piece][at % 8] = {exists ? p.basis.feature(low, high) : 0,
                                             exists ? 1.f / weight : 0.f,
                                             exists && i <= j ? weight : 0.f};
        }
    }
    // visit(number, entry, column of V) for all of S; no more on their way at once than there are registers for.
    template <class Visit>
    LSM_DEVICE void for_state(Visit visit) {
        LSM_UNROLL
        for (int i = 0; i < kPieces * 4; ++i) {
            if (i > 0 && i % 32 == 0) __syncwarp();
            int const e = i % 4, n = i / 4 % 2, step = i / 8;
            int const piece = 2 * step + (kToRows ? e / 2 : n);
            int const j = kToRows ? row : pair + e % 2;
            int const v = 16 * warp + (kToRows ? 8 * n + pair + e % 2 : row + e / 2 * 8);
            visit(S[step][n][e], shared.entries[piece][j], v);
        }
        if constexpr (!kToRows) {
            LSM_UNROLL
            for (int i = 0; i < 8; ++i)
                visit(constant[i / 4][i % 4], one(i % 4 < 2 && row == 0),
                      16 * warp + i / 4 * 8 + pair + i % 2);
        }
    }
    // visit(number, entry) for all of z.
    template <class Visit>
    LSM_DEVICE void for_sums(Visit visit) {
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const e = i % 4, n = i / 4, below = pair + e % 2;
            Entry entry = n == e / 2 ? shared.entries[row + 8 * n][below]
                          : n == 1   ? shared.entries[16 + row][below]
                                     : shared.entries[16 + below][row];
            if (n < e / 2) entry.to = 0.f;
            visit(Z[n][e], entry);
            entry = shared.entries[kQuadratic + n][below];
            if (e >= 2 || row != 0) entry.to = 0.f;
            visit(linear[n][e], entry);
        }
        visit(count, one(lane == 0));
    }
    // Of the constant.
    LSM_DEVICE Entry one(bool to) const {
        return {0, taylor ? 1.f : 0.f, taylor && to ? 1.f : 0.f};
    }

    // Where a state's numbers of this head begin.
    LSM_DEVICE i64 first_of(StatePair const& state) const {
        return (state.owner(segment, record) * p.HV + head) * p.width;
    }

    LSM_DEVICE void start() {
        float const fill = segment.poison ? nan_value() : 0.f;
        LSM_UNROLL
        for (int i = 0; i < kPieces * 4; ++i) S[i / 8][i / 4 % 2][i % 4] = fill;
        LSM_UNROLL
        for (int i = 0; i < 8; ++i)
            constant[i / 4][i % 4] = Z[i / 4][i % 4] = linear[i / 4][i % 4] = fill;
        count = fill;
        if (segment.poison) return;
        if (p.start.S != nullptr) {
            float const* const from = p.start.S + first_of(p.start) * p.V + tile * kColumns;
            for_state([&](float& x, Entry const& entry, int v) {
                if (entry.from != 0.f && tile * kColumns + v < p.V)
                    x = entry.from * load_global(from + i64(entry.feature) * p.V + v);
            });
        }
        if (has_sums && p.start.z != nullptr) {
            float const* const from = p.start.z + first_of(p.start);
            for_sums([&](float& x, Entry const& entry) {
                if (entry.from != 0.f) x = entry.from * load_global(from + entry.feature);
            });
        }
    }

    LSM_DEVICE void end() {
        if (!p.ends_with(segment)) return;
        if (!kToRows && p.end.S != nullptr) {
            float* const to = p.end.S + first_of(p.end) * p.V + tile * kColumns;
            for_state([&](float x, Entry const& entry, int v) {
                if (entry.to != 0.f && tile * kColumns + v < p.V)
                    store_global(to + i64(entry.feature) * p.V + v, entry.to * x);
            });
            int const columns = p.V - tile * kColumns < kColumns ? p.V - tile * kColumns : kColumns;
            for (int i = tid; i < (p.width - p.basis.pairs) * columns; i += kThreads)
                keep(p.start.S, p.end.S,
                     i64(p.basis.pairs + i / columns) * p.V + tile * kColumns + i % columns, p.V);
        }
        if (p.end.z != nullptr && tile == 0 && warp == 0) {
            float* const to = p.end.z + first_of(p.end);
            for_sums([&](float x, Entry const& entry) {
                if (entry.to != 0.f) store_global(to + entry.feature, entry.to * x);
            });
            for (int f = p.basis.pairs + lane; f < p.width; f += 32) keep(p.start.z, p.end.z, f, 1);
        }
    }
    // What a state has of features that are none stays.
    LSM_DEVICE void keep(float const* from, float* to, i64 at, int columns) const {
        float x = segment.poison ? nan_value() : 0.f;
        if (from != nullptr && !segment.poison)
            x = load_global(from + first_of(p.start) * columns + at);
        store_global(to + first_of(p.end) * columns + at, x);
    }
};

}  // namespace lsm::polynomial
