// Everything the kernels include from outside, to be read before an instruction set is chosen: an
// inline function of the system compiled for AVX-512 must not become the copy that the whole
// library uses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "chunk_kernels.h"

#if LSM_CPU_X86_TIERS
#include <immintrin.h>
#endif
