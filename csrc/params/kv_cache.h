// The seam of what writes to a cache that sparse_attn_decode reads: plain structs, no torch, no CUDA.
#pragma once

#include "params/chunk.h"
#include "policy/gate.h"

namespace lsm {

// New keys and values into a cache, in place: token t of row b goes to place seqlens[b] + t. From the cache's end on,
// places go around behind the first `sinks` of them; with sinks < 0 they do not exist, and a GPU writes nothing.
struct CacheParams {
    int64_t element_bytes, B, T, H, K, V;
    Rows k, v;               // [B, T, H, K], [B, T, H, V]
    Rows k_cache, v_cache;   // [B, capacity, H, ...], or pages [pages, page_size, H, ...]
    int32_t const* seqlens;  // [B], before the new tokens
    int32_t const* block_table = nullptr;  // [B, max_pages], nullable
    int64_t max_pages = 0, pages = 0, page_size = 0;
    int64_t capacity, sinks;
};

// Where position `at` of a sequence lies, -1: nowhere.
LSM_POLICY int64_t cache_place(CacheParams const& p, int64_t at) {
    if (at < 0) return -1;
    if (at < p.capacity) return at;
    return p.sinks < 0 ? -1 : p.sinks + (at - p.sinks) % (p.capacity - p.sinks);
}

// What a backend (cpu/, kernels/) provides to ops/kv_cache.cpp.
void kv_cache_update(CacheParams const& p, void* stream);

}  // namespace lsm
