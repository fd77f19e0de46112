#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_contraction(SweepKind kind, SweepParams const& p, Segments const& segments,
                       void* stream) {
    switch (kind) {
        case SweepKind::output:
            return dispatch_sweep<SweepKind::output, DecayOn::contraction>(p, segments, stream);
        case SweepKind::state:
            return dispatch_sweep<SweepKind::state, DecayOn::contraction>(p, segments, stream);
        default:
            throw std::logic_error("lsm: a sweep that is not compiled");
    }
}

}  // namespace lsm
