// Decay by key channel, between the rows of a chunk. Rows s < t differ first, from the top, in some
// bit w: t lies in the right and s in the left half of a block of 2 w rows. With the left half's
// last row between them,
//
//     e^{G_t - G_s} = prefix_w(t) suffix_w(s),
//
// prefix_w(t) the decay from the start of t's half to t, suffix_w(s) that from s to the end of its
// half: products of factors e^g <= 1, built up level by level, with nothing to overflow and no
// exponent to bound, whatever the gates.
#pragma once

#include "kernels/delta/chunks.cuh"

namespace lsm::delta {

// Row r of the eight of a 16-row block that lie in right (left) halves of level w.
LSM_DEVICE int right_row(int r, int w) {
    return (r & ~(w - 1)) << 1 | w | (r & (w - 1));
}
LSM_DEVICE int left_row(int r, int w) {
    return (r & ~(w - 1)) << 1 | (r & (w - 1));
}

// From halves of w rows to halves of 2 w.
template <int w>
LSM_DEVICE void merge(float (&prefix)[kC], float (&suffix)[kC]) {
    LSM_UNROLL
    for (int block = 0; block < kC; block += 2 * w) {
        float const left = prefix[block + w - 1], right = prefix[block + 2 * w - 1];
        LSM_UNROLL
        for (int i = 0; i < w; ++i) {
            suffix[block + i] *= right;
            prefix[block + w + i] *= left;
        }
    }
}

// One channel's factor of row t of a chunk.
LSM_DEVICE float channel_factor(DeltaParams const& p, Chunk const& chunk, int head, int t, int c) {
    int const n = static_cast<int>(p.n);
    if (t >= chunk.rows || c >= p.K || t % n != 0 || p.g.data == nullptr) return 1.f;
    i64 const at = chunk.batch * p.g.batch + (chunk.token + t / n) * p.g.time + head * p.g.head + c;
    float const g = p.gate_dtype == Dtype::f32
                        ? load_global(static_cast<float const*>(p.g.data) + at)
                        : static_cast<float>(load_global(static_cast<bf16 const*>(p.g.data) + at));
    return exp2_approx(g * kLog2e);
}

template <int Columns>
LSM_DEVICE float element(char const* tile, int row, int column) {
    return static_cast<float>(
        *reinterpret_cast<bf16 const*>(tile + Tile<Columns>::offset(row, column)));
}
template <int Columns>
LSM_DEVICE void set_element(char* tile, int row, int column, float x) {
    *reinterpret_cast<bf16*>(tile + Tile<Columns>::offset(row, column)) = bf16(x);
}

}  // namespace lsm::delta
