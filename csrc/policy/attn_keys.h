// Which keys a query sees, and which keys a group of queries has to visit for that: from positions alone (AttnMask),
// for CPU and CUDA.
#pragma once

#include <type_traits>

#include "params/sparse_attn.h"
#include "policy/gate.h"

namespace lsm {

template <class Int>
LSM_POLICY Int floor_div(Int a, std::type_identity_t<Int> b) {
    return a >= 0 ? a / b : -((b - 1 - a) / b);
}

LSM_POLICY int64_t clamped(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

// Whether the query at p sees the key at x; `left` is that of the query's head. Int: wide enough for all that the mask
// says.
template <class Int>
LSM_POLICY bool attn_sees(AttnMask const& m, std::type_identity_t<Int> left,
                          std::type_identity_t<Int> p, Int x) {
    if (m.causal && x >= Int(m.prefix)) {
        bool const future = m.causal_block == 1 ? x > p
                                                : floor_div(x, Int(m.causal_block)) >
                                                      floor_div(p, Int(m.causal_block));
        if (future) return false;
    }
    if (x < Int(m.sinks)) return true;
    if (left >= 0 && x < p - left) return false;
    if (m.right >= 0 && x > p + Int(m.right)) return false;
    return m.dilation == 1 || (p - x) % Int(m.dilation) == 0;
}

// The first key at x or later.
LSM_POLICY int64_t attn_key_from(AttnMask const& m, int64_t x) {
    return -floor_div(m.key_length - 1 - x, m.key_stride);
}

LSM_POLICY int64_t attn_position(AttnMask const& m, int64_t key) {
    return key * m.key_stride + m.key_length - 1;
}

// The keys that queries of positions [p_first, p_last] may see, of `keys` there are, in ascending order: `sinks` from
// the first on, then those from `begin` on. `left`: the widest of the queries' heads, below 0 if one has no bound.
struct AttnVisits {
    int64_t sinks, begin, count;

    LSM_POLICY int64_t key(int64_t i) const { return i < sinks ? i : begin + (i - sinks); }
};

LSM_POLICY AttnVisits attn_visits(AttnMask const& m, int64_t left, int64_t p_first, int64_t p_last,
                                  int64_t keys) {
    int64_t end = keys;
    if (m.causal) {
        int64_t const x = (floor_div(p_last, m.causal_block) + 1) * m.causal_block;
        end = clamped(attn_key_from(m, x > m.prefix ? x : m.prefix), 0, end);
    }
    if (m.right >= 0) {
        int64_t const x = p_last + m.right + 1;
        end = clamped(attn_key_from(m, x > m.sinks ? x : m.sinks), 0, end);
    }
    int64_t const begin = left < 0 ? 0 : clamped(attn_key_from(m, p_first - left), 0, end);
    int64_t const sinks = left < 0 ? 0 : clamped(attn_key_from(m, m.sinks), 0, begin);
    return {sinks, begin, sinks + end - begin};
}

// A decode step cuts what its queries visit into parts of a size that follows from their own number of keys alone, so
// that a sequence's result does not depend on what else is in the batch. At most kMaxParts.
constexpr int64_t kMaxParts = 64, kPartKeys = 256;

LSM_POLICY int64_t attn_part_keys(int64_t visits) {
    int64_t const units = (visits + kPartKeys * kMaxParts - 1) / (kPartKeys * kMaxParts);
    return kPartKeys * (units > 1 ? units : 1);
}

LSM_POLICY int64_t attn_parts(int64_t visits) {
    int64_t const size = attn_part_keys(visits);
    return (visits + size - 1) / size;
}

}  // namespace lsm
