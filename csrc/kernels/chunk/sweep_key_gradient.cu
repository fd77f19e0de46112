#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_key_gradient(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<SweepKind::key_gradient>(p, segments, stream);
}

}  // namespace lsm
