// One instruction set's averages of both directions (bi_wkv_tier.h), which the scheduler (wkv4.cpp) asks the same of.
#pragma once

#include "wkv4_kernels.h"

namespace lsm::cpu {

LSM_CPU_TABLES(Wkv4Kernels, bi_wkv_kernels)

}  // namespace lsm::cpu
