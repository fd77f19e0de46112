// How fast each channel of a state forgets, for kernels that decay element by element.
//
// A policy names the raw value that one token brings to one channel and how it becomes the factor a
// that the channel's row of the state is multiplied with. The two are apart so that a kernel can
// load early and pay for the exponential when the value has arrived. exp(-inf) = 0 resets a row;
// there is no limit on the gate's size.
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"

namespace lsm {

// a_t[c] = exp(g_t[c]), g: [B, T, HV, K], natural log.
template <class Gate>
struct VectorDecay {
    using Raw = Gate;
    Rows g;

    LSM_DEVICE static Raw identity() { return static_cast<Raw>(0.f); }  // leaves the state as it is

    LSM_DEVICE Raw load(i64 batch, i64 time, i64 head, int channel) const {
        i64 const row = batch * g.batch + time * g.time + head * g.head;
        return load_global(static_cast<Gate const*>(g.data) + row + channel);
    }

    // expf, not a fast approximation: thousands of these factors are multiplied into one state.
    LSM_DEVICE static float factor(Raw raw) { return expf(static_cast<float>(raw)); }

    // log2 of the factor, for sums over many tokens.
    LSM_DEVICE static float log2(Raw raw) { return static_cast<float>(raw) * 1.44269504f; }
};

}  // namespace lsm
