// The selective scan's CPU kernels for AVX-512. The target holds to the end of the file: templates are compiled
// there.
#include "selective_kernels.h"
#include "tier_headers.h"

#if LSM_CPU_X86_TIERS
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define LSM_CPU_TIER avx512
#define LSM_CPU_VECTOR_BYTES 64
#define LSM_CPU_REGISTERS 32
#define LSM_CPU_HARDWARE_F16 1
#include "selective_tier.h"
#endif
