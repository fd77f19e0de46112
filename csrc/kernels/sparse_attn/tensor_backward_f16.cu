#include "kernels/sparse_attn/tensor.h"

namespace lsm::sparse_attn {

void backward_f16(Work const& work, void* stream) {
    backward_with<half>(work, stream);
}

}  // namespace lsm::sparse_attn
