// The instances of a sweep: contraction buckets x row tiles.
#pragma once

#include "kernels/chunk/launch.h"
#include "kernels/chunk/sweep.cuh"
#include "kernels/dispatch.h"

namespace lsm {

template <SweepKind Kind, DecayOn On, Tokens Have = Tokens::plain>
void dispatch_sweep(SweepParams const& p, Segments const& segments, void* stream) {
    bool const half_tile = sweep_row_tile(p.contraction, p.rows) == 64;
    dispatch(Buckets<64, 128, 256>{}, p.contraction, [&](auto contraction) {
        if constexpr (contraction <= 128) {
            if (!half_tile)
                return run_sweep<Sweep<SweepConfig<contraction, 32, Kind, On, Have>>>(p, segments,
                                                                                      stream);
        }
        run_sweep<Sweep<SweepConfig<contraction, 16, Kind, On, Have>>>(p, segments, stream);
    });
}

}  // namespace lsm
