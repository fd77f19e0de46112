// What the recurrence's kernels share: operands, where a segment's state comes from and goes to,
// and the copies from global to shared memory.
#pragma once

#include "kernels/platform.cuh"
#include "kernels/policy/decay.cuh"
#include "kernels/segments.cuh"
#include "params/chunk.h"

namespace lsm::recurrence {

template <class T>
LSM_DEVICE T* row_at(Rows const& x, i64 batch, i64 time, int head) {
    return static_cast<T*>(x.data) + batch * x.batch + time * x.time + head * x.head;
}

// [records or N, HV] states of K rows and V columns, fp32, contiguous by rows or by columns.
struct States {
    float* data = nullptr;  // nullable: zeros
    bool per_record = false;
    int row = 0, column = 1;  // strides; one of them is 1

    LSM_DEVICE float* of(Segment const& segment, i64 record, i64 head, i64 HV, i64 size) const {
        return data + ((per_record ? record : segment.sequence) * HV + head) * size;
    }
};

// Value heads that share a head of the operands along the state's rows, and of those along its
// columns: q and k, and v, unless the state is transposed.
struct Groups {
    int row, column;
};

// The work of one block: blockIdx.x = (record · HV + head) · tiles + tile. Tiles are neighbours,
// because they read the same rows of everything that is not tiled.
struct Work {
    i64 record;
    int head, row_head, column_head;  // of gates and outputs; of either kind of operand
    int tile;

    LSM_DEVICE Work(int HV, Groups const& groups, int tiles) {
        unsigned const unit = blockIdx.x / static_cast<unsigned>(tiles);
        record = unit / static_cast<unsigned>(HV);
        head = static_cast<int>(unit % static_cast<unsigned>(HV));
        row_head = head / groups.row;
        column_head = head / groups.column;
        tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles));
    }
};

// The tokens of a segment in the order of a pass. In reverse, where tensors have negative strides
// of time, a token counts from the other side of 0.
struct Walk {
    i64 first;
    int steps;

    LSM_DEVICE Walk(Segment const& segment, bool reverse)
        : first(reverse ? 1 - segment.t1 : segment.t0),
          steps(static_cast<int>(segment.t1 - segment.t0)) {}

    LSM_DEVICE i64 token(int step) const { return first + step; }
    LSM_DEVICE bool has(int step) const {
        return static_cast<unsigned>(step) < static_cast<unsigned>(steps);
    }
};

// Four elements of a row in shared memory, as floats.
LSM_DEVICE void load4(float const* row, float (&x)[4]) {
    float4 const v = *reinterpret_cast<float4 const*>(row);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// Elements of 2 bytes are as good: 8 bytes, widened.
template <class T>
LSM_DEVICE void load4(T const* row, float (&x)[4]) {
    struct alignas(8) Piece {
        T element[4];
    };
    Piece const v = *reinterpret_cast<Piece const*>(row);
    LSM_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = static_cast<float>(v.element[j]);
}

template <class T>
LSM_DEVICE void store4_global(T* row, float const (&x)[4]) {
    struct alignas(4 * sizeof(T)) Piece {
        T element[4];
    };
    Piece v;
    LSM_UNROLL
    for (int j = 0; j < 4; ++j) v.element[j] = static_cast<T>(x[j]);
    store_global(reinterpret_cast<Piece*>(row), v);
}

// Sums each of x[0 .. Left) over the lanes that differ in the bits Distance, Distance / 2, ...,
// Last, and scatters the sums: at every bit the upper lanes go on with the upper half of what is
// left, until one number is. So with b the value of those bits counted from Last, the lane ends
// with the sums from b · Left · Last / (2 Distance) on.
template <int Distance, int Last, int Left, int N>
LSM_DEVICE void scatter_sums(float (&x)[N], int lane) {
    if constexpr (Left > 1) {
        bool const upper = (lane & Distance) != 0;
        LSM_UNROLL
        for (int i = 0; i < Left / 2; ++i) {
            float const keep = upper ? x[i + Left / 2] : x[i],
                        give = upper ? x[i] : x[i + Left / 2];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, give, Distance);
        }
    } else {
        x[0] += __shfl_xor_sync(0xffffffffu, x[0], Distance);
    }
    if constexpr (Distance > Last)
        scatter_sums<Distance / 2, Last, (Left > 1 ? Left / 2 : 1)>(x, lane);
}

// Starts copying a [Tokens, Columns] tile, row i being the token visited at step + i; the first row
// comes from `from`, the next ones `time` elements further each. Steps that the walk does not have
// and columns from `columns`, a multiple of 8, on are zeros.
template <int Threads, class T, int Tokens, int Columns>
LSM_DEVICE void copy_rows(T (&tile)[Tokens][Columns], T const* from, i64 time, Walk const& walk,
                          int step, int columns) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = Columns / kPiece, kAll = Tokens * kPieces;
    LSM_UNROLL
    for (int n = 0; n < (kAll + Threads - 1) / Threads; ++n) {
        int const i = threadIdx.x + n * Threads;
        if (kAll % Threads != 0 && i >= kAll) break;
        int const token = i / kPieces, c = i % kPieces * kPiece;
        bool const inside = walk.has(step + token) && c < columns;
        cp_async16(smem_u32(&tile[token][c]), from + token * time + c, inside);
    }
}

// What each of `tiles` tiles of rows has in the gradient of a gate that all rows share.
template <class T>
struct GateShares {
    float const* shares;  // [tiles, size]; null: nothing to add up
    int tiles;
    i64 size, HV;  // B T HV
    GateLoader<T> gates;
    Rows dg;  // contiguous; the gate may not be
};

// dg: the shares' sum, in the order of the tiles.
template <class T>
__global__ void __launch_bounds__(256) sum_gate_shares(GateShares<T> const p) {
    i64 const at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= p.size) return;
    float sum = 0.f;
    for (int tile = 0; tile < p.tiles; ++tile) sum += load_global(p.shares + tile * p.size + at);
    i64 const row = at / p.HV, time = p.dg.batch / p.HV;
    i64 const gate = p.gates.at(row / time, row % time, at % p.HV, 0);
    p.gates.store(p.dg.data, at, p.gates.through(sum, gate));
}

template <class T>
void run_sum_gate_shares(GateShares<T> const& p, void* stream) {
    if (p.shares == nullptr || p.size == 0) return;
    launch(sum_gate_shares<T>, dim3(static_cast<unsigned>((p.size + 255) / 256)), dim3(256), 0,
           stream, p);
}

}  // namespace lsm::recurrence
