// One instruction set's table of the delta engine (see chunk_tier.h).
#pragma once

#include "delta_backward.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// run(Pass{p, task, scratch}) with the pass of the dtype, the transition and the decay at hand.
template <template <class T, class Rule> class Pass, class Run>
auto with_delta_pass(DeltaParams const& p, DeltaTask const& task, void* scratch, Run const& run) {
    auto const with_rule = [&](auto zero, auto decays) {
        using T = decltype(zero);
        constexpr bool kDecays = decltype(decays)::value;
        switch (p.transition) {
            case Transition::householder:
                return run(Pass<T, DeltaRule<Transition::householder, kDecays>>(p, task, scratch));
            case Transition::comba:
                return run(Pass<T, DeltaRule<Transition::comba, kDecays>>(p, task, scratch));
            default:
                return run(Pass<T, DeltaRule<Transition::dplr, kDecays>>(p, task, scratch));
        }
    };
    auto const with_type = [&](auto zero) {
        return p.decay == Decay::none ? with_rule(zero, std::false_type{})
                                      : with_rule(zero, std::true_type{});
    };
    return with_accumulator(p.dtype, with_type);
}

int64_t delta_scratch_bytes(DeltaParams const& p, int64_t tokens, int64_t columns, bool backward) {
    DeltaTask task{};
    task.end = tokens, task.v_end = columns;
    auto const bytes = [](auto&& pass) { return pass.scratch_bytes(); };
    return backward ? with_delta_pass<DeltaBackward>(p, task, nullptr, bytes)
                    : with_delta_pass<DeltaForward>(p, task, nullptr, bytes);
}

void delta_forward(DeltaParams const& p, DeltaTask const& task, void* scratch) {
    with_delta_pass<DeltaForward>(p, task, scratch, [](auto&& pass) { pass.run(); });
}

void delta_backward(DeltaParams const& p, DeltaTask const& task, void* scratch) {
    with_delta_pass<DeltaBackward>(p, task, scratch, [](auto&& pass) { pass.run(); });
}

}  // namespace

constinit DeltaKernels const delta_kernels{delta_scratch_bytes, delta_forward, delta_backward};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
