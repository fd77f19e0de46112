#include "kernels/scan/instances.cuh"

namespace lsm::scan_kernel {

int64_t launch_f16(ScanParams const& p, Direction direction, void* workspace, void* stream) {
    return launch_typed<half>(p, direction, workspace, stream);
}

}  // namespace lsm::scan_kernel
