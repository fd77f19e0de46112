// Rows from anywhere in global memory, by cp.async, to tiles whose width is known at run time.
#pragma once

#include "kernels/platform.cuh"

namespace lsm::attn_rows {

// A row-major tile of T whose 16-byte pieces are permuted as in tile.cuh; columns known at run time, a multiple of 64.
struct Pieces {
    u32 base, row_bytes;

    LSM_DEVICE u32 at(int row, int piece) const {
        return base + row * row_bytes + ((piece ^ (row & 7)) * 16);
    }
};

// Rows of T to a tile, 8 threads side by side: row(n) says where row n begins, or null. `padded` columns, those from
// `columns` on zero; `any` is an address that may be named where nothing is read.
template <class T, int Threads, class Row>
LSM_DEVICE void load_rows(Pieces const& tile, int rows, int columns, int padded, void const* any,
                          Row const& row) {
    constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
    for (int r = threadIdx.x / 8; r < rows; r += Threads / 8) {
        T const* const from = row(r);
        for (int piece = threadIdx.x % 8; piece < padded / kUnit; piece += 8) {
            bool const inside = from != nullptr && piece * kUnit < columns;
            cp_async16(tile.at(r, piece), inside ? from + piece * kUnit : any, inside);
        }
    }
}

}  // namespace lsm::attn_rows
