// The short convolution for one instruction set (see chunk_tier.h for what the including file has chosen).
//
// Lanes lie along what lies side by side in memory: channels (Rows) or tokens (Lines). A token's W inputs are read where
// they are, so nothing is transposed; only those before a sequence's first token come from a buffer. A task is a tile of
// channels of a few segments of tokens. Nothing is carried from one to the next: the backward makes the gradients of the
// W - 1 tokens behind a segment again.
#pragma once

#include "conv_lines.h"
#include "conv_rows.h"
#include "conv_step.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// run(tile) of the dtype, the layout and the taps. What models use is unrolled: four taps, and in fp32 and bf16 two and
// three without a norm.
template <class Run>
void with_tile(ConvParams const& p, int64_t first, void* scratch, Run const& run) {
    auto const taken = [&](auto zero, auto element, auto taps) {
        using T = decltype(zero);
        using Element = decltype(element);
        constexpr int kTaps = decltype(taps)::value;
        Arena<T> arena(scratch);
        if constexpr (kTaps == 0 || kTaps == 4) {
            if (p.x.channel_last() && p.norm > 0)
                return run(Rows<T, Element, kTaps, true>(p, first, arena), arena);
        }
        if (p.x.channel_last()) {
            run(Rows<T, Element, kTaps, false>(p, first, arena), arena);
        } else {
            run(Lines<T, Element, kTaps>(p, first, arena), arena);
        }
    };
    auto const typed = [&](auto zero) {
        with_element<decltype(zero)>(p.dtype, [&](auto element) {
            using Element = decltype(element);
            if constexpr (std::is_same_v<Element, float> || std::is_same_v<Element, Bf16>) {
                if (p.W == 2 && p.norm == 0)
                    return taken(zero, element, std::integral_constant<int, 2>{});
                if (p.W == 3 && p.norm == 0)
                    return taken(zero, element, std::integral_constant<int, 3>{});
            }
            if constexpr (!std::is_same_v<Element, double>) {
                if (p.W == 4) return taken(zero, element, std::integral_constant<int, 4>{});
            }
            taken(zero, element, std::integral_constant<int, 0>{});
        });
    };
    with_accumulator(p.dtype, typed);
}

int64_t conv_scratch_bytes(ConvParams const& p) {
    int64_t bytes = 0;
    with_tile(p, 0, nullptr, [&](auto&&, auto const& arena) { bytes = arena.used(); });
    return bytes;
}

void conv_forward(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                  bool ready, void* scratch) {
    with_tile(p, first, scratch, [&](auto&& tile, auto&) {
        if (!ready) tile.begin(true);
        for (int64_t i = 0; i < count; ++i) tile.forward(segments[i]);
    });
}

void conv_backward(ConvParams const& p, ConvSegment const* segments, int64_t count, int64_t first,
                   void* record, void* scratch) {
    with_tile(p, first, scratch, [&](auto&& tile, auto&) {
        tile.begin(false);
        for (int64_t i = 0; i < count; ++i) tile.backward(segments[i]);
        if (p.dweight != nullptr) tile.write_sums(record);
    });
}

// Gradients of weight and bias: the records' sums, in their order, made in the first.
void conv_add(ConvParams const& p, void* records, int64_t count) {
    auto const typed = [&](auto zero) {
        using T = decltype(zero);
        T* const sums = static_cast<T*>(records);
        int64_t const size = (p.W + 1) * p.D;
        for (int64_t r = 1; r < count; ++r) {
            T const* const record = sums + r * size;
            for (int64_t i = 0; i < size; ++i) sums[i] += record[i];
        }
        auto const write_column = [&](void* to, int64_t i, int64_t j) {
            with_element<T>(p.weight_dtype, [&](auto element) {
                T const* const from = sums + j * p.D;
                for (int64_t c = 0; c < p.D; ++c)
                    narrow_first<T>(static_cast<decltype(element)*>(to) + c * i,
                                    Vector<T>{} + (count > 0 ? from[c] : T(0)), 1);
            });
        };
        for (int64_t j = 0; j < p.W; ++j)
            write_column(element_at(p.dweight, p.weight_dtype, j), p.W, j);
        if (p.dbias != nullptr) write_column(p.dbias, 1, p.W);
    };
    with_accumulator(p.dtype, typed);
}

void conv_step(ConvStepParams const& p, int64_t batch) {
    with_types(p.dtype, [&](auto zero, auto element) {
        step_row<decltype(zero), decltype(element)>(p, batch);
    });
}

}  // namespace

constinit ConvKernels const conv_kernels{conv_scratch_bytes, conv_forward, conv_backward, conv_add,
                                         conv_step};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
