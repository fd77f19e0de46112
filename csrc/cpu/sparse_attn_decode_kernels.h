// What the scheduler (sparse_attn_decode.cpp) asks of one instruction set's decode attention (sparse_attn_decode_tier.h). Plain C++,
// no vectors.
#pragma once

#include "params/sparse_attn.h"
#include "policy/attn_keys.h"
#include "tier_choice.h"

namespace lsm::cpu {

// Queries [t0, t1) of heads [h0, h1), which share one key/value head and one list, against part of what they visit.
struct DecodeTask {
    int64_t batch, kv_head, t0, t1, h0, h1;
    int64_t keys;                   // in the cache
    int32_t const* list = nullptr;  // blocks; null: by `visits`
    int64_t list_at = 0;            // of the list in lists.index and lists.bias
    AttnVisits visits;
    int64_t first, last, part;  // of the visits
};

struct SparseAttnDecodeKernels {
    int64_t (*scratch_bytes)(SparseAttnParams const& p);
    // Writes o [B, Tq, Hq, V] and lse [B, Hq, Tq] of a part, both in acc_dtype.
    void (*decode)(SparseAttnParams const& p, DecodeTask const& task, void* o, void* lse,
                   void* scratch);
    // Rows [first, last) of the B * T * H.
    void (*merge)(MergeParams const& p, int64_t first, int64_t last);
    void (*merge_bwd)(MergeParams const& p, int64_t first, int64_t last);
};

LSM_CPU_TABLES(SparseAttnDecodeKernels, sparse_attn_decode_kernels)

}  // namespace lsm::cpu
