// The selective scan's workspace and launches.
#pragma once

#include "kernels/carver.h"
#include "kernels/selective/backward.cuh"
#include "kernels/selective/forward.cuh"
#include "kernels/selective/launch.h"

namespace lsm::selective_kernel {

template <class K>
struct Launch {
    using N = typename K::N;
    SelectiveParams const& p;
    unsigned blocks_of_group;
    Segments plan;
    Scratch scratch;
    i64 bytes;

    // Lays the workspace out; with a null base it only counts its bytes.
    Launch(SelectiveParams const& p, Direction direction, void* base) : p(p) {
        blocks_of_group = static_cast<unsigned>((p.D / p.G + K::kChannels - 1) / K::kChannels);
        Carver carver(base);
        auto const floats = [&](i64 count) { return carver.take<float>(count); };
        plan = plan_segments(p, p.T, carver.take<char>(segments_bytes(p, p.T)));
        bool const rounds = p.S > K::kStates, back = direction == Direction::backward;
        if (rounds) scratch.y = floats(p.B * p.T * p.D);
        if (rounds && back) {
            scratch.ddt = floats(p.B * p.T * p.D), scratch.ddu = floats(p.B * p.T * p.D);
        }
        if (back) {
            i64 const tiles = p.cu_seqlens == nullptr ? p.N * ((p.T + K::kTile - 1) / K::kTile)
                                                      : p.T / K::kTile + p.N + 1;
            scratch.checkpoints = carver.take<N>(tiles * p.D * p.S);
            scratch.tokens = carver.take<N>(2 * i64(blocks_of_group) * p.G * p.B * p.T * p.S);
            scratch.channels = floats(2 * p.N * p.D);
            scratch.states = carver.take<N>((K::kChannelBC ? 3 : 1) * p.S * p.N * p.D);
        }
        bytes = carver.used();
    }

    template <class Kernel>
    void rounds(Kernel kernel, std::size_t shared, void* stream) const {
        if (plan.count == 0) return;
        build_segments(p, plan, stream);
        dim3 const grid(static_cast<unsigned>(plan.count * p.G) * blocks_of_group);
        for (int s0 = 0; s0 < p.S; s0 += K::kStates)
            launch(kernel, grid, dim3(kThreads), shared, stream, p, plan, blocks_of_group, s0,
                   scratch);
    }
    void forward(void* stream) const {
        rounds(selective_kernel::forward<K>, sizeof(typename K::Shared), stream);
    }
    void backward(void* stream) const {
        rounds(selective_kernel::backward<K>, sizeof(typename K::SharedBackward), stream);
        auto const blocks = [](i64 count) {
            return dim3(static_cast<unsigned>((count + 127) / 128));
        };
        auto const states = [&](int which) {
            return static_cast<N const*>(scratch.states) + which * p.S * p.N * p.D;
        };
        auto const sum_sequences = [&](auto const* shares, void* to, i64 count) {
            using Number = std::remove_cv_t<std::remove_pointer_t<decltype(shares)>>;
            if (to == nullptr) return;
            launch(add_sequences<Number>, blocks(count * p.D), dim3(128), 0, stream, p.N, p.D,
                   count, shares, static_cast<Number*>(to));
        };
        i64 const tokens = p.B * p.T * p.G * p.S;
        for (int which = 0; which < 2; ++which) {
            void* const to = which == 0 ? p.db : p.dc;
            if (which == 0 ? p.channel_B : p.channel_C) {
                sum_sequences(states(1 + which), to, p.S);
            } else if (tokens > 0) {
                i64 const first = which * i64(blocks_of_group) * p.G * p.B * p.T * p.S;
                launch(add_tokens<N>, blocks(tokens), dim3(128), 0, stream, p, i64(blocks_of_group),
                       static_cast<N const*>(scratch.tokens) + first, static_cast<N*>(to));
            }
        }
        sum_sequences(states(0), p.dA, p.S);
        sum_sequences(static_cast<float const*>(scratch.channels), p.dskip, 1);
        sum_sequences(static_cast<float const*>(scratch.channels) + p.N * p.D, p.ddt_bias, 1);
    }
};

template <class T, class N>
int64_t launch_typed(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    auto const run = [&](auto kind) -> int64_t {
        Launch<decltype(kind)> const launcher(p, direction, workspace);
        if (workspace == nullptr) return launcher.bytes;
        direction == Direction::forward ? launcher.forward(stream) : launcher.backward(stream);
        return 0;
    };
    bool const few = p.S <= 16;
    if constexpr (std::is_same_v<N, float>) {
        if (!p.channel_B && !p.channel_C)
            return few ? run(Kind<T, N, 4, false>{}) : run(Kind<T, N, 16, false>{});
    }
    return few ? run(Kind<T, N, 4, true>{}) : run(Kind<T, N, 16, true>{});
}

}  // namespace lsm::selective_kernel
