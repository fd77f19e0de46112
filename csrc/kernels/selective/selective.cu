// The selective scan on CUDA: the element type's launcher (docs/kernels/scan.md).
#include "kernels/selective/launch.h"

namespace lsm {
namespace {

using selective_kernel::Direction;

int64_t launch_any(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    if (p.is_complex) return selective_kernel::launch_complex(p, direction, workspace, stream);
    switch (p.dtype) {
        case Dtype::bf16:
            return selective_kernel::launch_bf16(p, direction, workspace, stream);
        case Dtype::f16:
            return selective_kernel::launch_f16(p, direction, workspace, stream);
        default:
            return selective_kernel::launch_f32(p, direction, workspace, stream);
    }
}

}  // namespace

// States before every tile: [tiles of all sequences][D][S].
int64_t selective_saved_states(SelectiveParams const& p) {
    int64_t const tile = selective_tile(p.is_complex);
    int64_t const tiles =
        p.cu_seqlens == nullptr ? p.N * ((p.T + tile - 1) / tile) : p.T / tile + p.N;
    return tiles * p.D * p.S;
}

// Never none: a null workspace asks for a size.
int64_t selective_fwd_workspace(SelectiveParams const& p) {
    return 256 + launch_any(p, Direction::forward, nullptr, nullptr);
}

int64_t selective_bwd_workspace(SelectiveParams const& p) {
    return 256 + launch_any(p, Direction::backward, nullptr, nullptr);
}

void selective_fwd(SelectiveParams const& p, void* workspace, void* stream) {
    launch_any(p, Direction::forward, workspace, stream);
}

void selective_bwd(SelectiveParams const& p, void* workspace, void* stream) {
    launch_any(p, Direction::backward, workspace, stream);
}

}  // namespace lsm
