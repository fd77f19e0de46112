// The CPU kernels of the convolution and the sLSTM cell for any machine.
#include "conv_kernels.h"
#include "slstm_kernels.h"
#include "tier_headers.h"

#define LSM_CPU_TIER baseline
#define LSM_CPU_VECTOR_BYTES 16
#define LSM_CPU_REGISTERS 16
#define LSM_CPU_HARDWARE_F16 0
#include "conv_tier.h"
#include "slstm_tier.h"
