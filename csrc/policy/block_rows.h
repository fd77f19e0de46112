// Positions of a row of queries, and which blocks it may or must have (params/block_select.h), for CPU and CUDA.
#pragma once

#include "params/block_select.h"
#include "policy/attn_keys.h"

namespace lsm {

// The windows [first, last) that hold a token.
struct WindowRange {
    int64_t first, last;
};

// Of token `local` of a sequence of so many.
LSM_POLICY WindowRange windows_of(PoolParams const& p, int64_t local, int64_t tokens) {
    if (local >= tokens) return {0, 0};
    int64_t const whole = tokens < p.length ? 0 : (tokens - p.length) / p.stride + 1;
    int64_t const begun = local / p.stride + 1, last = p.partial || begun < whole ? begun : whole;
    int64_t const first = local < p.length ? 0 : (local - p.length) / p.stride + 1;
    return {first < last ? first : last, last};
}

// One row of one sequence.
struct BlockRow {
    int64_t batch, sequence, row;    // of the map; `row` in the whole batch row
    int64_t q_begin, q_end;          // its queries, in the batch row
    int64_t t0;                      // of q_begin, in its sequence
    int64_t k_begin, keys;           // of its sequence
    int64_t first_position, blocks;  // of query 0 of the sequence; blocks that there are
};

LSM_POLICY int64_t block_boundary(ScoreParams const& p, void const* cu, int64_t i) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(cu)[i]
                                 : static_cast<int32_t const*>(cu)[i];
}

// Row r of sequence n.
LSM_POLICY BlockRow block_row(ScoreParams const& p, int64_t n, int64_t r) {
    BlockRow row;
    bool const packed = p.cu_seqlens_q != nullptr;
    int64_t const begin = packed ? block_boundary(p, p.cu_seqlens_q, n) : 0;
    int64_t const end = packed ? block_boundary(p, p.cu_seqlens_q, n + 1) : p.Tq;
    row.batch = packed ? 0 : n, row.sequence = n;
    // A GPU does not check boundaries of keys and rows: they are held inside.
    row.row = clamped((packed ? p.cu_rows[n] : 0) + r, 0, p.rows - 1);
    row.t0 = r * p.block_q;
    row.q_begin = clamped(begin + row.t0, begin, end);
    row.q_end = clamped(row.q_begin + p.block_q, begin, end);
    row.k_begin = 0, row.keys = p.Tk;
    if (p.cu_seqlens_k != nullptr) {
        row.k_begin = clamped(block_boundary(p, p.cu_seqlens_k, n), 0, p.Tk);
        row.keys =
            clamped(block_boundary(p, p.cu_seqlens_k, n + 1), row.k_begin, p.Tk) - row.k_begin;
    }
    row.first_position = p.q_length - 1 + p.offset;
    row.blocks = p.blocks;
    if (p.lengths != nullptr) {
        int64_t const tokens = p.lengths[n] > 0 ? p.lengths[n] : 0;
        row.first_position += tokens - p.Tq * p.q_stride;
        row.keys = clamped((tokens + p.key_stride - 1) / p.key_stride, 0, row.keys);
        row.blocks = clamped((tokens + p.block_k - 1) / p.block_k, 0, p.blocks);
    } else if (packed && !p.causal && p.cu_seqlens_k != nullptr) {
        row.blocks = clamped((row.keys + p.tap_step - 1) / p.tap_step, 0, p.blocks);
    }
    return row;
}

// Of the query t of a sequence.
LSM_POLICY int64_t block_position(ScoreParams const& p, BlockRow const& row, int64_t t) {
    return row.first_position + t * p.q_stride;
}

// Keys that a query at this position sees: the first so many.
LSM_POLICY int64_t block_keys_seen(ScoreParams const& p, BlockRow const& row, int64_t position) {
    if (!p.causal) return row.keys;
    return clamped(floor_div(position - p.key_length + 1, p.key_stride) + 1, 0, row.keys);
}

// Blocks [0, limit) may be chosen; those below `first` and those of [local, local_end) are.
struct BlockRange {
    int64_t limit, first, local, local_end;

    LSM_POLICY bool forced(int64_t j) const { return j < first || (j >= local && j < local_end); }
    LSM_POLICY int64_t forced_count() const {
        int64_t const from = local > first ? local : first;
        return first + (local_end > from ? local_end - from : 0);
    }
};

LSM_POLICY BlockRange block_range(ScoreParams const& p, BlockChoice const& choice,
                                  BlockRow const& row) {
    int64_t const own = floor_div(block_position(p, row, row.t0), p.block_k);
    int64_t const last =
        floor_div(block_position(p, row, row.t0 + (row.q_end - row.q_begin) - 1), p.block_k);
    BlockRange range;
    range.limit = p.causal ? clamped(last + 1, 0, row.blocks) : row.blocks;
    range.first = clamped(choice.first, 0, range.limit);
    range.local_end = clamped(last + 1, 0, range.limit);
    range.local =
        choice.local > 0 ? clamped(own - choice.local + 1, 0, range.local_end) : range.local_end;
    return range;
}

}  // namespace lsm
