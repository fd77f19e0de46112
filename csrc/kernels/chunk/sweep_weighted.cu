#include "kernels/chunk/dispatch_sweep.cuh"

namespace lsm {

void sweep_weighted(SweepKind kind, SweepParams const& p, Segments const& segments, void* stream) {
    constexpr auto whole = DecayOn::whole;
    switch (kind) {
        case SweepKind::output:
            return dispatch_sweep<SweepKind::output, whole, Tokens::weighted>(p, segments, stream);
        case SweepKind::state:
            return dispatch_sweep<SweepKind::state, whole, Tokens::weighted>(p, segments, stream);
        case SweepKind::query_gradient:
            return dispatch_sweep<SweepKind::query_gradient, whole, Tokens::weighted>(p, segments,
                                                                                      stream);
        case SweepKind::key_gradient:
            return dispatch_sweep<SweepKind::key_gradient, whole, Tokens::weighted>(p, segments,
                                                                                    stream);
    }
}

}  // namespace lsm
