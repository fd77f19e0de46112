// The scan engine on CUDA: the element type's launcher (docs/kernels/scan.md).
#include "kernels/scan/launch.h"

namespace lsm {
namespace {

using scan_kernel::Direction;

int64_t launch_any(ScanParams const& p, Direction direction, void* workspace, void* stream) {
    if (p.is_complex) return scan_kernel::launch_complex(p, direction, workspace, stream);
    switch (p.dtype) {
        case Dtype::bf16:
            return scan_kernel::launch_bf16(p, direction, workspace, stream);
        case Dtype::f16:
            return scan_kernel::launch_f16(p, direction, workspace, stream);
        default:
            return scan_kernel::launch_f32(p, direction, workspace, stream);
    }
}

}  // namespace

// Never none: a null workspace asks for a size.
int64_t scan_fwd_workspace(ScanParams const& p) {
    return 256 + launch_any(p, Direction::forward, nullptr, nullptr);
}

int64_t scan_bwd_workspace(ScanParams const& p) {
    return 256 + launch_any(p, Direction::backward, nullptr, nullptr);
}

void scan_fwd(ScanParams const& p, void* workspace, void* stream) {
    launch_any(p, Direction::forward, workspace, stream);
}

void scan_bwd(ScanParams const& p, void* workspace, void* stream) {
    launch_any(p, Direction::backward, workspace, stream);
}

}  // namespace lsm
