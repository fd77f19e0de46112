#include "kernels/selective/run.cuh"

namespace lsm::selective_kernel {

int64_t launch_f16(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    return launch_typed<half, float>(p, direction, workspace, stream);
}

}  // namespace lsm::selective_kernel
