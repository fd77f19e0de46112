// Parts of one softmax over separate sets of keys, merged in their order, and the gradient of that. A warp has one row:
// a token's head. Sums over parts and columns have one order, whatever else is in the call.
#include "kernels/warp.cuh"
#include "params/sparse_attn.h"

namespace lsm {
namespace merge_attn {

constexpr int kWarps = 4, kColumns = 4;  // columns of a lane at a time

// Where a row's numbers lie.
struct Row {
    i64 index, b, t, h, lse_stride, value_stride, lse_at;

    LSM_DEVICE Row(MergeParams const& p, i64 row)
        : index(row),
          b(row / p.H / p.T),
          t(row / p.H % p.T),
          h(row % p.H),
          lse_stride(p.B * p.H * p.T),
          value_stride(p.B * p.T * p.H * p.V),
          lse_at((b * p.H + h) * p.T + t) {}

    LSM_DEVICE float lse(MergeParams const& p, i64 part) const {
        return load_global(static_cast<float const*>(p.lse_parts) + part * lse_stride + lse_at);
    }
    template <class T>
    LSM_DEVICE T* of(Rows const& x) const {
        return static_cast<T*>(x.data) + b * x.batch + t * x.time + h * x.head;
    }
};

LSM_DEVICE i64 this_row() {
    return static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32;
}

template <class Part, class T>
__global__ void __launch_bounds__(kWarps * 32) merge_kernel(MergeParams const p) {
    if (this_row() >= p.B * p.T * p.H) return;
    Row const row(p, this_row());
    int const lane = threadIdx.x % 32, V = static_cast<int>(p.V);
    float const sink = p.sink_logits != nullptr
                           ? load_global(static_cast<float const*>(p.sink_logits) + row.h)
                           : -INFINITY;
    float top = sink;
    bool some = sink != -INFINITY;  // of which NaN is one too
    for (i64 i = lane; i < p.parts; i += 32) {
        float const lse = row.lse(p, i);
        top = fmaxf(top, lse), some |= lse != -INFINITY;
    }
    top = warp_max(top);
    bool const empty = !__any_sync(0xffffffffu, some);
    float sum = 0.f;
    for (i64 i = lane; i < p.parts; i += 32) sum += empty ? 0.f : expf(row.lse(p, i) - top);
    sum = warp_sum(sum) + (empty ? 0.f : expf(sink - top));
    if (lane == 0)
        store_global(static_cast<float*>(p.lse) + row.lse_at, empty ? -INFINITY : top + logf(sum));

    Part const* const values = static_cast<Part const*>(p.o_parts) + row.index * p.V;
    T* const o = row.of<T>(p.o);
    for (int first = lane; first < V; first += 32 * kColumns) {
        float y[kColumns] = {};
        for (i64 i = 0; i < p.parts; ++i) {
            float const lse = row.lse(p, i);
            if (lse == -INFINITY) continue;
            float const weight = expf(lse - top) / sum;
            LSM_UNROLL
            for (int n = 0; n < kColumns; ++n) {
                int const c = first + 32 * n;
                if (c < V)
                    y[n] +=
                        weight * static_cast<float>(load_global(values + i * row.value_stride + c));
            }
        }
        LSM_UNROLL
        for (int n = 0; n < kColumns; ++n) {
            int const c = first + 32 * n;
            if (c < V) store_global(o + c, static_cast<T>(y[n]));
        }
    }
}

// do_i = w_i do;  dlse_i = w_i (do . (o_i - o) + dlse)
template <class T>
__global__ void __launch_bounds__(kWarps * 32) merge_bwd_kernel(MergeParams const p) {
    if (this_row() >= p.B * p.T * p.H) return;
    Row const row(p, this_row());
    int const lane = threadIdx.x % 32, V = static_cast<int>(p.V);
    float const lse = load_global(static_cast<float const*>(p.lse) + row.lse_at);
    float const dlse = p.grad_lse != nullptr
                           ? load_global(static_cast<float const*>(p.grad_lse) + row.lse_at)
                           : 0.f;
    T const *const o = row.of<T>(p.o), *const grad = row.of<T>(p.grad_o);
    for (i64 i = 0; i < p.parts; ++i) {
        float const own = row.lse(p, i);
        bool const empty = own == -INFINITY;
        float const weight = empty ? 0.f : expf(own - lse);
        i64 const at = i * row.value_stride + row.index * p.V;
        float product = 0.f;
        for (int c = lane; c < V; c += 32) {
            float const g = static_cast<float>(load_global(grad + c));
            if (!empty)
                product +=
                    g *
                    (static_cast<float>(load_global(static_cast<T const*>(p.o_parts) + at + c)) -
                     static_cast<float>(load_global(o + c)));
            store_global(static_cast<T*>(p.do_parts) + at + c, static_cast<T>(weight * g));
        }
        product = warp_sum(product);
        if (lane == 0)
            store_global(static_cast<float*>(p.dlse_parts) + i * row.lse_stride + row.lse_at,
                         empty ? 0.f : weight * (product + dlse));
    }
}

template <class Kernel>
void run(Kernel kernel, MergeParams const& p, void* stream) {
    i64 const rows = p.B * p.T * p.H;
    if (rows == 0) return;
    launch(kernel, dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), dim3(kWarps * 32), 0,
           stream, p);
}

template <class T>
void merge_typed(MergeParams const& p, void* stream) {
    if (p.part_dtype == Dtype::f32) return run(merge_kernel<float, T>, p, stream);
    run(merge_kernel<T, T>, p, stream);
}

}  // namespace merge_attn

void merge_attn_states(MergeParams const& p, void* stream) {
    switch (p.dtype) {
        case Dtype::bf16:
            return merge_attn::merge_typed<bf16>(p, stream);
        case Dtype::f16:
            return merge_attn::merge_typed<half>(p, stream);
        default:
            return merge_attn::merge_typed<float>(p, stream);
    }
}

void merge_attn_states_bwd(MergeParams const& p, void* stream) {
    switch (p.dtype) {
        case Dtype::bf16:
            return merge_attn::run(merge_attn::merge_bwd_kernel<bf16>, p, stream);
        case Dtype::f16:
            return merge_attn::run(merge_attn::merge_bwd_kernel<half>, p, stream);
        default:
            return merge_attn::run(merge_attn::merge_bwd_kernel<float>, p, stream);
    }
}

}  // namespace lsm
