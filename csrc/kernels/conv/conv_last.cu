// The convolution's instances where channels lie side by side.
#include "kernels/conv/launch.h"
#include "kernels/conv/run.cuh"

namespace lsm::conv {

int64_t workspace_channel_last(ConvParams const& p, bool backward) {
    return workspace_bytes<true>(p, backward);
}

void run_channel_last(ConvParams const& p, bool backward, void* workspace, void* stream) {
    run<true>(p, backward, workspace, stream);
}

}  // namespace lsm::conv
