// Rows of a cache in codes of 8 or 4 bits, and the numbers they stand for: code times a step, plus the lowest.
#pragma once

#include "kernels/sparse_attn/decode_keys.cuh"
#include "kernels/sparse_attn/rows.cuh"

namespace lsm::decode_attn {

using attn_rows::Pieces;

// A row of codes of Bits bits, null for one that is not there.
struct Coded {
    unsigned char const* codes;
    float const* affine;
};

LSM_DEVICE Coded coded(Rows const& codes, i64 at, Rows const& affine, i64 affine_at) {
    return {static_cast<unsigned char const*>(codes.data) + at,
            static_cast<float const*>(affine.data) + affine_at};
}

// Rows of codes to a tile as numbers of T, 8 threads side by side; `columns` are a multiple of 16, those after them zero.
template <class T, int Bits, class Row>
LSM_DEVICE void load_codes(Pieces const& tile, int rows, int columns, int padded, Row const& row) {
    constexpr int kUnit = 16 / static_cast<int>(sizeof(T)), kEach = 8 / Bits;  // numbers of a byte
    using Word = std::conditional_t<kUnit == 8, uint2, u32>;
    int const halves = columns / kEach / kUnit;  // pieces from the lower codes of all bytes
    for (int r = threadIdx.x / 8; r < rows; r += kThreads / 8) {
        Coded const from = row(r);
        bool const there = from.codes != nullptr;
        float2 affine = {0.f, 0.f};
        if (there) affine = load_global(reinterpret_cast<float2 const*>(from.affine));
        for (int piece = threadIdx.x % 8; piece < halves; piece += 8) {
            Word word = {};
            if (there) word = load_global(reinterpret_cast<Word const*>(from.codes) + piece);
            u32 words[kUnit / 4];
            __builtin_memcpy(words, &word, sizeof(word));
            LSM_UNROLL
            for (int n = 0; n < kEach; ++n) {
                float x[kUnit];
                LSM_UNROLL
                for (int i = 0; i < kUnit; ++i) {
                    u32 const code = words[i / 4] >> (i % 4 * 8 + n * Bits) & ((1 << Bits) - 1);
                    x[i] = static_cast<float>(code) * affine.x + affine.y;
                }
                uint4& to = at_shared<uint4>(tile.at(r, n * halves + piece));
                if constexpr (kUnit == 4) {
                    to = {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                          __float_as_uint(x[3])};
                } else {
                    T* const tag = nullptr;
                    to = {pack(x[0], x[1], tag), pack(x[2], x[3], tag), pack(x[4], x[5], tag),
                          pack(x[6], x[7], tag)};
                }
            }
        }
        for (int piece = columns / kUnit + threadIdx.x % 8; piece < padded / kUnit; piece += 8)
            at_shared<uint4>(tile.at(r, piece)) = {0, 0, 0, 0};
    }
}

// Number c of a row of the cache.
template <class T, int Bits>
LSM_DEVICE float number(Rows const& rows, i64 at, Rows const& affine, i64 affine_at, i64 columns,
                        int c) {
    if constexpr (Bits == 0) {
        return static_cast<float>(load_global(static_cast<T const*>(rows.data) + at + c));
    } else {
        Coded const row = coded(rows, at, affine, affine_at);
        bool const upper = Bits == 4 && c >= columns / 2;
        u32 const byte = load_global(row.codes + (upper ? c - columns / 2 : c));
        u32 const code = Bits == 8 ? byte : upper ? byte >> 4 : byte & 15;
        return static_cast<float>(code) * load_global(row.affine) + load_global(row.affine + 1);
    }
}

}  // namespace lsm::decode_attn
