// The convolution's entry points, and the decode step: a thread per channel of a row, whose state it reads and
// writes once.
#include "kernels/conv/launch.h"
#include "kernels/platform.cuh"

namespace lsm {
namespace conv {

constexpr int kStepThreads = 128, kStepTaps = 8;

template <class T>
__global__ void __launch_bounds__(kStepThreads) step_kernel(ConvStepParams const p, int tiles) {
    i64 const batch = blockIdx.x / static_cast<unsigned>(tiles);
    i64 const channel =
        static_cast<i64>(blockIdx.x % static_cast<unsigned>(tiles)) * kStepThreads + threadIdx.x;
    if (channel >= p.D) return;
    i64 const row = p.rows != nullptr ? p.rows[batch] : batch;
    T const* const x = static_cast<T const*>(p.x.data) + batch * p.x.batch + channel * p.x.channel;
    T* const y = static_cast<T*>(p.y.data) + batch * p.y.batch + channel * p.y.channel;
    if (row < 0) {
        for (i64 t = 0; t < p.T; ++t) store_global(y + t * p.y.time, T(0.f));
        return;
    }
    T* const state = static_cast<T*>(p.state) + row * p.state_row + channel * p.state_channel;
    i64 const seen = p.seen != nullptr ? p.seen[batch] : p.S;
    auto const column = [&](i64 position) {
        return (p.seen != nullptr ? (position % p.S + p.S) % p.S : position) * p.state_time;
    };
    auto const weight = [&](void const* from, i64 i) {
        return p.weight_dtype == Dtype::f32
                   ? load_global(static_cast<float const*>(from) + i)
                   : static_cast<float>(load_global(static_cast<T const*>(from) + i));
    };
    int const taps = static_cast<int>(p.W);
    float filter[kStepTaps], past[kStepTaps];  // by age
    LSM_UNROLL
    for (int a = 0; a < kStepTaps; ++a) {
        filter[a] = a < taps ? weight(p.weight, channel * taps + taps - 1 - a) : 0.f;
        past[a] =
            a > 0 && a < taps ? static_cast<float>(load_global(state + column(seen - a))) : 0.f;
    }
    float const bias = p.bias != nullptr ? weight(p.bias, channel) : 0.f;
    for (i64 t = 0; t < p.T; ++t) {
        past[0] = static_cast<float>(load_global(x + t * p.x.time));
        float sum = bias;
        LSM_UNROLL
        for (int a = 0; a < kStepTaps; ++a)
            if (a < taps) sum += filter[a] * past[a];
        float const out = p.silu ? sum / (1.f + exp2_approx(-1.44269504f * sum)) : sum;
        store_global(y + t * p.y.time, static_cast<T>(out));
        LSM_UNROLL
        for (int a = kStepTaps - 1; a > 0; --a) past[a] = past[a - 1];
    }
    if (p.seen != nullptr) {
        for (i64 t = 0; t < p.T; ++t)
            store_global(state + column(seen + t), load_global(x + t * p.x.time));
        return;
    }
    for (i64 s = 0; s < p.S; ++s) {
        i64 const after = s + p.T;
        T const value = after < p.S ? load_global(state + after * p.state_time)
                                    : load_global(x + (after - p.S) * p.x.time);
        store_global(state + s * p.state_time, value);
    }
}

template <class T>
void run_step(ConvStepParams const& p, void* stream) {
    i64 const tiles = (p.D + kStepThreads - 1) / kStepThreads;
    launch(step_kernel<T>, dim3(static_cast<unsigned>(p.B * tiles)), dim3(kStepThreads), 0, stream,
           p, static_cast<int>(tiles));
}

}  // namespace conv

int64_t conv_fwd_workspace(ConvParams const& p) {
    return p.x.channel_last() ? conv::workspace_channel_last(p, false)
                              : conv::workspace_channel_first(p, false);
}

int64_t conv_bwd_workspace(ConvParams const& p) {
    return p.x.channel_last() ? conv::workspace_channel_last(p, true)
                              : conv::workspace_channel_first(p, true);
}

void conv_fwd(ConvParams const& p, void* workspace, void* stream) {
    auto const run = p.x.channel_last() ? conv::run_channel_last : conv::run_channel_first;
    run(p, false, workspace, stream);
}

void conv_bwd(ConvParams const& p, void* workspace, void* stream) {
    auto const run = p.x.channel_last() ? conv::run_channel_last : conv::run_channel_first;
    run(p, true, workspace, stream);
}

void conv_step(ConvStepParams const& p, void* stream) {
    switch (p.dtype) {
        case Dtype::bf16:
            return conv::run_step<bf16>(p, stream);
        case Dtype::f16:
            return conv::run_step<half>(p, stream);
        default:
            return conv::run_step<float>(p, stream);
    }
}

}  // namespace lsm
