// A block of tokens has two sides: the channels of keys and those of values. On each, a vector per
// token reads the state and another writes to it:
//   key side    queries read, keys write         dq, dk
//   value side  output gradients read, values write    o, dv
// Σ_t grad_o_t · o_t is linear in each of the four, so one formula gives every result: o is the
// gradient of the output gradients as dq is that of the queries. With A(j, t) = a_{j+1} ... a_t:
//   reader_t  A(-1, t) S other_reader_t + Σ_{j <= t} (other pair t, j) writer_j A(j, t)
//   writer_j  A(j, last) dS other_writer_j + Σ_{t >= j} (other pair t, j) reader_t A(j, t)
//   pair t, j = reader_t · writer_j
// Decays act on the channels of one side: there they multiply what goes into a pair or a state, or
// else what comes out. Every decay factor is a product of the block's own exp(g), never a quotient,
// so resets (a = 0) and strong gates are exact.
#pragma once

#include "arena.h"
#include "chunk_kernels.h"
#include "tiles.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

enum class Side { key, value };

constexpr Side opposite(Side side) {
    return side == Side::key ? Side::value : Side::key;
}

template <class T>
struct BlockSide {
    explicit BlockSide(int64_t channels, Features features = Features::none,
                       int64_t raw_channels = 0)
        : channels(channels),
          panels(panels_of(channels)),
          features(features),
          raw_panels(features == Features::none ? panels : panels_of(raw_channels)) {}

    int64_t channels, panels;
    Features features;  // which the channels are of others, the raw ones
    int64_t raw_panels;
    T *raw_reader, *raw_writer;  // block panels, as all up to pairs; else the same as the next two
    T *reader, *writer;
    T *start, *end;          // reader_t A(-1, t) and writer_j A(j, last) on the side of the decays,
                             // else the same as reader and writer
    T *d_reader, *d_writer;  // gradients
    T* pairs;                // [C][C], reader_t · writer_j (with A(j, t) on the side of the decays)

  private:
    static int64_t panels_of(int64_t channels) { return (channels + kLanes<T> - 1) / kLanes<T>; }
};

// P[t][j] = x_t · y_j for j <= t.
template <int C, class T>
LSM_INLINE void causal_dots(T* P, T const* x, T const* y, int64_t column_panels) {
    constexpr int W = kLanes<T>, kColumns = W == 16 ? 4 : 2, kRows = W / kColumns;
    for (int t = 0; t < C; t += kRows) {
        for (int j = 0; j < t + kRows; j += kColumns) {
            Vector<T> sums[W] = {};
            for (int64_t p = 0; p < column_panels; ++p) {
                T const *x_t = x + (p * C + t) * W, *y_j = y + (p * C + j) * W;
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
                    for (int n = 0; n < kColumns; ++n) {
                        sums[m * kColumns + n] += load(x_t + m * W) * load(y_j + n * W);
                    }
                }
            }
            Vector<T> const tile = sum_each<T>(sums);
            T rows[W];
            store(rows, tile);
            for (int m = 0; m < kRows; ++m) {
                std::memcpy(P + (t + m) * C + j, rows + m * kColumns, kColumns * sizeof(T));
            }
        }
    }
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
