#include "kernels/selective/run.cuh"

namespace lsm::selective_kernel {

int64_t launch_complex(SelectiveParams const& p, Direction direction, void* workspace,
                       void* stream) {
    return launch_typed<float, Complex>(p, direction, workspace, stream);
}

}  // namespace lsm::selective_kernel
