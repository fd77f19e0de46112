#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_query_gradient(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<SweepKind::query_gradient>(p, segments, stream);
}

}  // namespace lsm
