// Shared-memory tiles of bf16 and the fragments tensor cores read from them.
//
// A tile is row-major with its 16-byte pieces permuted: piece p of row r lies at p ^ (r & 7), so that both the
// row-wise loads and the eight rows of an ldmatrix fall into different banks. Rows are at least 128 bytes.
#pragma once

#include "kernels/matrix.cuh"

namespace lsm {

template <int Columns>
struct Tile {
    static_assert(Columns % 64 == 0, "the permutation needs eight 16-byte pieces per row");
    static constexpr int kRowBytes = Columns * 2;

    // Byte offset of an element.
    LSM_DEVICE static u32 offset(int row, int column) {
        return row * kRowBytes + ((column / 8) ^ (row & 7)) * 16 + (column % 8) * 2;
    }

    // Byte offset of the 16-byte piece this lane names in an ldmatrix over the 16x16 block at (row, column), where
    // row % 16 == 0 and column % 16 == 0. Two orders of the four 8x8 matrices (rows, columns):
    //   kRowsFirst:    (0,0) (8,0) (0,8) (8,8)    A operand; with .trans, B operand whose depth is the row
    //   kColumnsFirst: (0,0) (0,8) (8,0) (8,8)    B operand, two column pairs; with .trans, A operand transposed
    LSM_DEVICE static u32 rows_first(int row, int column, int lane) {
        return (row + (lane & 15)) * kRowBytes + ((column / 8 + (lane >> 4)) ^ (lane & 7)) * 16;
    }
    LSM_DEVICE static u32 columns_first(int row, int column, int lane) {
        return (row + (lane & 7) + (lane >> 4) * 8) * kRowBytes +
               ((column / 8 + ((lane >> 3) & 1)) ^ (lane & 7)) * 16;
    }
};

LSM_DEVICE u32 pack_bf16(float low, float high) {
    return pack(low, high, static_cast<bf16*>(nullptr));
}

LSM_DEVICE float2 unpack(u32 pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

LSM_DEVICE void mma(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    mma_16x8x16(d, a, b0, b1, static_cast<bf16 const*>(nullptr));
}

}  // namespace lsm
