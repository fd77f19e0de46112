// New tokens into a KV cache: check, fill the params, run. Compiled once per backend.
#include "params/kv_cache.h"

#include <torch/csrc/stable/library.h>

#include "ops/layout.h"

namespace lsm {
namespace {

// A cache of keys or of values, written in place.
void check_cache(Checks const& c, Tensor const& cache, char const* arg, bool paged,
                 Tensor const& rows, char const* rows_arg) {
    char const* const dims = paged ? "[pages, page_size, H, D]" : "[B, capacity, H, D]";
    c.rank(cache, arg, dims, 4);
    c.require(cache.size(2) == rows.size(2) && cache.size(3) == rows.size(3), arg,
              " must have H = ", rows.size(2), " heads of ", rows.size(3), " like ", rows_arg,
              ", got ", show(cache.sizes()));
    c.require(paged || cache.size(0) == rows.size(0), arg, " must have B = ", rows.size(0),
              " rows like ", rows_arg, ", got ", show(cache.sizes()));
    c.dtype(cache, arg, rows.scalar_type(), " like the new tokens");
    c.device(cache, arg, rows, rows_arg);
    c.require(cache.size(3) <= 1 || cache.stride(3) == 1, arg,
              " is updated in place and must be contiguous in its last dimension, got strides ",
              show(cache.strides()));
}

void check_places(Checks const& c, CacheParams const& p) {
    for (int64_t b = 0; b < p.B; ++b) {
        c.require(p.seqlens[b] >= 0, "cache_seqlens must not be negative, got ", p.seqlens[b],
                  " for sequence ", b);
        c.require(p.sinks >= 0 || p.seqlens[b] + p.T <= p.capacity,
                  "cache_seqlens and the T = ", p.T,
                  " new tokens must fit in the cache's capacity of ", p.capacity, ", got ",
                  p.seqlens[b], " for sequence ", b);
        for (int64_t t = 0; p.block_table != nullptr && t < p.T; ++t) {
            int64_t const i = cache_place(p, p.seqlens[b] + t) / p.page_size;
            int64_t const page = p.block_table[b * p.max_pages + i];
            c.require(page >= 0 && page < p.pages, "block_table must name pages in [0, ", p.pages,
                      "), got ", page, " for page ", i, " of sequence ", b);
        }
    }
}

void update(Tensor const& k_cache, Tensor const& v_cache, Tensor const& k, Tensor const& v,
            Tensor const& cache_seqlens, OptionalTensor const& block_table, int64_t ring_sinks) {
    Checks const c("kv_cache_update");
    bool const paged = block_table.has_value();
    c.rank(k, "k", "[B, T, H, K]", 4);
    check_floating(c, k, "k");
    c.rank(v, "v", "[B, T, H, V]", 4);
    c.require(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
              "v must have shape [B, T, H, V] with all but V like k = ", show(k.sizes()), ", got ",
              show(v.sizes()));
    c.dtype(v, "v", k.scalar_type(), " like k");
    c.device(v, "v", k, "k");
    check_cache(c, k_cache, "k_cache", paged, k, "k");
    check_cache(c, v_cache, "v_cache", paged, v, "v");
    c.require(v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1),
              "v_cache must have the places of k_cache = ", show(k_cache.sizes()), ", got ",
              show(v_cache.sizes()));
    c.shape(cache_seqlens, "cache_seqlens", "[B]", {k.size(0)});
    c.dtype(cache_seqlens, "cache_seqlens", ScalarType::Int);
    c.device(cache_seqlens, "cache_seqlens", k, "k");

    CacheParams p{};
    p.element_bytes = static_cast<int64_t>(k.element_size());
    p.B = k.size(0), p.T = k.size(1), p.H = k.size(2), p.K = k.size(3), p.V = v.size(3);
    p.sinks = ring_sinks, p.capacity = k_cache.size(1);
    Tensor const lengths = as_contiguous(cache_seqlens), keys = last_contiguous(k),
                 values = last_contiguous(v);
    OptionalTensor table;
    if (paged) {
        c.rank(*block_table, "block_table", "[B, max_pages]", 2);
        c.require(block_table->size(0) == p.B, "block_table must have B = ", p.B,
                  " rows like k, got ", block_table->size(0));
        c.dtype(*block_table, "block_table", ScalarType::Int);
        c.device(*block_table, "block_table", k, "k");
        table = as_contiguous(*block_table);
        p.block_table = static_cast<int32_t const*>(table->const_data_ptr());
        p.max_pages = table->size(1), p.pages = k_cache.size(0), p.page_size = k_cache.size(1);
        p.capacity = p.max_pages * p.page_size;
    }
    c.require(ring_sinks < p.capacity || ring_sinks <= 0,
              "ring_sinks must be below the cache's capacity of ", p.capacity, ", got ",
              ring_sinks);
    c.require(ring_sinks < 0 || p.capacity > 0, "a ring needs a capacity of at least 1, got 0");
    p.seqlens = static_cast<int32_t const*>(lengths.const_data_ptr());
    p.k = rows(keys), p.v = rows(values), p.k_cache = rows(k_cache), p.v_cache = rows(v_cache);
    if (checks_lists()) {
        Tensor const read_lengths = on_host(lengths);
        OptionalTensor const read_table = table ? OptionalTensor(on_host(*table)) : table;
        CacheParams read = p;
        read.seqlens = static_cast<int32_t const*>(read_lengths.const_data_ptr());
        if (table) read.block_table = static_cast<int32_t const*>(read_table->const_data_ptr());
        check_places(c, read);
    }
    DeviceScope const scope(k);
    kv_cache_update(p, scope.stream());
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("kv_cache_update", TORCH_BOX(&update));
}
