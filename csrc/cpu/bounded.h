// A vector between bounds, in one instruction for each (see chunk_tier.h for what the including file has chosen).
#pragma once

#include "simd.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// x between bounds; NaN passes.
LSM_INLINE Vector<float> bounded(Vector<float> x, float low, float high) {
#if LSM_CPU_VECTOR_BYTES == 64
    x = Vector<float>(_mm512_maskz_max_ps(0xffff, __m512(Vector<float>{} + low), __m512(x)));
    return Vector<float>(_mm512_maskz_min_ps(0xffff, __m512(Vector<float>{} + high), __m512(x)));
#else
    x = x < low ? Vector<float>{} + low : x;
    return x > high ? Vector<float>{} + high : x;
#endif
}

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
