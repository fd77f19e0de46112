#include "kernels/sparse_attn/tensor.h"

namespace lsm::sparse_attn {

void forward_f16(Work const& work, void* stream) {
    forward_with<half>(work, stream);
}

}  // namespace lsm::sparse_attn
