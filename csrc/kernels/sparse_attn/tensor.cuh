// Products on tensor cores: a warp's 16-row tiles against tokens in shared memory, and the way there.
#pragma once

#include "kernels/sparse_attn/numbers.cuh"
#include "kernels/sparse_attn/plan.cuh"
#include "kernels/sparse_attn/score.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm::sparse_attn {

template <class T>
LSM_DEVICE void multiply_add(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    mma_16x8x16(d, a, b0, b1, static_cast<T const*>(nullptr));
}

template <class T>
LSM_DEVICE u32 pack_as(float low, float high) {
    return pack(low, high, static_cast<T*>(nullptr));
}

template <int N>
using Accumulators = float[N / 8][4];  // [16, N] of a warp
template <int N>
using Operands = u32[N / 16][4];

// [Rows, D] in shared memory, in one piece, or beyond 256 columns in slabs of 64. A piece begins on a multiple of its row,
// so the place of its columns 16 c on is that of its first with 32 c flipped.
template <int Rows, int D_>
struct Matrix {
    static constexpr int D = D_, kColumns = D > 256 ? 64 : D, kSlabs = D / kColumns;
    using Piece = Tile<kColumns>;
    static constexpr int kRowBytes = Piece::kRowBytes, kSlabBytes = Rows * kRowBytes;
    static constexpr int kBytes = kSlabs * kSlabBytes;

    LSM_DEVICE static u32 offset(int row, int column) {
        if constexpr (kSlabs == 1) return Piece::offset(row, column);
        return column / kColumns * kSlabBytes + Piece::offset(row, column % kColumns);
    }
    // From the place of a slab's first columns to 16 c columns on.
    LSM_DEVICE static u32 along(u32 first, int c) {
        constexpr int kSteps = kColumns / 16;
        return (first ^ (32 * (c % kSteps))) + c / kSteps * kSlabBytes;
    }
};

template <class M>
LSM_DEVICE u32 rows_of(char const* tile, int row) {
    return smem_u32(tile) + M::Piece::rows_first(row, 0, threadIdx.x % 32);
}
template <class M>
LSM_DEVICE u32 columns_of(char const* tile) {
    return smem_u32(tile) + M::Piece::columns_first(0, 0, threadIdx.x % 32);
}

// s = rows . tokens, of Matrices A and B, over `columns` rounded up to 64; a: rows_of, b: columns_of.
template <class T, class A, class B, int Tiles, int MT>
LSM_DEVICE void relate(u32 a, u32 b, int columns, float (&s)[MT][Tiles][4]) {
    constexpr int N = 8 * Tiles;
    LSM_UNROLL
    for (int m = 0; m < MT; ++m) {
        LSM_UNROLL
        for (int i = 0; i < N / 2; ++i) s[m][i / 4][i % 4] = 0.f;
    }
    LSM_UNROLL
    for (int c = 0; c < A::D / 16; ++c) {
        if (c % 4 == 0 && 16 * c >= columns) break;
        u32 left[MT][4];
        LSM_UNROLL
        for (int m = 0; m < MT; ++m) ldmatrix_x4(left[m], A::along(a, c) + 16 * m * A::kRowBytes);
        LSM_UNROLL
        for (int j = 0; j < N / 16; ++j) {
            u32 right[4];
            ldmatrix_x4(right, B::along(b, c) + 16 * j * B::kRowBytes);
            LSM_UNROLL
            for (int m = 0; m < MT; ++m) {
                multiply_add<T>(s[m][2 * j], left[m], right[0], right[1]);
                multiply_add<T>(s[m][2 * j + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// sums += weights x tokens of Matrix B; b: rows_of(tile, 0), of the slab where these columns begin.
template <class T, class B, int D, int N, int MT>
LSM_DEVICE void gather(Operands<N> const (&weights)[MT], u32 b, int columns,
                       Accumulators<D> (&sums)[MT]) {
    LSM_UNROLL
    for (int c = 0; c < D / 16; ++c) {
        if (c % 4 == 0 && 16 * c >= columns) break;
        LSM_UNROLL
        for (int j = 0; j < N / 16; ++j) {
            u32 right[4];
            ldmatrix_x4_trans(right, B::along(b, c) + 16 * j * B::kRowBytes);
            LSM_UNROLL
            for (int m = 0; m < MT; ++m) {
                multiply_add<T>(sums[m][2 * c], weights[m][j], right[0], right[1]);
                multiply_add<T>(sums[m][2 * c + 1], weights[m][j], right[2], right[3]);
            }
        }
    }
}

// Accumulators as A operand.
template <class T, int N>
LSM_DEVICE void pack_weights(Accumulators<N> const& x, Operands<N>& packed) {
    LSM_UNROLL
    for (int n = 0; n < N / 8; ++n) {
        packed[n / 2][n % 2 * 2] = pack_as<T>(x[n][0], x[n][1]);
        packed[n / 2][n % 2 * 2 + 1] = pack_as<T>(x[n][2], x[n][3]);
    }
}

// Rows of a tensor into a tile: at(row) is the row's first element, or null for zeros. Zeros too up to a multiple of 64
// columns, `least` at least.
template <class T, int D, int Count, int Threads, class Layout = Matrix<Count, D>, class At>
LSM_DEVICE void load_tile_rows(Rows const& x, char* tile, int columns, At at, int least = 0) {
    constexpr int kPieces = (D > 256 ? 64 : D) / 8;
    int const end = max((columns + 63) / 64 * 64, least);
    u32 const to = smem_u32(tile);
    LSM_UNROLL_BY(1)
    for (int slab = 0; slab < D; slab += 8 * kPieces) {
        int const column = slab + threadIdx.x % kPieces * 8;
        if (column >= end) return;
        LSM_UNROLL_BY(4)
        for (int row = threadIdx.x / kPieces; row < Count; row += Threads / kPieces) {
            T const* const from = at(row);
            bool const valid = from != nullptr && column < columns;
            cp_async16(to + Layout::offset(row, column), valid ? from + column : x.data, valid);
        }
    }
}

// A warp's [16, D] accumulators, columns `from` on, through its own rows of a tile to rows of a tensor; as above.
template <class T, class Layout, int Tiles, class At>
LSM_DEVICE void store_tile_rows(char* tile, int first, int columns, float const (&x)[Tiles][4],
                                float upper, float lower, At at, int from = 0) {
    constexpr int D = 8 * Tiles;
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int n = 0; n < D / 8; ++n) {
        if (n % 8 == 0 && from + 8 * n >= columns) break;
        int const c = from + 8 * n + lane % 4 * 2;
        *reinterpret_cast<u32*>(tile + Layout::offset(first + lane / 4, c)) =
            pack_as<T>(x[n][0] * upper, x[n][1] * upper);
        *reinterpret_cast<u32*>(tile + Layout::offset(first + lane / 4 + 8, c)) =
            pack_as<T>(x[n][2] * lower, x[n][3] * lower);
    }
    __syncwarp();
    LSM_UNROLL_BY(4)
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        int const row = first + i / (D / 8), c = from + i % (D / 8) * 8;
        T* const to = at(row);
        if (to != nullptr && c < columns)
            store_global(reinterpret_cast<uint4*>(to + c),
                         *reinterpret_cast<uint4 const*>(tile + Layout::offset(row, c)));
    }
}

template <class T>
LSM_DEVICE T* element(Rows const& x, i64 batch, i64 time, i64 head) {
    return static_cast<T*>(x.data) + row_offset(x, batch, time, head);
}

// The first unit's place and size in a step of N tokens.
struct Steps {
    int size_shift, each;  // tokens of a unit, units of a step

    LSM_DEVICE Steps(int block, int n) {
        int const size = min(block, n);
        size_shift = 31 - __clz(size), each = n >> size_shift;
    }
    LSM_DEVICE int size() const { return 1 << size_shift; }
    LSM_DEVICE Unit unit(Plan const& plan, int step, int column) const {
        return plan.at(step * each + (column >> size_shift));
    }
    // Token of the sequence, below 0 if none.
    LSM_DEVICE int token(Plan const& plan, int step, int column) const {
        int const first = unit(plan, step, column).first;
        return first + (column & (size() - 1));
    }
};

}  // namespace lsm::sparse_attn
