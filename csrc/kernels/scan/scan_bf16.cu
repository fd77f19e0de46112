#include "kernels/scan/instances.cuh"

namespace lsm::scan_kernel {

int64_t launch_bf16(ScanParams const& p, Direction direction, void* workspace, void* stream) {
    return launch_typed<bf16>(p, direction, workspace, stream);
}

}  // namespace lsm::scan_kernel
