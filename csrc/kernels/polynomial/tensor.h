// Passes on tensor cores (tensor.cuh), compiled apart: all but dkv, for rows in pieces of 16 bytes.
#pragma once

#include "kernels/polynomial/passes.cuh"

namespace lsm::polynomial {

constexpr int kTensorChannels = 16;
constexpr int kTensorBlocks = 2;  // on a multiprocessor

template <Pass pass>
void run_tensor(PassParams const& p, Segments const& segments, void* stream);

}  // namespace lsm::polynomial
