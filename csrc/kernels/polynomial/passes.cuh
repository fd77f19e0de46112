// Polynomial attention (Based, ReBased): linear attention whose state [F, V] is made of features of q and k
// (policy/features.h), with sums z [F] of the features of k beside it that outputs are divided by. A feature is a product
// of two channels, made of the rows at hand: no feature of a token is in global memory.
//
// A pass walks a segment of a value head, forward or in reverse, and at each token reads and then writes:
//
//     S += phi(writer) value^T,   z += weight phi(writer)
//     columns = S^T phi(reader),  total = z . phi(reader)
//     rows    = S read + z read_weight,   which is a gradient of phi(reader), taken through phi at once
//
//              walks      writer   value          weight   reader   columns   read           read_weight   rows
//     o        forward    k        v              1        q        o         -              -             -
//     dq       forward    k        v              1        q        -         dO / divisor   below         dq
//     dkv      reverse    q        dO / divisor   below    k        dv        v              1             dk
//     dv, dk   dkv, one after the other
//     state    either, from zero, for the join of segments
//
// What a token has of its own write is added to that as the polynomial p(s) of s = reader . writer, and p'(s) for rows: as
// features it would be a sum of large products, of which little may be left, with nothing else in the sum of a first token.
// Here q is scaled, divisor = |total| + eps and below is the gradient of total (1 and 0 where nothing is divided).
#pragma once

#include "kernels/polynomial/common.cuh"
#include "kernels/segments.cuh"

namespace lsm::polynomial {

enum class Pass { state, o, dq, dkv, dv, dk };

constexpr int kColumns = 64;  // of V, per block

// A number per token and value head, [B, HV, T], or the same for all.
struct Numbers {
    float const* data = nullptr;
    float otherwise = 1.f;

    LSM_DEVICE float at(i64 i) const { return data == nullptr ? otherwise : load_global(data + i); }
};

// A token's rows on one side: q and dO, or k and v.
struct Side {
    Rows raw;  // [B, T, H, channels]
    float scale;
    Rows value;              // [B, T, HV, V]
    Numbers factor, weight;  // what multiplies value; the number beside it, which meets z
};

// Where sums of one kind go, [B, T, HV, width]: to rows if one block has the whole sum, else to shares.
struct Result {
    Rows rows;
    Dtype type;
    float* shares = nullptr;  // [blocks that share, B T HV, width]
};

// [N or records, HV, F, V] and [N or records, HV, F]; nullable: zeros, or not wanted.
struct StatePair {
    float *S = nullptr, *z = nullptr;
    bool per_record = false;

    LSM_DEVICE i64 owner(Segment const& segment, i64 record) const {
        return per_record ? record : segment.sequence;
    }
};

struct PassParams {
    Basis basis;
    Side writer, reader;
    Result columns, rows;
    float* totals;         // shares of total, [slices, B T HV], where o's columns are shared
    float* tokens;         // o: [kGateRows, B, HV, T]
    StatePair start, end;  // of a state pass end is per record
    Dtype type;            // of rows and values
    i64 B, T;
    int H, HV, V, channels, width, slices, tiles;  // width: features in a slice
    float eps;
    bool reverse, divides;

    LSM_DEVICE i64 number(i64 batch, i64 t, int head) const { return (batch * HV + head) * T + t; }
    LSM_DEVICE i64 row(i64 batch, i64 t, int head) const { return (batch * T + t) * HV + head; }
    LSM_DEVICE i64 token(Segment const& segment, int step) const {
        return reverse ? segment.t1 - 1 - step : segment.t0 + step;
    }
    // The segment in which a walk of its sequence ends: nothing starts from its state, and `end` is of it.
    LSM_DEVICE bool is_last(Segment const& segment) const {
        return reverse ? segment.index == 0 : segment.is_last;
    }
    LSM_DEVICE bool ends_with(Segment const& segment) const {
        return end.per_record || (is_last(segment) && segment.sequence >= 0);
    }
};

// Rows of Normaliser::tokens.
LSM_DEVICE void store_token(float* tokens, i64 at, i64 size, float total) {
    float const numbers[kGateRows] = {0.f, 1.f, total, 0.f};
    LSM_UNROLL
    for (int i = 0; i < kGateRows; ++i) store_global(tokens + i * size + at, numbers[i]);
}

}  // namespace lsm::polynomial
