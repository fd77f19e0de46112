// The selective scan's CPU kernels for AVX2, FMA and F16C. The target holds to the end of the file: templates are
// compiled there.
#include "selective_kernels.h"
#include "tier_headers.h"

#if LSM_CPU_X86_TIERS
#pragma GCC target("avx2,fma,f16c")
#define LSM_CPU_TIER avx2
#define LSM_CPU_VECTOR_BYTES 32
#define LSM_CPU_REGISTERS 16
#define LSM_CPU_HARDWARE_F16 1
#include "selective_tier.h"
#endif
