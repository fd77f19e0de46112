// What the kernels of the delta engine's recurrence share.
#pragma once

#include "kernels/delta/loaders.cuh"
#include "kernels/recurrence/common.cuh"
#include "kernels/segments.cuh"
#include "params/delta.h"

namespace lsm::delta::exact {

using recurrence::Groups;
using recurrence::load4;
using recurrence::row_at;
using recurrence::run_sum_gate_shares;
using recurrence::scatter_sums;
using recurrence::store4_global;
using recurrence::Work;

// Micro-steps in the order of a pass. A token decays in its first one and is read in its last.
struct Steps {
    i64 begin, first_token;
    int count, per_token, first_micro;  // of its token is `begin`
    bool reverse;

    LSM_DEVICE Steps(i64 begin, i64 end, int per_token, bool reverse)
        : begin(begin),
          first_token(begin / per_token),
          count(static_cast<int>(end - begin)),
          per_token(per_token),
          first_micro(static_cast<int>(begin - first_token * per_token)),
          reverse(reverse) {}

    LSM_DEVICE int offset(int step) const { return reverse ? count - 1 - step : step; }
    LSM_DEVICE i64 at(int step) const { return begin + offset(step); }
    LSM_DEVICE i64 token(int step) const {
        return first_token + (first_micro + offset(step)) / per_token;
    }
    LSM_DEVICE int micro(int step) const { return (first_micro + offset(step)) % per_token; }
    LSM_DEVICE bool decays(int step) const { return micro(step) == 0; }
    LSM_DEVICE bool reads(int step) const { return micro(step) == per_token - 1; }
};

// Starts copying a [Count, Columns] tile whose row i comes from row(i), null: zeros, like columns
// from `columns`, a multiple of 8, on.
template <int Threads, class T, int Count, int Columns, class Row>
LSM_DEVICE void copy_rows(T (&tile)[Count][Columns], int columns, Row const& row) {
    constexpr int kPiece = 16 / sizeof(T), kPieces = Columns / kPiece, kAll = Count * kPieces;
    LSM_UNROLL
    for (int n = 0; n < (kAll + Threads - 1) / Threads; ++n) {
        int const i = threadIdx.x + n * Threads;
        if (kAll % Threads != 0 && i >= kAll) break;
        int const c = i % kPieces * kPiece;
        T const* const from = c < columns ? row(i / kPieces) : nullptr;
        cp_async16(smem_u32(&tile[i / kPieces][c]), from + (from != nullptr ? c : 0),
                   from != nullptr);
    }
}

}  // namespace lsm::delta::exact
