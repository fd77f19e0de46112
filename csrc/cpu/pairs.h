// Products of bf16 matrices, summed in fp32, on CPUs that have instructions for them: tiles (AMX) or dot products of pairs
// (AVX512-BF16). Both take the left matrix as it lies in memory and of the right one two rows side by side.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Two bf16 that follow each other in a contraction, the first in the lower half.
using Pair = uint32_t;

inline constexpr int64_t kPairDepth = 32;  // of a contraction, what a product takes at once
inline constexpr bool kPairProducts = kVectorBytes == 64;

inline bool has_pair_products() {
    return kPairProducts && best_tier() >= Tier::avx512_bf16;
}
inline bool has_tiles() {
    return kPairProducts && best_tier() == Tier::amx;
}

#if LSM_CPU_VECTOR_BYTES == 64

// Rows of pairs by vectors of columns: C[r][n] = (C[r][n] +) sum over k of A[r][2k] B[k][n][0] + A[r][2k+1] B[k][n][1].
// Strides of A in bytes, of the others in numbers.
template <int R, int N>
__attribute__((target("avx512bf16"))) void dot_pairs(float* C, int64_t c_row, char const* A,
                                                     int64_t a_bytes, Pair const* B, int64_t b_row,
                                                     int64_t pairs, bool add) {
    __m512 sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
            sum[r][n] = add ? load_bytes<__m512>(C + r * c_row + n * 16) : __m512(Vector<float>{});
    }
    for (int64_t k = 0; k < pairs; ++k) {
        __m512i b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) b[n] = load_bytes<__m512i>(B + k * b_row + n * 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Bits const a = Bits{} + load_bytes<Pair>(A + r * a_bytes + k * int64_t(sizeof(Pair)));
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)a, (__m512bh)b[n]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(C + r * c_row + n * 16, Vector<float>(sum[r][n]));
    }
}

template <int N>
void dot_pairs_of_rows(float* C, int64_t c_row, char const* A, int64_t a_bytes, Pair const* B,
                       int64_t b_row, int64_t rows, int64_t pairs, bool add) {
    constexpr int R = N == 1 ? 8 : 4;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        dot_pairs<R, N>(C + r * c_row, c_row, A + r * a_bytes, a_bytes, B, b_row, pairs, add);
    for (; r < rows; ++r)
        dot_pairs<1, N>(C + r * c_row, c_row, A + r * a_bytes, a_bytes, B, b_row, pairs, add);
}

// The compiler's intrinsics for tiles do not say that they read memory.
template <int kTile>
LSM_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
LSM_INLINE void load_tile(void const* p, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(row_bytes) : "memory");
}
template <int kTile>
LSM_INLINE void store_tile(void* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(row_bytes) : "memory");
}
template <int kC, int kA, int kB>
LSM_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Tiles of 16 rows of 64 bytes as long as the object lives, and then again what was before.
class Tiles {
  public:
    explicit Tiles(bool wanted) : wanted_(wanted && has_tiles()) {
        if (!wanted_) return;
        asm volatile("sttilecfg %0" : "=m"(before_));
        Shape shape{};
        shape.palette = 1;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() {
        if (!wanted_) return;
        if (before_.palette == 0) {
            asm volatile("tilerelease");
        } else {
            asm volatile("ldtilecfg %0" ::"m"(before_));
        }
    }
    Tiles(Tiles const&) = delete;
    Tiles& operator=(Tiles const&) = delete;

  private:
    struct alignas(64) Shape {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    Shape before_;
    bool wanted_;
};

// M by N tiles of C: tile registers 0 to 3, of A 4 and 5, of B 6 and 7.
template <int M, int N>
void multiply_pair_tiles(float* C, int64_t c_row, char const* A, int64_t a_bytes, Pair const* B,
                         int64_t b_row, int64_t pairs, bool add) {
    int64_t const c_bytes = c_row * 4, b_bytes = b_row * 4;
    float* const below = C + 16 * c_row;
    if (add) {
        load_tile<0>(C, c_bytes);
        if constexpr (N == 2) load_tile<1>(C + 16, c_bytes);
        if constexpr (M == 2) load_tile<2>(below, c_bytes);
        if constexpr (M == 2 && N == 2) load_tile<3>(below + 16, c_bytes);
    } else {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    }
    for (int64_t k = 0; k < pairs; k += 16) {
        load_tile<6>(B + k * b_row, b_bytes);
        load_tile<4>(A + k * 4, a_bytes);
        multiply_tiles<0, 4, 6>();
        if constexpr (N == 2) {
            load_tile<7>(B + k * b_row + 16, b_bytes);
            multiply_tiles<1, 4, 7>();
        }
        if constexpr (M == 2) {
            load_tile<5>(A + 16 * a_bytes + k * 4, a_bytes);
            multiply_tiles<2, 5, 6>();
            if constexpr (N == 2) multiply_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(C, c_bytes);
    if constexpr (N == 2) store_tile<1>(C + 16, c_bytes);
    if constexpr (M == 2) store_tile<2>(below, c_bytes);
    if constexpr (M == 2 && N == 2) store_tile<3>(below + 16, c_bytes);
}

template <int N>
void multiply_pair_rows(float* C, int64_t c_row, char const* A, int64_t a_bytes, Pair const* B,
                        int64_t b_row, int64_t rows, int64_t pairs, bool add, bool tiles) {
    int64_t r = 0;
    for (; tiles && r + 32 <= rows; r += 32)
        multiply_pair_tiles<2, N>(C + r * c_row, c_row, A + r * a_bytes, a_bytes, B, b_row, pairs,
                                  add);
    for (; tiles && r + 16 <= rows; r += 16)
        multiply_pair_tiles<1, N>(C + r * c_row, c_row, A + r * a_bytes, a_bytes, B, b_row, pairs,
                                  add);
    if (r < rows)
        dot_pairs_of_rows<N>(C + r * c_row, c_row, A + r * a_bytes, a_bytes, B, b_row, rows - r,
                             pairs, add);
}

// C = (C +) A B, `rows` by `vectors` vectors over `depth` numbers, a multiple of kPairDepth; as dot_pairs. In the life of a
// Tiles.
inline void multiply_pairs(float* C, int64_t c_row, void const* A, int64_t a_bytes, Pair const* B,
                           int64_t b_row, int64_t rows, int64_t vectors, int64_t depth, bool add) {
    bool const tiles = has_tiles();
    auto const* a = static_cast<char const*>(A);
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2)
        multiply_pair_rows<2>(C + v * 16, c_row, a, a_bytes, B + v * 16, b_row, rows, depth / 2,
                              add, tiles);
    if (v < vectors)
        multiply_pair_rows<1>(C + v * 16, c_row, a, a_bytes, B + v * 16, b_row, rows, depth / 2,
                              add, tiles);
}

#else

struct Tiles {
    explicit Tiles(bool) {}
};

#endif

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
