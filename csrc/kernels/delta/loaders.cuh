// How the delta engine's kernels on CUDA cores read g and beta; Params: DeltaParams or
// DeltaStepParams.
#pragma once

#include "kernels/policy/decay.cuh"
#include "params/delta.h"

namespace lsm::delta {

template <class T, class Params>
GateLoader<T> decay_loader(Params const& p) {
    return {p.g, p.decay == Decay::scalar ? 0 : 1, p.gate_dtype == Dtype::f32, kGate<LogGate>};
}

// Its values are used as they are.
template <class T, class Params>
GateLoader<T> beta_loader(Params const& p) {
    return {p.beta, p.beta_per_channel ? 1 : 0, p.beta_dtype == Dtype::f32, kGate<LogGate>};
}

}  // namespace lsm::delta
