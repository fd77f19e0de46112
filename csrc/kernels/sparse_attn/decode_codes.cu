// Decode attention from a cache of codes: bits, dtype of queries, columns of v.
#include "kernels/dispatch.h"
#include "kernels/sparse_attn/decode.cuh"

namespace lsm::decode_attn {
namespace {

template <int Bits>
void run_bits(SparseAttnParams const& p, Plan const& plan, void* stream) {
    dispatch(Buckets<128, 512>{}, p.V, [&](auto V) {
        if (p.dtype == Dtype::bf16) return run<TensorMath<bf16, V>, Bits>(p, plan, stream);
        if (p.dtype == Dtype::f16) return run<TensorMath<half, V>, Bits>(p, plan, stream);
        run<FloatMath<V>, Bits>(p, plan, stream);
    });
}

}  // namespace

void run_codes(SparseAttnParams const& p, Plan const& plan, void* stream) {
    p.code_bits == 4 ? run_bits<4>(p, plan, stream) : run_bits<8>(p, plan, stream);
}

}  // namespace lsm::decode_attn
