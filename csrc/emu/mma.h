// Element types of the matrix instructions: how their bits become the value that is multiplied.
#pragma once

#include <bit>
#include <cstdint>

namespace lsm::emu {

struct Bf16 {
    using Value = float;
    static constexpr int kBits = 16;
    static float decode(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
};

struct F16 {
    using Value = float;
    static constexpr int kBits = 16;
    // The exponent is rebased by a multiplication, which also normalises denormals.
    static float decode(uint32_t bits) {
        uint32_t const sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
        if (rest >= 0x7c00u)
            return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
        float const magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
        return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
    }
};

// The tensor core reads the upper 19 bits only.
struct Tf32 {
    using Value = float;
    static constexpr int kBits = 32;
    static float decode(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
};

struct Int8 {
    using Value = int32_t;
    static constexpr int kBits = 8;
    static int32_t decode(uint32_t bits) { return static_cast<int8_t>(bits); }
};

}  // namespace lsm::emu
