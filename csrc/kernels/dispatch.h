// Runtime value -> compile-time value. What a launcher lists here is exactly what gets compiled.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "params/chunk.h"

namespace lsm {

template <int... Values>
struct Buckets {};

// Calls f(integral_constant<int, b>) with the smallest bucket b >= n.
template <int First, int... Rest, class F>
void dispatch(Buckets<First, Rest...>, int64_t n, F const& f) {
    if (n <= First) return f(std::integral_constant<int, First>{});
    if constexpr (sizeof...(Rest) > 0) return dispatch(Buckets<Rest...>{}, n, f);
    throw std::logic_error("lsm: a size beyond the checked maximum reached a launcher");
}

}  // namespace lsm
