#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_weighted(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream) {
    switch (kind) {
        case SweepKind::output:
            return dispatch_sweep<SweepKind::output, DecayOn::whole, true>(p, segments, stream);
        case SweepKind::state:
            return dispatch_sweep<SweepKind::state, DecayOn::whole, true>(p, segments, stream);
        case SweepKind::query_gradient:
            return dispatch_sweep<SweepKind::query_gradient, DecayOn::whole, true>(p, segments,
                                                                                   stream);
        case SweepKind::key_gradient:
            return dispatch_sweep<SweepKind::key_gradient, DecayOn::whole, true>(p, segments,
                                                                                 stream);
    }
}

}  // namespace lsm
