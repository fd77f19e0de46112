#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_output(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<SweepKind::output>(p, segments, stream);
}

}  // namespace lsm
