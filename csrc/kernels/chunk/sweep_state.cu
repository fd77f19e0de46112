#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_state(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<SweepKind::state>(p, segments, stream);
}

}  // namespace lsm
