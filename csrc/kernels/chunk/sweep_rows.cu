#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_rows(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream) {
    switch (kind) {
        case SweepKind::output:
            return dispatch_sweep<SweepKind::output, DecayOn::rows>(p, segments, stream);
        case SweepKind::query_gradient:
            return dispatch_sweep<SweepKind::query_gradient, DecayOn::rows>(p, segments, stream);
        case SweepKind::key_gradient:
            return dispatch_sweep<SweepKind::key_gradient, DecayOn::rows>(p, segments, stream);
        default:
            throw std::logic_error("lsm: a sweep that is not compiled");
    }
}

}  // namespace lsm
