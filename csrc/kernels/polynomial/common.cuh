// What the kernels of polynomial attention share: numbers of a type told at run time, and features of a row. Types
// matter only where rows enter and leave, all arithmetic is fp32, so kernels exist once for all of them.
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"

namespace lsm::polynomial {

LSM_DEVICE float load_number(void const* data, i64 at, Dtype type) {
    switch (type) {
        case Dtype::bf16:
            return static_cast<float>(load_global(static_cast<bf16 const*>(data) + at));
        case Dtype::f16:
            return static_cast<float>(load_global(static_cast<half const*>(data) + at));
        default:
            return load_global(static_cast<float const*>(data) + at);
    }
}

LSM_DEVICE void store_number(void* data, i64 at, Dtype type, float x) {
    switch (type) {
        case Dtype::bf16:
            return store_global(static_cast<bf16*>(data) + at, bf16(x));
        case Dtype::f16:
            return store_global(static_cast<half*>(data) + at, half(x));
        default:
            return store_global(static_cast<float*>(data) + at, x);
    }
}

// policy/features.h as kernels need it: n factors per row, the first a constant if there is one.
struct Basis {
    int n, constants;  // factors; 1 if the first is a constant of 1, else 0
    int pairs;         // features
    float pair_weight, diagonal_weight;

    Basis(Features features, int64_t channels)
        : n(static_cast<int>(factors_of(features, channels))),
          constants(static_cast<int>(factors_of(features, 0))),
          pairs(static_cast<int>(pairs_of(features, channels))),
          pair_weight(static_cast<float>(lsm::pair_weight(features))),
          diagonal_weight(static_cast<float>(lsm::diagonal_weight(features))) {}

    // Of the pair i <= j.
    LSM_DEVICE int feature(int i, int j) const { return i * n - i * (i - 1) / 2 + j - i; }
    LSM_DEVICE float weight(int i, int j) const {
        return i != j ? pair_weight : i < constants ? 1.f : diagonal_weight;
    }
};

// One feature; beyond the last pair, 0 of any row.
struct Pair {
    int i = 0, j = 0;
    float weight = 0.f;

    LSM_DEVICE Pair(Basis const& basis, int feature) {
        if (feature >= basis.pairs) return;
        while (feature >= basis.n - i) feature -= basis.n - i, ++i;
        j = i + feature;
        weight = basis.weight(i, j);
    }
    // Selected, so that no inf of a row's comes into a feature that is none.
    LSM_DEVICE float of(float const* factors) const {
        return weight == 0.f ? 0.f : weight * factors[i] * factors[j];
    }
};

LSM_DEVICE float inverse_of(float size, float eps) {
    return 1.f / (fabsf(size) + eps);
}

}  // namespace lsm::polynomial
