// Gate policies: what a number x in a gate says of the decay a of its token, for every kernel of the
// chunk engine, on CPU and CUDA. A policy is a struct of functions, written once for floats and for
// the CPU's vectors of them:
//   log_decay(x)   log a, natural, at most 0; log_decay(0) = 0, since a token or a channel that is
//                  not there has the gate 0
//   slope(x)       its derivative, which brings the gradient of log a to that of x
// Adding one: docs/adding_a_policy.md.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LSM_POLICY __host__ __device__ __forceinline__
#else
#define LSM_POLICY inline __attribute__((always_inline))
#endif

namespace lsm {

// x is log a itself, its slope 1. Tensor cores take these gates; on CUDA any other goes through the
// exact recurrence.
struct LogGate {
    template <class X>
    LSM_POLICY static X log_decay(X x) {
        return x;
    }
};

template <class... Policies>
struct GatePolicies {};

}  // namespace lsm

// Policies and operators from outside the tree: a header that defines what is empty here.
#ifdef LSM_MORE_POLICIES
#include LSM_MORE_POLICIES
#else
namespace lsm {
using MoreGates = GatePolicies<>;
}
#endif

namespace lsm {

template <class... Ours, class... More>
GatePolicies<Ours..., More...> operator+(GatePolicies<Ours...>, GatePolicies<More...>);

using GateList = decltype(GatePolicies<LogGate>{} + MoreGates{});

// The place of a policy in GateList, which is how params name it.
template <class Policy, class... Policies>
constexpr int32_t index_of(GatePolicies<Policies...>) {
    int32_t i = 0;
    bool found = false;
    ((found = found || std::is_same_v<Policy, Policies>, i += !found), ...);
    return i;
}
template <class Policy>
inline constexpr int32_t kGate = index_of<Policy>(GateList{});

// f(Policy{}) with the policy at place i; with one policy, no branch.
template <class F, class First, class... Rest>
LSM_POLICY decltype(auto) with_policy(GatePolicies<First, Rest...>, int32_t i, F const& f) {
    if constexpr (sizeof...(Rest) > 0) {
        if (i != 0) return with_policy(GatePolicies<Rest...>{}, i - 1, f);
    }
    return f(First{});
}
template <class F>
LSM_POLICY decltype(auto) with_gate(int32_t i, F const& f) {
    return with_policy(GateList{}, i, f);
}

}  // namespace lsm
