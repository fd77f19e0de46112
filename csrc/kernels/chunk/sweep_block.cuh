// Sixteen tokens on tensor cores: scores, what the state holds for them, what they tell each other, and their writing.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

// scores = query key^T; what else is made of query is made of its fragments.
template <class Config>
template <class Query>
LSM_DEVICE void Sweep<Config>::relate_tokens(Stage const& tiles, int b, float (&scores)[2][4],
                                             Query query_too) const {
    WideAddress const query = rows_first(tiles.query, b), key = columns_first(tiles.key, b);
    LSM_UNROLL_BY(8)
    for (int kk = 0; kk < Contraction / 16; ++kk) {
        u32 qa[4], kb[4];
        ldmatrix_x4(qa, query(kk));
        ldmatrix_x4(kb, key(kk));
        mma(scores[0], qa, kb[0], kb[1]);
        mma(scores[1], qa, kb[2], kb[3]);
        query_too(kk, qa);
    }
}

// out += S query with the state as it was before the block.
template <class Config>
LSM_DEVICE void Sweep<Config>::read_state(Stage const& tiles, int b, Output& o) const {
    WideAddress const query = columns_first(tiles.query, b);
    LSM_UNROLL
    for (int kk = 0; kk < Contraction / 16; ++kk) {
        u32 qb[4];
        ldmatrix_x4(qb, query(kk));
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
template <class Config>
template <class Keep>
LSM_DEVICE void Sweep<Config>::pack_scores(float const (&scores)[2][4], u32 (&packed)[2][2],
                                           Keep keep) const {
    int const i = lane / 4, j = lane % 4 * 2;
    LSM_UNROLL
    for (int half_ = 0; half_ < 2; ++half_) {  // tokens i and i + 8
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            int const token_i = i + 8 * half_, token_j = j + 8 * n;
            packed[half_][n] =
                pack_bf16(keep(token_i, token_j) ? scores[n][2 * half_] : 0.f,
                          keep(token_i, token_j + 1) ? scores[n][2 * half_ + 1] : 0.f);
        }
    }
}

// The diagonal alone: token tile n meets only token tile n.
template <class Config>
LSM_DEVICE void Sweep<Config>::pack_diagonal(float const (&scores)[2][4], u32 (&packed)[2]) const {
    int const i = lane / 4, j = lane % 4 * 2;
    LSM_UNROLL
    for (int n = 0; n < 2; ++n) {
        packed[n] =
            pack_bf16(i == j ? scores[n][2 * n] : 0.f, i == j + 1 ? scores[n][2 * n + 1] : 0.f);
    }
}

// out += value scores for one row tile.
template <class Config>
LSM_DEVICE void Sweep<Config>::read_values(u32 const (&value)[4], u32 const (&packed)[2][2],
                                           float (&out)[2][4]) {
    mma(out[0], value, packed[0][0], packed[0][1]);
    mma(out[1], value, packed[1][0], packed[1][1]);
}

template <class Config>
LSM_DEVICE void Sweep<Config>::load_value(char const* tile, int b, int m, u32 (&value)[4]) const {
    int const column = warp * RowsPerWarp + 16 * m;
    ldmatrix_x4_trans(value, smem_u32(tile) + RowTile::columns_first(b * kBlock, column, lane));
}

// S += value key^T; values may be scaled on the way, and fragments are there for what else is made of them.
template <class Config>
template <class Value, class Key>
LSM_DEVICE void Sweep<Config>::write_state(Stage const& tiles, int b, Value value_too,
                                           Key key_too) {
    u32 value[kRowTiles][4];
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        load_value(tiles.value, b, m, value[m]);
        value_too(m, value[m]);
    }
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
        key_too(kk, k);
    }
}

// out += what the block's tokens read, from the state and from each other; then the state takes them in. Where the
// output without a token's own term is wanted, that is stored on the way (of token `only`, or of all).
template <class Config>
LSM_DEVICE void Sweep<Config>::block(int stage, int b, int only, Output& o) {
    Stage const& tiles = s.stage[stage % kStages];
    if constexpr (!StateOnly) {
        float scores[2][4] = {};
        relate_tokens(tiles, b, scores);
        read_state(tiles, b, o);
        u32 packed[2][2], diag[2];
        pack_scores(scores, packed, [](int i, int j) { return kStrict ? j < i : j <= i; });
        if constexpr (kStrict) pack_diagonal(scores, diag);
        LSM_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            u32 value[4];
            load_value(tiles.value, b, m, value);
            if constexpr (kStrict) {
                float local[2][4] = {};
                read_values(value, packed, local);
                store_strict(stage, b, m, only, o[m], local);
                u32 const diagonal[2][2] = {{diag[0], 0}, {0, diag[1]}};
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

}  // namespace lsm
