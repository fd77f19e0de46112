// Sparse attention on the CPU.
#include "params/sparse_attn.h"

#include <stdexcept>

namespace lsm {

int64_t sparse_attn_fwd_workspace(SparseAttnParams const&) {
    return 0;
}
int64_t sparse_attn_bwd_workspace(SparseAttnParams const&) {
    return 0;
}

void sparse_attn_fwd(SparseAttnParams const&, void*, void*) {
    throw std::runtime_error("lsm::block_sparse_attn_fwd: no CPU kernel yet");
}

void sparse_attn_bwd(SparseAttnParams const&, void*, void*) {
    throw std::runtime_error("lsm::block_sparse_attn_bwd: no CPU kernel yet");
}

}  // namespace lsm
