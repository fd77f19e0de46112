#include "kernels/scan/instances.cuh"

namespace lsm::scan_kernel {

int64_t launch_f32(ScanParams const& p, Direction direction, void* workspace, void* stream) {
    return launch_typed<float>(p, direction, workspace, stream);
}

}  // namespace lsm::scan_kernel
