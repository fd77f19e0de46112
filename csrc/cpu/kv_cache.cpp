// New tokens into a cache, on the CPU.
#include "params/kv_cache.h"

#include <cstring>

namespace lsm {

void kv_cache_update(CacheParams const& p, void*) {
    auto const copy = [&](Rows const& from, Rows const& to, int64_t b, int64_t t, int64_t page,
                          int64_t place, int64_t columns) {
        for (int64_t h = 0; h < p.H; ++h) {
            std::memcpy(static_cast<char*>(to.data) +
                            (page * to.batch + place * to.time + h * to.head) * p.element_bytes,
                        static_cast<char const*>(from.data) +
                            (b * from.batch + t * from.time + h * from.head) * p.element_bytes,
                        size_t(columns * p.element_bytes));
        }
    };
    for (int64_t b = 0; b < p.B; ++b) {
        for (int64_t t = 0; t < p.T; ++t) {
            int64_t const place = cache_place(p, p.seqlens[b] + t);
            int64_t const page =
                p.block_table != nullptr ? p.block_table[b * p.max_pages + place / p.page_size] : b;
            int64_t const inside = p.block_table != nullptr ? place % p.page_size : place;
            copy(p.k, p.k_cache, b, t, page, inside, p.K);
            copy(p.v, p.v_cache, b, t, page, inside, p.V);
        }
    }
}

}  // namespace lsm
