// The backward kernels of the tensor-core path, in device files of their own.
#pragma once

#include "kernels/delta/chunks.cuh"

namespace lsm::delta {

void run_reverse(DeltaWork const& work, int64_t blocks, void* stream);
void run_gradients(DeltaWork const& work, int64_t blocks, void* stream);

}  // namespace lsm::delta
