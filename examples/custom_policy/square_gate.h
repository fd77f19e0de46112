// A gate policy from outside the tree: the decay of a token is exp(-x²), so that any real number is
// a gate and 0 forgets nothing. docs/adding_a_policy.md walks through it.
#pragma once

namespace lsm {

struct SquareGate {
    template <class X>
    LSM_POLICY static X log_decay(X x) {
        return -(x * x);
    }
    template <class X>
    LSM_POLICY static X slope(X x) {
        return -(x + x);
    }
};

using MoreGates = GatePolicies<SquareGate>;

}  // namespace lsm

// One row: gated linear attention, one such gate per key channel, read after the write.
#define LSM_MORE_OPERATORS                                    \
    {                                                         \
        {"square_gla", Decay::key, false, kGate<SquareGate>}, \
    }
