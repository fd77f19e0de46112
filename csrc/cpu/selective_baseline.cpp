// The selective scan's CPU kernels for any machine: 16-byte vectors, whatever the compiler makes of them.
#include "selective_kernels.h"
#include "tier_headers.h"

#define LSM_CPU_TIER baseline
#define LSM_CPU_VECTOR_BYTES 16
#define LSM_CPU_REGISTERS 16
#define LSM_CPU_HARDWARE_F16 0
#include "selective_tier.h"
