#include "kernels/selective/run.cuh"

namespace lsm::selective_kernel {

int64_t launch_f32(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    return launch_typed<float, float>(p, direction, workspace, stream);
}

}  // namespace lsm::selective_kernel
