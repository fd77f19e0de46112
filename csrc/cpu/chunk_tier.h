// One instruction set's kernel table. The including file has chosen the set:
//   LSM_CPU_TIER            namespace            LSM_CPU_VECTOR_BYTES   width of a vector
//   LSM_CPU_REGISTERS       vector registers     LSM_CPU_HARDWARE_F16   converts halves
// and has included the system's headers before it did, so that only the kernels are compiled for
// it.
#pragma once

#include "chunk_backward.h"
#include "chunk_step.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

template <class F>
auto with_accumulator(Dtype dtype, F const& f) {
    return dtype == Dtype::f64 ? f(double{}) : f(float{});
}

int64_t scratch_bytes(ChunkParams const& p, int64_t tokens, bool backward) {
    return with_accumulator(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        return backward ? BackwardScratch<T>(nullptr, p.K, p.V, tokens).arena.used()
                        : ForwardScratch<T>(nullptr, p.K, p.V).arena.used();
    });
}

template <bool kOutputs>
void forward(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_accumulator(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        forward_stretch<T, VectorDecay<T>, kOutputs>(p, task, scratch);
    });
}

void backward(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_accumulator(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        BackwardStretch<T, VectorDecay<T>>(p, task, scratch).gradients();
    });
}

void begin_grad(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    with_accumulator(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        BackwardStretch<T, VectorDecay<T>>(p, task, scratch).begin_grad();
    });
}

void step(StepParams const& p, int64_t first, int64_t last) {
    with_accumulator(p.dtype, [&](auto zero) { step_heads<decltype(zero)>(p, first, last); });
}

}  // namespace

constinit ChunkKernels const chunk_kernels{scratch_bytes, forward<true>, forward<false>,
                                           backward,      begin_grad,    step};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
