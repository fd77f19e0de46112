#include "kernels/sparse_attn/tensor_rows_sm90.cuh"

namespace lsm::sparse_attn {

bool forward_bf16_sm90(Work const& work, void* stream) {
    return rows_on_warpgroups<bf16, false>(work, stream);
}

}  // namespace lsm::sparse_attn
