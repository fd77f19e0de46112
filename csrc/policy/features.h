// What states are made of, and read by, where it is not q and k themselves: all products of two of
// their channels, so that one feature's product with another's is a polynomial of s = q · k. Between
// two tokens at hand that polynomial is computed of s; only states need the products.
#pragma once

#include <cstdint>

namespace lsm {

enum class Features : int32_t {
    none,     // s: channels as they are
    taylor,   // 1 + s + s² / 2: products of (1, x)   Based
    squares,  // s²                                   ReBased
};

// Channels that are multiplied: a constant of 1 comes first in a Taylor polynomial.
inline int64_t factors_of(Features features, int64_t channels) {
    return features == Features::taylor ? channels + 1 : channels;
}

// Feature m is w x_i x_j, pairs i <= j in order of rows; w is pair_weight, for i = j
// diagonal_weight, and 1 for the constant alone.
inline double pair_weight(Features features) {
    return features == Features::taylor ? 1 : 1.41421356237309504880;
}
inline double diagonal_weight(Features features) {
    return features == Features::taylor ? 0.70710678118654752440 : 1;
}

inline int64_t pairs_of(Features features, int64_t channels) {
    int64_t const n = factors_of(features, channels);
    return n * (n + 1) / 2;
}

// Rows of a state. What there is beyond the pairs is 0: features are cut into equal parts of a
// multiple of 8, at most 256, as CUDA's kernels like them.
inline int64_t features_of(Features features, int64_t channels) {
    if (features == Features::none) return channels;
    int64_t const pairs = pairs_of(features, channels), parts = (pairs + 255) / 256;
    return 8 * parts * ((pairs + 8 * parts - 1) / (8 * parts));
}

}  // namespace lsm
