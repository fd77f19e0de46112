// Sums whose terms are weighted by exponentials: two are merged on the scale of the larger, without overflow. Logarithms
// are to base 2 in here.
#pragma once

#include "kernels/platform.cuh"

namespace lsm::scan_kernel {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// Two logarithms, on the scale of the larger one. Equal ones, -inf too, weigh 1.
struct Weights {
    float scale, first, second;
};
LSM_DEVICE Weights weigh(float a, float b) {
    float const d = a - b, small = a == b ? 1.f : exp2_approx(-fabsf(d));
    return d >= 0.f ? Weights{a, 1.f, small} : Weights{b, small, 1.f};
}

}  // namespace lsm::scan_kernel
