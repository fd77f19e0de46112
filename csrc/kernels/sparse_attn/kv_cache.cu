// New tokens into a cache: a warp for every token's head. What has no place, or no page, is not written.
#include "kernels/platform.cuh"
#include "params/kv_cache.h"

namespace lsm {
namespace kv_cache {

constexpr int kWarps = 4;

template <class Word>
LSM_DEVICE void copy_row(Rows const& from, Rows const& to, i64 b, i64 t, i64 h, i64 outer,
                         i64 inner, i64 columns) {
    Word const* const x =
        static_cast<Word const*>(from.data) + b * from.batch + t * from.time + h * from.head;
    Word* const y = static_cast<Word*>(to.data) + outer * to.batch + inner * to.time + h * to.head;
    for (i64 c = threadIdx.x % 32; c < columns; c += 32) store_global(y + c, load_global(x + c));
}

template <class Word>
__global__ void __launch_bounds__(kWarps * 32) update_kernel(CacheParams const p) {
    i64 const row = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= p.B * p.T * p.H) return;
    i64 const h = row % p.H, t = row / p.H % p.T, b = row / p.H / p.T;
    i64 const place = cache_place(p, static_cast<i64>(load_global(p.seqlens + b)) + t);
    if (place < 0) return;
    i64 outer = b, inner = place;
    if (p.block_table != nullptr) {
        outer = load_global(p.block_table + b * p.max_pages + place / p.page_size);
        inner = place % p.page_size;
        if (outer < 0 || outer >= p.pages) return;
    }
    copy_row<Word>(p.k, p.k_cache, b, t, h, outer, inner, p.K);
    copy_row<Word>(p.v, p.v_cache, b, t, h, outer, inner, p.V);
}

}  // namespace kv_cache

void kv_cache_update(CacheParams const& p, void* stream) {
    i64 const rows = p.B * p.T * p.H;
    if (rows == 0) return;
    auto const run = [&](auto kernel) {
        launch(kernel,
               dim3(static_cast<unsigned>((rows + kv_cache::kWarps - 1) / kv_cache::kWarps)),
               dim3(kv_cache::kWarps * 32), 0, stream, p);
    };
    if (p.element_bytes == 2) return run(kv_cache::update_kernel<uint16_t>);
    run(kv_cache::update_kernel<u32>);
}

}  // namespace lsm
