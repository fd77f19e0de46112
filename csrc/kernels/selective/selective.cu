// The selective scan has no CUDA kernel yet.
#include <stdexcept>

#include "params/selective_scan.h"

namespace lsm {
namespace {

[[noreturn]] void refuse() {
    throw std::runtime_error(
        "lsm::selective_scan: there is no CUDA kernel yet; it runs on CPU tensors");
}

}  // namespace

int64_t selective_fwd_workspace(SelectiveParams const&) {
    refuse();
}
int64_t selective_bwd_workspace(SelectiveParams const&) {
    refuse();
}
void selective_fwd(SelectiveParams const&, void*, void*) {
    refuse();
}
void selective_bwd(SelectiveParams const&, void*, void*) {
    refuse();
}

}  // namespace lsm
