// Sparse attention on the CPU: decode from a cache, and the merge of partial results.
#include <stdexcept>

#include "params/sparse_attn.h"

namespace lsm {

int64_t sparse_attn_decode_workspace(SparseAttnParams const&) {
    return 0;
}

void sparse_attn_decode(SparseAttnParams const&, void*, void*) {
    throw std::runtime_error("lsm::sparse_attn_decode: no CPU kernel yet");
}

void merge_attn_states(MergeParams const&, void*) {
    throw std::runtime_error("lsm::merge_attn_states: no CPU kernel yet");
}

}  // namespace lsm
