// Workspace and launches of either layout.
#pragma once

#include "kernels/conv/backward.cuh"
#include "kernels/conv/forward.cuh"

namespace lsm::conv {

// Whether the channels of a token, where they lie side by side, are aligned pieces.
template <class C>
bool is_whole(ConvParams const& p, Strided const& x, Strided const& y, Strided const& z) {
    bool ok = C::kChannelLast && p.D % C::kVector == 0;
    for (Strided const& t : {x, y, z})
        ok = ok &&
             reinterpret_cast<uintptr_t>(t.data) % (C::kVector * sizeof(typename C::T)) == 0 &&
             t.batch % C::kVector == 0 && t.time % C::kVector == 0;
    return ok;
}

constexpr i64 kAlign = 256;

inline i64 round_up(i64 bytes) {
    return (bytes + kAlign - 1) / kAlign * kAlign;
}

// Calls f(Config{}).
template <bool kChannelLast, class F>
void with_config(ConvParams const& p, F const& f) {
    auto const typed = [&](auto element) {
        using T = decltype(element);
        if (p.W <= 4) return f(Config<T, kChannelLast, 4>{});
        return f(Config<T, kChannelLast, 8>{});
    };
    switch (p.dtype) {
        case Dtype::bf16:
            return typed(bf16{});
        case Dtype::f16:
            return typed(half{});
        default:
            return typed(float{});
    }
}

template <bool kChannelLast>
i64 workspace_bytes(ConvParams const& p, bool backward) {
    i64 bytes = 0;
    with_config<kChannelLast>(p, [&](auto config) {
        using C = decltype(config);
        bytes = round_up(segments_bytes(p, C::kSegment));
        if (backward && p.dweight != nullptr)
            bytes += plan_segments(p, C::kSegment, nullptr).count * (C::kTaps + 1) * p.D *
                     static_cast<i64>(sizeof(float));
    });
    return bytes;
}

template <bool kChannelLast>
void run(ConvParams const& p, bool backward, void* workspace, void* stream) {
    with_config<kChannelLast>(p, [&](auto config) {
        using C = decltype(config);
        Segments const plan = plan_segments(p, C::kSegment, workspace);
        i64 const tiles = (p.D + C::kTile - 1) / C::kTile;
        float* const partial = reinterpret_cast<float*>(static_cast<char*>(workspace) +
                                                        round_up(segments_bytes(p, C::kSegment)));
        if (tiles == 0) return;
        build_segments(p, plan, stream);
        dim3 const grid(static_cast<unsigned>(plan.count * tiles)), block(C::kThreads);
        if (!backward) {
            if (plan.count > 0)
                launch(forward_kernel<C>, grid, block, sizeof(SharedStorage<C>), stream, p, plan,
                       static_cast<int>(tiles), is_whole<C>(p, p.x, p.y, p.y));
            return;
        }
        if (plan.count > 0)
            launch(backward_kernel<C>, grid, block, sizeof(SharedStorage<C>), stream, p, plan,
                   static_cast<int>(tiles), is_whole<C>(p, p.x, p.grad_y, p.dx), partial);
        if (p.dweight == nullptr) return;
        int const columns = static_cast<int>((p.D + 31) / 32);
        launch(sum_partials<typename C::T, C::kTaps>,
               dim3(static_cast<unsigned>(columns * (C::kTaps + 1))), dim3(32 * kGroups),
               sizeof(float) * kGroups * 32, stream, p, plan, static_cast<float const*>(partial),
               columns);
    });
}

}  // namespace lsm::conv
