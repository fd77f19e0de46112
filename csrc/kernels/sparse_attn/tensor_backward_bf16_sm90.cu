#include "kernels/sparse_attn/tensor_keys_sm90.cuh"
#include "kernels/sparse_attn/tensor_rows_sm90.cuh"

namespace lsm::sparse_attn {

bool backward_bf16_sm90(Work const& work, void* stream) {
    return keys_on_warpgroups<bf16>(work, stream) && rows_on_warpgroups<bf16, true>(work, stream);
}

}  // namespace lsm::sparse_attn
