// The selective scan's workspace and launches.
#pragma once

#include "kernels/carver.h"
#include "kernels/selective/backward.cuh"
#include "kernels/selective/forward.cuh"
#include "kernels/selective/launch.h"

namespace lsm::selective_kernel {

// Whether pieces are aligned in all tensors that lie as u does.
template <class K>
bool are_aligned(SelectiveParams const& p) {
    for (Rows const& r : {p.u, p.dt, p.z, p.y, p.grad_y, p.du, p.ddt, p.dz}) {
        if (K::kFirst && r.time != 1) continue;
        if (reinterpret_cast<std::uintptr_t>(r.data) % 16 != 0 || r.batch % K::kVector != 0 ||
            (K::kFirst ? r.head : r.time) % K::kVector != 0)
            return false;
    }
    return true;
}

// Tokens of a segment whose tensors are still in the second-level cache when its block reads them again, while all
// multiprocessors walk segments: 41 MiB for 512 threads on each that an H200 has.
template <class K>
i64 longest_segment(i64 states) {
    i64 const bytes = 640 * K::kThreads;
    i64 const token = 4 * K::kChannels * static_cast<i64>(sizeof(typename K::T)) +
                      2 * states * static_cast<i64>(sizeof(typename K::TokenNumber));
    i64 const tiles = bytes / token / K::kTile;
    return (tiles > 4 ? tiles : 4) * K::kTile;
}

template <class K>
struct Launch {
    using N = typename K::N;
    SelectiveParams const& p;
    bool const back;
    unsigned blocks_of_group;
    Segments plan;
    Scratch scratch;
    i64 bytes;

    // Lays the workspace out; with a null base it only counts its bytes.
    Launch(SelectiveParams const& p, Direction direction, void* base)
        : p(p), back(direction == Direction::backward) {
        blocks_of_group = static_cast<unsigned>((p.D / p.G + K::kChannels - 1) / K::kChannels);
        i64 const blocks = blocks_of_group * p.G;
        // 512 threads a multiprocessor; cutting costs a second walk over the inputs of states.
        i64 const slots = 512 / K::kThreads * multiprocessors();
        i64 const fills = segment_length(p.T, p.N * blocks, slots, 8 * K::kTile);
        i64 const most = longest_segment<K>(p.S);
        i64 const L = fills < p.T && fills > most ? most : fills;
        Carver carver(base);
        auto const floats = [&](i64 count) { return carver.take<float>(count); };
        plan = plan_segments(p, L, carver.take<char>(segments_bytes(p, L)));
        bool const rounds = p.S > K::kStates;
        i64 const numbers = plan.count * p.D * p.S;
        if (L < p.T) {
            scratch.chain = Chain(carver, plan.count * blocks, (p.S + K::kStates - 1) / K::kStates);
            scratch.ends = carver.take<N>(numbers);
        }
        if (rounds && back) {
            for (float** sums : {&scratch.y, &scratch.ddt, &scratch.ddu})
                *sums = floats(p.B * p.T * p.D);
        }
        if (rounds && !back) scratch.walked = carver.take<N>(numbers);
        if (back) {
            scratch.tokens = carver.take<N>(2 * blocks * p.B * p.T * p.S);
            scratch.channels = floats(2 * plan.count * p.D);
            scratch.states = carver.take<N>((K::kChannelBC ? 3 : 1) * numbers);
        }
        bytes = carver.used();
        scratch.pieces = (p.D / p.G % K::kVector == 0 || p.G == 1) && are_aligned<K>(p);
    }

    dim3 grid() const { return dim3(static_cast<unsigned>(plan.count * p.G) * blocks_of_group); }
    static dim3 threads(i64 count) { return dim3(static_cast<unsigned>((count + 127) / 128)); }

    void forward(void* stream) const {
        if (plan.count == 0) return;
        build_segments(p, plan, stream);
        scratch.chain.reset(stream);
        launch(selective_kernel::forward<K>, grid(), dim3(K::kThreads), sizeof(typename K::Shared),
               stream, p, plan, blocks_of_group, scratch);
    }
    void backward(void* stream) const {
        if (plan.count > 0) {
            build_segments(p, plan, stream);
            scratch.chain.reset(stream);
            for (int s0 = 0; s0 < p.S; s0 += K::kStates)
                launch(selective_kernel::backward<K>, grid(), dim3(K::kThreads),
                       sizeof(typename K::SharedBackward), stream, p, plan, blocks_of_group, s0,
                       scratch);
        }
        auto const states = [&](int which) {
            return static_cast<N const*>(scratch.states) + which * plan.count * p.D * p.S;
        };
        auto const sum_segments = [&](auto const* shares, void* to, i64 count) {
            using Number = std::remove_cv_t<std::remove_pointer_t<decltype(shares)>>;
            if (to == nullptr) return;
            launch(add_segments<Number>, threads(count * p.D), dim3(128), 0, stream, plan, p.D,
                   count, shares, static_cast<Number*>(to));
        };
        i64 const tokens = p.B * p.T * p.G * p.S;
        for (int which = 0; which < 2; ++which) {  // dC, then dB
            void* const to = which == 0 ? p.dc : p.db;
            if (which == 0 ? p.channel_C : p.channel_B) {
                sum_segments(states(2 - which), to, p.S);
            } else if (tokens > 0) {
                i64 const first = which * i64(blocks_of_group) * p.G * p.B * p.T * p.S;
                launch(add_tokens<N>, threads(tokens), dim3(128), 0, stream, p,
                       i64(blocks_of_group), static_cast<N const*>(scratch.tokens) + first,
                       static_cast<N*>(to));
            }
        }
        sum_segments(states(0), p.dA, p.S);
        sum_segments(static_cast<float const*>(scratch.channels), p.dskip, 1);
        sum_segments(static_cast<float const*>(scratch.channels) + plan.count * p.D, p.ddt_bias, 1);
    }
};

// Whether blocks of K would read B and C again for more than a seventh of what a forward cannot avoid. Where they do
// not, two smaller blocks hide each other's barriers.
template <class K>
bool wants_wide(SelectiveParams const& p) {
    i64 const numbers =
        (!p.channel_B + !p.channel_C) * p.S * static_cast<i64>(sizeof(typename K::TokenNumber));
    i64 const channels = p.D / p.G, blocks = (channels + K::kChannels - 1) / K::kChannels;
    i64 const rows =
        (p.z.data == nullptr ? 3 : 4) * channels * static_cast<i64>(sizeof(typename K::T));
    return 7 * (blocks - 1) * numbers > rows + numbers;
}

template <class K>
int64_t launch_kind(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    auto const forward = [&](auto kind) -> int64_t {
        Launch<decltype(kind)> const launcher(p, direction, workspace);
        if (workspace != nullptr) launcher.forward(stream);
        return launcher.bytes;
    };
    if (direction == Direction::forward)
        return wants_wide<K>(p) ? forward(typename K::Wide{}) : forward(K{});
    Launch<K> const launcher(p, direction, workspace);
    if (workspace != nullptr) launcher.backward(stream);
    return launcher.bytes;
}

template <class T, class N>
int64_t launch_typed(SelectiveParams const& p, Direction direction, void* workspace, void* stream) {
    auto const run = [&](auto kind) {
        return launch_kind<decltype(kind)>(p, direction, workspace, stream);
    };
    auto const in_layout = [&](auto layout) {
        constexpr Layout kLayout = decltype(layout)::value;
        bool const few = p.S <= 16;
        if constexpr (std::is_same_v<N, float>) {
            if (!p.channel_B && !p.channel_C)
                return few ? run(Kind<T, N, 4, false, kLayout>{})
                           : run(Kind<T, N, 16, false, kLayout>{});
        }
        return few ? run(Kind<T, N, 4, true, kLayout>{}) : run(Kind<T, N, 16, true, kLayout>{});
    };
    if (p.u.head == 1) return in_layout(std::integral_constant<Layout, Layout::last>{});
    // Packed sequences begin anywhere.
    bool const pieces =
        p.cu_seqlens == nullptr && are_aligned<Kind<T, N, 4, true, Layout::first>>(p);
    return pieces ? in_layout(std::integral_constant<Layout, Layout::first>{})
                  : in_layout(std::integral_constant<Layout, Layout::lines>{});
}

}  // namespace lsm::selective_kernel
