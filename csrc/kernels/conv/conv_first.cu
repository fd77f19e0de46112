// The convolution's instances where tokens lie side by side.
#include "kernels/conv/launch.h"
#include "kernels/conv/run.cuh"

namespace lsm::conv {

int64_t workspace_channel_first(ConvParams const& p, bool backward) {
    return workspace_bytes<false>(p, backward);
}

void run_channel_first(ConvParams const& p, bool backward, void* workspace, void* stream) {
    run<false>(p, backward, workspace, stream);
}

}  // namespace lsm::conv
