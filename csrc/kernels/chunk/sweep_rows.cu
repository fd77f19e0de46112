#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_rows(SweepParams const& p, Segments const& segments, void* stream) {
    dispatch_sweep<DecaySide::rows, false>(p, segments, stream);
}

}  // namespace lsm
