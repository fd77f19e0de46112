// Which instruction set's kernel table serves this machine. Plain C++, no vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The x86 tiers choose their instruction set by a pragma that only g++ honours; elsewhere the
// baseline serves.
#ifndef LSM_CPU_X86_TIERS
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LSM_CPU_X86_TIERS 1
#else
#define LSM_CPU_X86_TIERS 0
#endif
#endif

// Whether a tier's kernels are compiled.
#define LSM_CPU_TIER_baseline 1
#define LSM_CPU_TIER_avx2 LSM_CPU_X86_TIERS
#define LSM_CPU_TIER_avx512 LSM_CPU_X86_TIERS

namespace lsm::cpu {

// The last two are avx512 with products of bf16 beside (pairs.h): dot products, which are taken only if they are asked for
// (where they were timed, fp32 is faster), or tiles.
enum class Tier { baseline, avx2, avx512, avx512_bf16, amx };

#if LSM_CPU_X86_TIERS
// The highest tier wanted: the environment's LSM_CPU_TIER, with which any machine can test what older ones run.
inline Tier wanted_tier() {
    constexpr char const* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
    char const* const variable = std::getenv("LSM_CPU_TIER");
    if (variable == nullptr) return Tier::amx;
    for (int i = 0; i < int(std::size(kNames)); ++i)
        if (variable == std::string(kNames[i])) return Tier(i);
    throw std::invalid_argument(
        "LSM_CPU_TIER must be baseline, avx2, avx512, avx512_bf16 or amx, got '" +
        std::string(variable) + "'");
}

// Linux gives a process tiles when it asks for them.
inline bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

inline Tier best_tier() {
#if LSM_CPU_X86_TIERS
    static Tier const best = [] {
        bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                              __builtin_cpu_supports("f16c");
        bool const has_avx512 =
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        Tier const wanted = wanted_tier();
        Tier const found = !has_avx2 ? Tier::baseline : !has_avx512 ? Tier::avx2 : Tier::avx512;
        if (wanted <= Tier::avx512 || found < Tier::avx512 || !__builtin_cpu_supports("avx512bf16"))
            return std::min(found, wanted);
        if (wanted == Tier::avx512_bf16) return wanted;
        bool const has_tiles =
            __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
        return has_tiles && may_use_tiles() ? Tier::amx : Tier::avx512;
    }();
    return best;
#else
    return Tier::baseline;
#endif
}

}  // namespace lsm::cpu

// One table of kernels per tier, declared in lsm::cpu, and the choice between them. fp64 serves to check gradients: its
// kernels stop at AVX2 (LSM_CPU_F64), which spares a build and a library a fifth of the CPU's kernels.
#if LSM_CPU_X86_TIERS
#define LSM_CPU_TABLES(Table, table)                                           \
    namespace baseline {                                                       \
    extern Table const table;                                                  \
    }                                                                          \
    namespace avx2 {                                                           \
    extern Table const table;                                                  \
    }                                                                          \
    namespace avx512 {                                                         \
    extern Table const table;                                                  \
    }                                                                          \
    inline Table const& best_##table(Dtype dtype) {                            \
        Tier const tier = best_tier();                                         \
        return tier == Tier::baseline                        ? baseline::table \
               : tier >= Tier::avx512 && dtype != Dtype::f64 ? avx512::table   \
                                                             : avx2::table;    \
    }
#else
#define LSM_CPU_TABLES(Table, table)          \
    namespace baseline {                      \
    extern Table const table;                 \
    }                                         \
    inline Table const& best_##table(Dtype) { \
        return baseline::table;               \
    }
#endif
