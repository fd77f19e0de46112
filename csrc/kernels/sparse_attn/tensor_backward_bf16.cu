#include "kernels/sparse_attn/tensor.h"

namespace lsm::sparse_attn {

void backward_bf16(Work const& work, void* stream) {
    backward_with<bf16>(work, stream);
}

}  // namespace lsm::sparse_attn
