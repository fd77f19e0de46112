// The kernels of the sparse attention engine that are in device files of their own, compiled in parallel.
#pragma once

#include "kernels/sparse_attn/geometry.cuh"

namespace lsm::sparse_attn {

inline dim3 query_grid(Work const& work) {
    return dim3(static_cast<unsigned>(work.p.B * work.p.Hkv * work.head_tiles * work.query_tiles));
}
inline dim3 key_grid(Work const& work) {
    int64_t const items =
        work.items != nullptr ? work.item_count : work.p.B * work.p.Hkv * work.inverse.sections;
    return dim3(static_cast<unsigned>(items * work.section_tiles));
}

void exact_forward(Work const& work, void* stream);
void exact_backward(Work const& work, void* stream);  // dq, dk, dv, parts of others
void forward_bf16(Work const& work, void* stream);
void forward_f16(Work const& work, void* stream);
// On warpgroups of a Hopper GPU; false if that is not for such tensors, and there is no result.
bool forward_bf16_sm90(Work const& work, void* stream);
bool forward_f16_sm90(Work const& work, void* stream);
bool backward_bf16_sm90(Work const& work, void* stream);
bool backward_f16_sm90(Work const& work, void* stream);
void backward_bf16(Work const& work, void* stream);
void backward_f16(Work const& work, void* stream);

}  // namespace lsm::sparse_attn
