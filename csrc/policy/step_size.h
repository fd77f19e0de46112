// Mamba-2's step size of one token and head, for the steps on CPU and CUDA.
#pragma once

#include <cmath>

#include "policy/gate.h"

namespace lsm {

template <class T>
struct StepSize {
    T decay;   // of the state
    T weight;  // of what is written to it: dt
};

// dt has its bias; rate is A.
template <class T>
LSM_POLICY StepSize<T> step_size(T dt, T rate, bool softplus) {
    if constexpr (sizeof(T) == sizeof(float)) {
        float const size =
            softplus ? (dt > 0 ? dt : 0) + ::log1pf(::expf(-::fabsf(dt))) : float(dt);
        return {::expf(size * rate), size};
    } else {
        double const size = softplus ? (dt > 0 ? dt : 0) + ::log1p(::exp(-::fabs(dt))) : dt;
        return {::exp(size * rate), size};
    }
}

}  // namespace lsm
