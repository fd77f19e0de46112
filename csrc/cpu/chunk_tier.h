// One instruction set's kernel table. The including file has chosen the set:
//   LSM_CPU_TIER            namespace            LSM_CPU_VECTOR_BYTES   width of a vector
//   LSM_CPU_REGISTERS       vector registers     LSM_CPU_HARDWARE_F16   converts halves
//   LSM_CPU_F64             has kernels of fp64
// and has included the system's headers before it did, so that only the kernels are compiled for
// it.
#pragma once

#include "chunk_backward.h"
#include "chunk_step.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// run(Stretch{p, task, scratch}) with the stretch of the dtype and the decay at hand.
template <template <class T, class Decay> class Stretch, class Run>
auto with_stretch(ChunkParams const& p, ChunkTask const& task, void* scratch, Run const& run) {
    return with_accumulator(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        switch (p.decay) {
            case Decay::none:
                return run(Stretch<T, NoDecay<T>>(p, task, scratch));
            case Decay::scalar:
                return run(Stretch<T, ScalarDecay<T>>(p, task, scratch));
            case Decay::both:
                return run(Stretch<T, BothDecay<T>>(p, task, scratch));
            case Decay::key:
                return run(Stretch<T, ChannelDecay<T, Side::key>>(p, task, scratch));
            default:
                return run(Stretch<T, ChannelDecay<T, Side::value>>(p, task, scratch));
        }
    });
}

void gates(ChunkParams const& p, ChunkTask const& task) {
    with_accumulator(p.dtype, [&](auto zero) { normaliser_gates<decltype(zero)>(p, task); });
}

int64_t scratch_bytes(ChunkParams const& p, int64_t tokens, bool backward) {
    ChunkTask task{};
    task.end = tokens, task.v_end = p.V;
    auto const bytes = [](auto&& stretch) { return stretch.scratch_bytes(); };
    return backward ? with_stretch<BackwardStretch>(p, task, nullptr, bytes)
                    : with_stretch<ForwardStretch>(p, task, nullptr, bytes);
}

template <bool kOutputs>
void forward(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_stretch<ForwardStretch>(p, task, scratch,
                                 [](auto&& stretch) { stretch.template run<kOutputs>(); });
}

void backward(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_stretch<BackwardStretch>(p, task, scratch, [](auto&& stretch) { stretch.gradients(); });
}

void begin_grad(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_stretch<BackwardStretch>(p, task, scratch, [](auto&& stretch) { stretch.begin_grad(); });
}

void step(StepParams const& p, void* workspace, int64_t first, int64_t last) {
    with_accumulator(p.dtype,
                     [&](auto zero) { step_heads<decltype(zero)>(p, workspace, first, last); });
}

}  // namespace

constinit ChunkKernels const chunk_kernels{gates,    scratch_bytes, forward<true>, forward<false>,
                                           backward, begin_grad,    step};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
