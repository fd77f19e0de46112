// One decay per head, or none: the whole state is multiplied by one number per token, so nothing is scaled in shared
// memory. With E the cumulative log2 gate since a block began and the state kept as S_true = S 2^m,
//
//     out_i = 2^(E_i + m) S query_i + sum_{j<=i} 2^(E_i - E_j) (query_i . key_j) value_j
//     S    += 2^(-E_j - m) value_j key_j^T        m += E_last        while all |E_j + m| <= 64
//     S     = 2^(m + E_last) S + 2^(E_last - E_j) value_j key_j^T        m = 0        else
//
// Scores and outputs are scaled in fp32 and no factor of theirs exceeds what the gates themselves say, so any gate is
// exact; folding m into the state is rare.
//
// Tokens may have weights w, of what they write (value_j w_j), or where the walk is in reverse of what they read: they are
// one more fp32 factor of scores and of what goes into the state, or of outputs. No value is rounded for it.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

// A gate in log2, cut at what leaves nothing of any state: sums of cut gates keep their differences exact.
template <class Config>
LSM_DEVICE float Sweep<Config>::whole_gate_of(int t) const {
    if (p.gate.rows.data == nullptr) return 0.f;
    float const g = gate_at(row_offset(p.gate, t));
    return g < -256.f ? -256.f : g;  // a NaN stays
}

// Lane i: the gate of position i of a stage.
template <class Config>
LSM_DEVICE float Sweep<Config>::whole_gate(int stage) const {
    int const t = token(stage * kStageTokens + lane) + gate_lag();
    return inside(t) ? whole_gate_of(t) : 0.f;
}

// Sums over the lanes of each half warp, own lane included.
template <class Config>
LSM_DEVICE float Sweep<Config>::cumulative(float gate, int lane) {
    LSM_UNROLL
    for (int d = 1; d < kBlock; d *= 2) {
        float const before = __shfl_up_sync(0xffffffffu, gate, d);
        if (lane % kBlock >= d) gate += before;
    }
    return gate;
}

template <class Config>
LSM_DEVICE typename Sweep<Config>::BlockGates Sweep<Config>::block_gates(float cumulative,
                                                                         int b) const {
    auto const of = [&](int i) { return __shfl_sync(0xffffffffu, cumulative, b * kBlock + i); };
    int const i = lane / 4, j = lane % 4 * 2;
    BlockGates gates{of(lane % kBlock),
                     {of(i), of(i + 8)},
                     {of(j), of(j + 1), of(j + 8), of(j + 9)},
                     of(kBlock - 1),
                     false};
    float const reach = gates.token + exponent;  // a NaN compares false and goes on to the output
    gates.leaves = __any_sync(0xffffffffu, reach < -64.f || reach > 64.f);
    return gates;
}

// Masked scores may become inf: they are replaced, never multiplied, when they are packed.
template <class Config>
LSM_DEVICE void Sweep<Config>::decay_scores(BlockGates const& gates, float (&scores)[2][4]) const {
    LSM_UNROLL
    for (int n = 0; n < 2; ++n) {
        LSM_UNROLL
        for (int e = 0; e < 4; ++e) {
            float const between = gates.row[e / 2] - gates.column[2 * n + e % 2];
            scores[n][e] *= p.write_scale * exp2_approx(between);
        }
    }
}

// A number of a token, by its place in the stage; of the block's token 2 (lane % 4) + {0, 1, 8, 9}, i counting them.
template <class Config>
LSM_DEVICE float Sweep<Config>::number_of_token(Stage const& tiles, int number, int at) {
    return reinterpret_cast<float const*>(tiles.gate)[number * kStageTokens + at];
}
template <class Config>
LSM_DEVICE float Sweep<Config>::number_of(Stage const& tiles, int number, int b, int i) const {
    return number_of_token(tiles, number, b * kBlock + lane % 4 * 2 + i / 2 * 8 + i % 2);
}

// Outputs of tokens that read with weights.
template <class Config>
LSM_DEVICE void Sweep<Config>::weigh_output(Stage const& tiles, int b, Output& o) const {
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) {
        float const weight = number_of(tiles, kWeight, b, i);
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m)
            o[m][i / 2][i % 2] *= weight, o[m][i / 2][2 + i % 2] *= weight;
    }
}

// Element e of token tile n of what load_value brings: where an output's element e is.
LSM_DEVICE float value_element(u32 const (&value)[4], int n, int e) {
    float2 const pair = unpack(value[2 * n + e / 2]);
    return e % 2 == 0 ? pair.x : pair.y;
}

template <class Config>
LSM_DEVICE void Sweep<Config>::load_skip() {
    void const* const skip = p.skip.rows.data;
    LSM_UNROLL_BY(1)
    for (int row = tid; skip != nullptr && row < kRows; row += kThreads) {
        i64 const at = head * p.skip.rows.head + (p.skip_by_row ? row0 + row : 0);
        float x = 0.f;
        if (row0 + row < p.rows)
            x = p.skip_is_fp32
                    ? load_global(static_cast<float const*>(skip) + at)
                    : static_cast<float>(load_global(static_cast<bf16 const*>(skip) + at));
        s.factors[row] = x;
    }
}

// (out + skip value) silu(z), of which either may be absent.
template <class Config>
LSM_DEVICE void Sweep<Config>::finish(int stage, int b, Output& o) {
    Stage const& tiles = s.stage[stage % kStages];
    bool const skips = p.skip.rows.data != nullptr;
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        u32 value[4] = {};
        float upper = 0.f, lower = 0.f;
        if (skips) {
            load_value(tiles.value, b, m, value);
            upper = s.factors[state_row(m, 0)], lower = s.factors[state_row(m, 2)];
        }
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const n = i / 4, e = i % 4;
            o[m][n][e] =
                p.read_scale * o[m][n][e] + (e < 2 ? upper : lower) * value_element(value, n, e);
        }
    }
    if (p.probe.rows.data == nullptr) return;
    store_output(p.ungated, stage, b, o);
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        u32 z[4];
        load_value(tiles.probe, b, m, z);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            float const x = value_element(z, i / 4, i % 4);
            o[m][i / 4][i % 4] *= x / (1.f + exp2_approx(-kLog2e * x));
        }
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::scale_value(u32 (&value)[4], float const (&factor)[4]) {
    LSM_UNROLL
    for (int r = 0; r < 4; ++r) {
        float2 const x = unpack(value[r]);
        value[r] = pack_bf16(x.x * factor[r / 2 * 2], x.y * factor[r / 2 * 2 + 1]);
    }
}

// pairs[i][j] += probe_i . value_j over 16 of this warp's rows.
template <class Config>
LSM_DEVICE void Sweep<Config>::relate(Stage const& tiles, int b, int m,
                                      float (&pairs)[2][4]) const {
    int const column = warp * RowsPerWarp + 16 * m;
    u32 probe[4], value[4];
    ldmatrix_x4(probe, smem_u32(tiles.probe) + RowTile::rows_first(b * kBlock, column, lane));
    ldmatrix_x4(value, smem_u32(tiles.value) + RowTile::columns_first(b * kBlock, column, lane));
    mma(pairs[0], probe, value[0], value[1]);
    mma(pairs[1], probe, value[2], value[3]);
}

template <class Config>
LSM_DEVICE void Sweep<Config>::store_part(int stage, int b, int i, int number, float x) const {
    constexpr int kNumbers = kKind == SweepKind::query_gradient || kWeighted ? 2 : 1;
    int const t = token(stage * kStageTokens + b * kBlock + i);
    float* const to = static_cast<float*>(p.strict.rows.data);
    if (inside(t))
        store_global(to + kNumbers * (row_offset(p.strict, t) + part()) + number, p.read_scale * x);
}

// probe . out of every token, over a row tile.
template <class Config>
LSM_DEVICE void Sweep<Config>::add_dots(u32 const (&probe)[4], float const (&out)[2][4],
                                        float (&dots)[4]) {
    LSM_UNROLL
    for (int i = 0; i < 8; ++i) {
        int const n = i / 4, e = i % 4;
        dots[2 * n + e % 2] += value_element(probe, n, e) * out[n][e];
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::store_dots(int stage, int b, int number, float (&dots)[4]) const {
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) {
        LSM_UNROLL
        for (int d = 4; d < 32; d *= 2) dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], d);
        if (lane < 4) store_part(stage, b, i / 2 * 8 + lane * 2 + i % 2, number, dots[i]);
    }
}

// For every token t: the sum over j < t <= i of scores_ij probe_i . value_j, over this warp's rows. The sum over j is a
// product with a triangle of ones, the pairs being its right operand as they are.
template <class Config>
LSM_DEVICE void Sweep<Config>::store_crossing_pairs(int stage, int b,
                                                    float const (&scores)[2][4]) const {
    Stage const& tiles = s.stage[stage % kStages];
    int const row = lane / 4, column = lane % 4 * 2;
    float pairs[2][4] = {};
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) relate(tiles, b, m, pairs);
    LSM_UNROLL
    for (int i = 0; i < 8; ++i) pairs[i / 4][i % 4] *= scores[i / 4][i % 4];
    u32 ones[4], packed[2][2];
    LSM_UNROLL
    for (int r = 0; r < 4; ++r) {
        int const t = row + r % 2 * 8, j = column + r / 2 * 8;
        ones[r] = pack_bf16(j < t ? 1.f : 0.f, j + 1 < t ? 1.f : 0.f);
    }
    pack_scores(pairs, packed, [](int i, int j) { return j < i; });
    float crossing[2] = {0.f, 0.f};
    LSM_UNROLL
    for (int n = 0; n < 2; ++n) {  // columns: i
        float sums[4] = {};
        mma(sums, ones, packed[n][0], packed[n][1]);
        LSM_UNROLL
        for (int e = 0; e < 4; ++e) {
            int const t = row + e / 2 * 8, i = 8 * n + column + e % 2;
            if (i >= t) crossing[e / 2] += sums[e];
        }
    }
    LSM_UNROLL
    for (int h = 0; h < 2; ++h) {
        crossing[h] += __shfl_xor_sync(0xffffffffu, crossing[h], 1);
        crossing[h] += __shfl_xor_sync(0xffffffffu, crossing[h], 2);
        if (lane % 4 == 0) store_part(stage, b, row + 8 * h, 1, crossing[h]);
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::whole_block(int stage, int b, float cumulative) {
    Stage const& tiles = s.stage[stage % kStages];
    BlockGates const gates = block_gates(cumulative, b);
    // Weights are of what tokens write, or of what they read; beside sums the others are of what readers take.
    constexpr bool kReads = kWeighted && kKind == SweepKind::key_gradient;
    bool const reverse = kReads || (kKind != SweepKind::query_gradient && p.reverse);
    bool const writes = kNormalised || (kWeighted && !kReads && !(kFinished && p.reverse));
    int const writer = kNormalised && reverse ? kReader : kWeight,
              reader = kWeight + kReader - writer;
    if constexpr (kKind == SweepKind::query_gradient) save_whole_end(stage, b, gates.total);
    if constexpr (kKind == SweepKind::key_gradient) {
        float const first = __shfl_sync(0xffffffffu, cumulative, b * kBlock);
        visit_anchors(stage, b, [&](uint4 const* saved, float const* sums, float* flux, i64 owner) {
            contract_whole(saved, sums, flux, owner, exponent + first);
        });
    }
    if constexpr (!StateOnly) {
        float scores[2][4] = {}, read[4], read_n[4] = {};
        bool const related = kSumsOnRows || (kSumsOnContraction && !reverse);
        if constexpr (kNormalised) {
            if (related) relate_sums(tiles, b, scores, read_n);
        }
        if (!related) relate_tokens(tiles, b, scores);
        decay_scores(gates, scores);
        if (writes) {
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) {
                float const weight = number_of(tiles, writer, b, i);
                scores[i / 2][i % 2] *= weight, scores[i / 2][2 + i % 2] *= weight;
            }
        }
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) read[i] = exp2_approx(gates.column[i] + exponent);
        if constexpr (kNormalised) {
            Readers const readers = kSumsOnContraction && !reverse
                                        ? divide(stage, b, gates, scores, read_n)
                                        : readers_of(tiles, b, reader);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= readers.row[i % 4 / 2];
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) read[i] *= readers.column[i];
        }
        u32 packed[2][2];
        pack_scores(scores, packed, [](int i, int j) { return j <= i; });
        if constexpr (kKind == SweepKind::query_gradient) store_crossing_pairs(stage, b, scores);
        Output o = {};
        read_state(tiles, b, o);
        float dots[4] = {}, all[4] = {};
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            u32 value[4], probe[4];
            load_value(tiles.value, b, m, value);
            if constexpr (kSumsOnRows) read_sums(tiles, b, m, o[m]);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) o[m][i / 4][i % 4] *= read[i / 4 * 2 + i % 2];
            if constexpr (kStrict) {
                load_value(tiles.probe, b, m, probe);
                add_dots(probe, o[m], dots);
            }
            read_values(value, packed, o[m]);
            if constexpr (kReads) add_dots(probe, o[m], all);
        }
        if constexpr (kReads) {
            LSM_UNROLL
            for (int i = 0; i < 4 && !kNormalised; ++i) dots[i] *= number_of(tiles, kWeight, b, i);
            store_dots(stage, b, 1, all);
        }
        if constexpr (kStrict) store_dots(stage, b, 0, dots);
        if (kWeighted && !writes) weigh_output(tiles, b, o);
        if constexpr (kFinished) finish(stage, b, o);
        store_output(p.out, stage, b, o);
    }
    float const end = gates.leaves ? gates.total : -exponent;
    if (gates.leaves) scale_state(exponent + gates.total);
    float write[4];
    LSM_UNROLL
    for (int i = 0; i < 4; ++i) {
        write[i] = p.write_scale * exp2_approx(end - gates.column[i]);
        if (writes) write[i] *= number_of(tiles, writer, b, i);
    }
    bool const sums = kSumsOnRows || (kSumsOnContraction && walks_sums());
    if constexpr (kNormalised) {
        if (sums) write_sums(tiles, b, write);
    }
    if (!sums) write_state(tiles, b, [&](int, u32(&value)[4]) { scale_value(value, write); });
    exponent = gates.leaves ? 0.f : exponent + gates.total;
    if constexpr (StateOnly) gate_total += gates.total;
}

}  // namespace lsm
