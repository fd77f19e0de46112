// How fast each channel of a state forgets, for kernels that decay element by element. What the
// numbers in a gate say is their policy's matter (policy/gate.h); here a number becomes a factor.
//
// One loader for every gate, so that kernels exist once: the channels of a vector lie side by side,
// those of a scalar are one value, and without a gate nothing is read. A gate has the dtype of the
// activations, T, or float32, told at run time. What a token brings to a channel is kept as the bits
// that were loaded, apart from the factor that the channel's state is multiplied with, so that a
// kernel can load early and pay for widening and exponential when the value has arrived.
// A factor of 0 resets a channel; there is no limit on the gate's size.
#pragma once

#include "kernels/platform.cuh"
#include "params/chunk.h"
#include "policy/gate.h"

namespace lsm {

template <class T>
struct GateLoader {
    Rows g;
    int channel_stride;  // 1, or 0: one gate for all channels
    bool is_fp32;        // else T
    int32_t policy;

    using Raw = u32;
    static constexpr Raw kIdentity = 0;  // 0 in either dtype: leaves the state as it is

    LSM_DEVICE i64 at(i64 batch, i64 time, i64 head, int channel) const {
        return batch * g.batch + time * g.time + head * g.head + i64(channel) * channel_stride;
    }

    LSM_DEVICE Raw load(i64 at) const {
        if (g.data == nullptr) return kIdentity;
        if (sizeof(T) == 4 || is_fp32) return load_global(static_cast<u32 const*>(g.data) + at);
        return load_global(static_cast<uint16_t const*>(g.data) + at);
    }

    LSM_DEVICE float value(Raw raw) const {
        if (sizeof(T) == 4 || is_fp32) return __uint_as_float(raw);
        uint16_t const bits = static_cast<uint16_t>(raw);
        return static_cast<float>(reinterpret_cast<T const&>(bits));
    }

    LSM_DEVICE float log_decay(Raw raw) const {
        float const x = value(raw);
        return with_gate(policy, [&](auto gate) { return gate.log_decay(x); });
    }

    // expf, not a fast approximation: thousands of these factors are multiplied into one state.
    LSM_DEVICE float factor(Raw raw) const { return expf(log_decay(raw)); }

    // log2 of the factor, for sums over many tokens.
    LSM_DEVICE float log2(Raw raw) const { return log_decay(raw) * 1.44269504f; }

    // The gradient of the number at `at` from that of the log decay.
    LSM_DEVICE float through(float gradient, i64 at) const {
        return with_gate(policy, [&](auto gate) {
            if constexpr (std::is_same_v<decltype(gate), LogGate>) {
                return gradient;
            } else {
                return gradient * gate.slope(value(load(at)));
            }
        });
    }

    // Rounds a gradient to the gate's dtype.
    LSM_DEVICE void store(void* dg, i64 at, float x) const {
        if (sizeof(T) == 4 || is_fp32) {
            store_global(static_cast<float*>(dg) + at, x);
        } else {
            store_global(static_cast<T*>(dg) + at, static_cast<T>(x));
        }
    }
};

// What decays a state along its rows (all of it alike, if its gate is a scalar) and along its
// columns.
template <class Side>
struct BySide {
    Side rows, columns;
};

// Gates of ChunkParams or StepParams, or what lies like them.
inline BySide<Rows> by_side(Decay decay, Rows const& g, Rows const& gv) {
    if (decay == Decay::value) return {{}, g};
    return {g, decay == Decay::both ? gv : Rows{}};
}

template <class T, class Params>
BySide<GateLoader<T>> gate_loaders(Params const& p) {
    BySide<Rows> const gates = by_side(p.decay, p.g, p.gv);
    auto const loader = [&](Rows const& g) {
        return GateLoader<T>{g, p.decay == Decay::scalar ? 0 : 1, p.gate_dtype == Dtype::f32,
                             p.gate};
    };
    return {loader(gates.rows), loader(gates.columns)};
}

}  // namespace lsm
