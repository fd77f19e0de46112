// Products of small matrices in panels, register tile by register tile.
//   block panels  X: [columns / W][C][W]        tokens by channels
//   state panels  S: [columns / W][rows][W]     S has its V columns in lanes, its transpose K
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

template <class T>
inline constexpr int kTileRows =
    kLanes<T> < (kRegisters == 32 ? 8 : 4) ? kLanes<T> : (kRegisters == 32 ? 8 : 4);
inline constexpr int kTilePanels = 2;

// acc[m][n] += Σ_k A[m][k] B[k][n]: A a block's tokens (contraction over its channels), B a state.
template <int C, int M, int N, class T>
LSM_INLINE void add_rows_product(Vector<T> (&acc)[M][N], T const* A, T const* B, int64_t B_panel,
                                 int64_t depth) {
    constexpr int W = kLanes<T>;
    for (; depth > 0; depth -= W, A += C * W, B += W * W) {
        int const steps = int(min_of(depth, W));
#pragma GCC unroll 4
        for (int k = 0; k < steps; ++k) {
            Vector<T> b[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) b[n] = load(B + n * B_panel + k * W);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) acc[m][n] += A[m * W + k] * b[n];
            }
        }
    }
}

// acc[m][n] += Σ_j A[j][m] B[j][n] over the tokens j of a block: A's channels become the rows of a
// state.
template <int C, int M, int N, class T>
LSM_INLINE void add_outer_products(Vector<T> (&acc)[M][N], T const* A, T const* B) {
    constexpr int W = kLanes<T>;
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
        Vector<T> b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = load(B + (n * C + j) * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m][n] += A[j * W + m] * b[n];
        }
    }
}

enum class Triangle { past, future };

// acc[m][n] += Σ_j P[first + m][j] X[j][n] over the past, j <= first + m, or Σ_j P[j][first + m]
// X[j][n] over the future, j >= first + m. The other half is skipped, not multiplied by zero: what
// is not finite stays in its place.
template <Triangle kTriangle, int C, int M, int N, class T>
LSM_INLINE void add_triangle(Vector<T> (&acc)[M][N], T const* P, T const* X, int first) {
    constexpr int W = kLanes<T>;
    constexpr bool kPast = kTriangle == Triangle::past;
    int const full_begin = kPast ? 0 : first + M, full_end = kPast ? first : C;
    for (int j = full_begin; j < full_end; ++j) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            T const p = kPast ? P[(first + m) * C + j] : P[j * C + first + m];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m][n] += p * load(X + (n * C + j) * W);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
        int const j = first + i;
        Vector<T> x[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) x[n] = load(X + (n * C + j) * W);
#pragma GCC unroll 8
        for (int m = kPast ? i : 0; m < (kPast ? M : i + 1); ++m) {
            T const p = kPast ? P[(first + m) * C + j] : P[j * C + first + m];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m][n] += p * x[n];
        }
    }
}

struct Nothing {
    template <int M, int N, class V>
    LSM_INLINE void add(V (&)[M][N], int, int64_t) const {}
};

template <Triangle kTriangle, int C, class T>
struct PlusTriangle {
    T const* P;  // [C][C]
    T const* X;  // block panels with the columns of the product

    template <int M, int N, class V>
    LSM_INLINE void add(V (&acc)[M][N], int first, int64_t panel) const {
        add_triangle<kTriangle, C, M, N, T>(acc, P, X + panel * C * kLanes<T>, first);
    }
};

// Panels [p, p + N) of out = A S, then what `plus` makes of them: a block times a state of `depth`
// rows, padded to state_rows.
template <int C, int N, class T, class Plus = Nothing>
LSM_INLINE void block_times_state(T* out, T const* A, T const* S, int64_t state_rows, int64_t depth,
                                  int64_t p, Plus const& plus = {}) {
    constexpr int W = kLanes<T>, M = kTileRows<T>;
    int64_t const S_panel = state_rows * W;
    for (int first = 0; first < C; first += M) {
        Vector<T> acc[M][N] = {};
        add_rows_product<C>(acc, A + first * W, S + p * S_panel, S_panel, depth);
        plus.template add<M, N>(acc, first, p);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) store(out + ((p + n) * C + first + m) * W, acc[m][n]);
        }
    }
}

enum class DecayOf { nothing, state, rows, lanes, both };

// Panels [p, p + N) of dst = decay * src + Aᵀ B: a state over one block of tokens. src may be dst.
// Decays come by rows and by lanes; of the whole state, as the one number of either.
template <int C, DecayOf kDecayOf, int N, class T>
LSM_INLINE void advance_state(T* dst, T const* src, T const* A, int64_t row_panels, T const* B,
                              T const* rows, T const* lanes, int64_t p) {
    constexpr int W = kLanes<T>, M = kTileRows<T>;
    constexpr bool kByRow = kDecayOf == DecayOf::rows || kDecayOf == DecayOf::both;
    constexpr bool kByLane = kDecayOf == DecayOf::lanes || kDecayOf == DecayOf::both;
    int64_t const panel = row_panels * W * W;
    dst += p * panel, src += p * panel, B += p * C * W;
    Vector<T> lane_decay[N];
    for (int n = 0; n < N; ++n) {
        if constexpr (kByLane) lane_decay[n] = load(lanes + (p + n) * W);
        if constexpr (kDecayOf == DecayOf::state) lane_decay[n] = Vector<T>{} + *lanes;
    }
    for (int64_t row = 0; row < row_panels * W; row += M) {
        Vector<T> acc[M][N];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                acc[m][n] = load(src + n * panel + (row + m) * W);
                if constexpr (kByRow) acc[m][n] *= rows[row + m];
                if constexpr (kByLane || kDecayOf == DecayOf::state) acc[m][n] *= lane_decay[n];
            }
        }
        add_outer_products<C>(acc, A + row / W * (C * W) + row % W, B);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) store(dst + n * panel + (row + m) * W, acc[m][n]);
        }
    }
}

// Panels [p, p + N) of the column sums of A * B, element by element, rows weighed if there are
// weights: [panels][rows][W] to [panels][W].
template <bool kWeighed, int N, class T>
LSM_INLINE void sum_products(T* out, T const* A, T const* B, int64_t rows, T const* weights,
                             int64_t p) {
    constexpr int W = kLanes<T>;
    for (int n = 0; n < N; ++n) {
        T const *a = A + (p + n) * rows * W, *b = B + (p + n) * rows * W;
        Vector<T> even{}, odd{};
        for (int64_t r = 0; r < rows; r += 2, a += 2 * W, b += 2 * W) {
            if constexpr (kWeighed) {
                even += weights[r] * (load(a) * load(b));
                odd += weights[r + 1] * (load(a + W) * load(b + W));
            } else {
                even += load(a) * load(b);
                odd += load(a + W) * load(b + W);
            }
        }
        store(out + (p + n) * W, even + odd);
    }
}

// A state with its other dimension in lanes; square tiles are turned in registers.
template <class T>
void transpose_state(T* dst, T const* src, int64_t src_panels, int64_t src_row_panels) {
    constexpr int W = kLanes<T>;
    for (int64_t p = 0; p < src_panels; ++p) {
        for (int64_t r = 0; r < src_row_panels; ++r, src += W * W) {
            Vector<T> tile[W];
            for (int i = 0; i < W; ++i) tile[i] = load(src + i * W);
            transpose<T>(tile);
            T* const out = dst + (r * src_panels + p) * W * W;
            for (int i = 0; i < W; ++i) store(out + i * W, tile[i]);
        }
    }
}

template <int kValue>
struct Int {
    static constexpr int value = kValue;
};

// f(Int<N>, p) for every tile of N panels from p on: what one tile needs stays in the first-level
// cache.
template <class F>
LSM_INLINE void for_each_tile(int64_t column_panels, F const& f) {
    int64_t p = 0;
    for (; p + kTilePanels <= column_panels; p += kTilePanels) f(Int<kTilePanels>{}, p);
    for (; p < column_panels; ++p) f(Int<1>{}, p);
}

// A [K, V] state in memory to panels and back. Lanes run over V, or over K for the transpose; there
// may be more value_panels than V fills.
template <class T>
void read_state(T* dst, T const* src, int64_t src_stride, int64_t K, int64_t V,
                int64_t value_panels) {
    constexpr int W = kLanes<T>;
    int64_t const rows = panels(K, W) * W;
    std::memset(dst, 0, size_t(rows * value_panels * W) * sizeof(T));
    if (src == nullptr) return;
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t v = 0; v < V; v += W) {
            size_t const bytes = size_t(min_of(W, V - v)) * sizeof(T);
            std::memcpy(dst + v * rows + k * W, src + k * src_stride + v, bytes);
        }
    }
}

template <class T>
void write_state(T* dst, int64_t dst_stride, T const* src, int64_t K, int64_t V) {
    constexpr int W = kLanes<T>;
    int64_t const rows = panels(K, W) * W;
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t v = 0; v < V; v += W) {
            size_t const bytes = size_t(min_of(W, V - v)) * sizeof(T);
            std::memcpy(dst + k * dst_stride + v, src + v * rows + k * W, bytes);
        }
    }
}

template <class T>
void read_transposed_state(T* dst, T const* src, int64_t K, int64_t V, int64_t value_panels) {
    constexpr int W = kLanes<T>;
    int64_t const rows = value_panels * W;
    std::memset(dst, 0, size_t(rows * panels(K, W) * W) * sizeof(T));
    if (src == nullptr) return;
    for (int64_t k = 0; k < K; ++k) {
        T* column = dst + k / W * rows * W + k % W;
        for (int64_t v = 0; v < V; ++v) column[v * W] = src[k * V + v];
    }
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
