#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_contraction(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<DecaySide::contraction, false>(p, segments, stream);
}

}  // namespace lsm
