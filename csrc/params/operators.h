// The operators of the chunk engine. A row is an operator: its schemas (library.cpp), its functions
// (ops/chunk.cpp) and its path through the kernels follow from it.
#pragma once

#include <array>

#include "params/chunk.h"
#include "policy/gate.h"

namespace lsm {

struct ChunkOperator {
    char const* name;  // torch.ops.lsm.<name>_fwd, <name>_bwd and <name>_step
    Decay decay;
    bool exclusive;  // tokens read the state as it was before their own decay and write
    int32_t gate = kGate<LogGate>;  // what the numbers in a gate say
};

inline constexpr auto kOurOperators = std::to_array<ChunkOperator>({
    {"linear_attn", Decay::none, false},   // linear attention, Based
    {"simple_gla", Decay::scalar, false},  // RetNet, lightning attention, Mamba-2, mLSTM
    {"gla", Decay::key, false},            // GLA, HGRN2
    {"gla_value", Decay::value, false},    // first pass of ABC and GSA
    {"gla_both", Decay::both, false},      // decaying fast weights (LAvv)
    {"rwkv6", Decay::key, true},           // RWKV-5, RWKV-6
});

#ifdef LSM_MORE_POLICIES
inline constexpr auto kMoreOperators = std::to_array<ChunkOperator>(LSM_MORE_OPERATORS);
#else
inline constexpr std::array<ChunkOperator, 0> kMoreOperators{};
#endif

inline constexpr auto kChunkOperators = [] {
    std::array<ChunkOperator, kOurOperators.size() + kMoreOperators.size()> all{};
    size_t n = 0;
    for (auto const& row : kOurOperators) all[n++] = row;
    for (auto const& row : kMoreOperators) all[n++] = row;
    return all;
}();

}  // namespace lsm
