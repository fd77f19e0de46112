// A few tokens more of the short convolution, from its state (see conv_tier.h).
#pragma once

#include "conv_tile.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kStepTile = 32;  // channels

// One row of a batch of steps, a tile of channels at a time; the last W inputs as rows [W][kStepTile].
template <class T, class Element>
void step_row(ConvStepParams const& p, int64_t batch) {
    constexpr int64_t C = kStepTile;
    int64_t const row = p.rows != nullptr ? p.rows[batch] : batch, past = p.W - 1;
    int64_t const seen = p.seen != nullptr ? p.seen[batch] : p.S;
    // Where an input lies: positions count from the state's first column, or from the ring's first input.
    auto const column = [&](int64_t position) {
        return p.seen != nullptr ? (position % p.S + p.S) % p.S : position;
    };
    alignas(64) T inputs[kMaxTaps * C] = {}, weight[kMaxTaps * C], bias[C] = {}, sum[C];
    for (int64_t first = 0; first < p.D; first += C) {
        int64_t const channels = min_of(C, p.D - first);
        Element const* const x =
            static_cast<Element const*>(p.x.data) + batch * p.x.batch + first * p.x.channel;
        Element* const y =
            static_cast<Element*>(p.y.data) + batch * p.y.batch + first * p.y.channel;
        if (row < 0) {
            for (int64_t t = 0; t < p.T; ++t)
                for (int64_t c = 0; c < channels; ++c)
                    y[t * p.y.time + c * p.y.channel] = Element{};
            continue;
        }
        Element* const state =
            static_cast<Element*>(p.state) + row * p.state_row + first * p.state_channel;
        read_columns(weight, element_at(p.weight, p.weight_dtype, first * p.W), p.weight_dtype, p.W,
                     channels, C);
        if (p.bias != nullptr)
            read_columns(bias, element_at(p.bias, p.weight_dtype, first), p.weight_dtype, 1,
                         channels, C);
        for (int64_t i = 0; i < past; ++i) {
            Element const* const from = state + column(seen - past + i) * p.state_time;
            for (int64_t c = 0; c < channels; ++c)
                inputs[i * C + c] = number(from + c * p.state_channel);
        }
        for (int64_t t = 0; t < p.T; ++t) {
            for (int64_t c = 0; c < channels; ++c)
                inputs[past * C + c] = number(x + t * p.x.time + c * p.x.channel);
            for (int64_t c = 0; c < C; c += kLanes<T>) {
                Vector<T> pre = load(bias + c);
                for (int64_t j = 0; j < p.W; ++j) {
                    Vector<T> const input = load(inputs + j * C + c);
                    if (j > 0) store(inputs + (j - 1) * C + c, input);
                    pre += load(weight + j * C + c) * input;
                }
                store(sum + c, p.silu ? pre * logistic<Element>(pre) : pre);
            }
            Element out[C];
            for (int64_t c = 0; c < C; c += kLanes<T>) narrow(out + c, load(sum + c));
            for (int64_t c = 0; c < channels; ++c) y[t * p.y.time + c * p.y.channel] = out[c];
        }
        for (int64_t c = 0; c < channels; ++c) {
            Element* const to = state + c * p.state_channel;
            Element const* const from = x + c * p.x.channel;
            if (p.seen != nullptr) {
                for (int64_t t = 0; t < p.T; ++t)
                    to[column(seen + t) * p.state_time] = from[t * p.x.time];
            } else {
                for (int64_t s = 0; s < p.S; ++s) {
                    int64_t const after = s + p.T;
                    to[s * p.state_time] =
                        after < p.S ? to[after * p.state_time] : from[(after - p.S) * p.x.time];
                }
            }
        }
    }
}

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
