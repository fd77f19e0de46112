// Sparse attention on the GPU: forward and backward.
#include <stdexcept>

#include "params/sparse_attn.h"

namespace lsm {

int64_t sparse_attn_fwd_workspace(SparseAttnParams const&) {
    return 0;
}
int64_t sparse_attn_bwd_workspace(SparseAttnParams const&) {
    return 0;
}

void sparse_attn_fwd(SparseAttnParams const&, void*, void*) {
    throw std::runtime_error("lsm::block_sparse_attn_fwd: no CUDA kernel yet");
}

void sparse_attn_bwd(SparseAttnParams const&, void*, void*) {
    throw std::runtime_error("lsm::block_sparse_attn_bwd: no CUDA kernel yet");
}

}  // namespace lsm
