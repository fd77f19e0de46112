// mLSTM's gates of one token and head, for the steps on CPU and CUDA, and its stabiliser for whole
// sequences too. Where these are composed of other operators (lsm_cuda/ops/mlstm.py) it has the same
// limits.
#pragma once

#include <cmath>

#include "policy/gate.h"

namespace lsm {

struct InputGate {
    double decay;   // of the states
    double weight;  // of what is written to them
    double m;       // their logarithmic scale after the token, as it will be stored
    double least;   // what outputs are divided by at least
};

LSM_POLICY double sigmoid_of(double x) {
    return 1 / (1 + ::exp(-x));
}

// What m falls by and is raised to by a token. -inf forgets everything or writes nothing, and m stays
// a number.
LSM_POLICY double stabiliser_fall(double log_decay) {
    return log_decay < -3e4 ? -3e4 : log_decay;
}
LSM_POLICY double stabiliser_level(double i) {
    return i < -1e30 ? -1e4 : i;
}

// m after a token.
LSM_POLICY double next_stabiliser(double i, double log_decay, double m) {
    double const fallen = stabiliser_fall(log_decay) + m, level = stabiliser_level(i);
    return level > fallen ? level : fallen;
}

// i and f before their activation; m has the type it is kept in, and what it loses there is in the
// decay and the weight.
template <class T>
LSM_POLICY InputGate input_gate(double i, double f, T m, bool exponential) {
    if (!exponential) return {sigmoid_of(f), sigmoid_of(i), double(m), 1};
    double const log_decay = (f < 0 ? f : 0) - ::log1p(::exp(-::fabs(f)));
    double const next = double(T(next_stabiliser(i, log_decay, double(m))));
    return {::exp(log_decay + double(m) - next), ::exp(i - next), next, ::exp(-next)};
}

}  // namespace lsm
