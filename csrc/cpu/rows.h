// Rows of tokens in and out: from any dtype and stride to zero-filled panels of the accumulation
// type, and back. A panel holds one vector's worth of channels of every token of a block:
// [channels / lanes][kBlock][lanes].
#pragma once

#include "params/chunk.h"
#include "simd.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kBlock = 8;  // tokens advanced in one pass over the state

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

LSM_INLINE Vector<float> widen(float const* p) {
    return load(p);
}
LSM_INLINE Vector<double> widen(double const* p) {
    return load(p);
}
LSM_INLINE void narrow(float* p, Vector<float> x) {
    store(p, x);
}
LSM_INLINE void narrow(double* p, Vector<double> x) {
    store(p, x);
}

LSM_INLINE Vector<float> widen(Bf16 const* p) {
    return Vector<float>(__builtin_convertvector(load_bytes<HalfBits>(p), Bits) << 16);
}

// Round to nearest even; a NaN keeps its upper bits and is made quiet.
LSM_INLINE void narrow(Bf16* p, Vector<float> x) {
    Bits const u = Bits(x);
    Bits const rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Bits const bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded;
    HalfBits const half = __builtin_convertvector(bits, HalfBits);
    std::memcpy(p, &half, sizeof(half));
}

#if LSM_CPU_HARDWARE_F16 && LSM_CPU_VECTOR_BYTES == 64
// The masked forms: the plain ones pass an undefined register, of which g++ 12 warns.
LSM_INLINE Vector<float> widen(F16 const* p) {
    return Vector<float>(_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(p)));
}
LSM_INLINE void narrow(F16* p, Vector<float> x) {
    __m256i const half = _mm512_maskz_cvtps_ph(0xffff, __m512(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
}
#elif LSM_CPU_HARDWARE_F16
LSM_INLINE Vector<float> widen(F16 const* p) {
    return Vector<float>(_mm256_cvtph_ps(load_bytes<__m128i>(p)));
}
LSM_INLINE void narrow(F16* p, Vector<float> x) {
    __m128i const half = _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
}
#else
// The exponent is rebased by a multiplication, which is exact and turns subnormal halves into
// normal floats.
LSM_INLINE Vector<float> widen(F16 const* p) {
    Bits const h = __builtin_convertvector(load_bytes<HalfBits>(p), Bits);
    Bits const magnitude = h & 0x7fff;
    Bits const finite = Bits(Vector<float>(magnitude << 13) * 0x1p112f);
    Bits const special = magnitude >= 0x7c00 ? Bits{} + 0x7f800000u : Bits{};
    return Vector<float>(finite | special | ((h & 0x8000) << 16));
}
// Subnormal halves are rounded by adding 0.5, whose last place is the smallest half.
LSM_INLINE void narrow(F16* p, Vector<float> x) {
    Bits const u = Bits(x) & 0x7fffffff;
    Bits const normal = (u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13;
    Bits const tiny = Bits(Vector<float>(u) + 0.5f) - 0x3f000000u;
    Bits bits = u < 0x38800000 ? tiny : normal;
    bits = u >= 0x477ff000 ? Bits{} + 0x7c00u : bits;
    bits = u > 0x7f800000 ? Bits{} + 0x7e00u : bits;
    HalfBits const half = __builtin_convertvector(bits | ((Bits(x) >> 16) & 0x8000), HalfBits);
    std::memcpy(p, &half, sizeof(half));
}
#endif

template <class T, class In>
LSM_INLINE Vector<T> widen_first(In const* p, int64_t count) {
    In full[kLanes<T>] = {};
    for (int64_t i = 0; i < count; ++i) full[i] = p[i];
    return widen(full);
}

template <class T, class Out>
LSM_INLINE void narrow_first(Out* p, Vector<T> x, int64_t count) {
    Out full[kLanes<T>];
    narrow(full, x);
    for (int64_t i = 0; i < count; ++i) p[i] = full[i];
}

// Where rows lie in panels: those of a block side by side, or a single row in consecutive panels.
struct PanelLayout {
    int64_t rows, panel_step;  // the step in vectors
};
inline constexpr PanelLayout kBlockPanels{kBlock, kBlock}, kRowPanels{1, 1};

// `count` rows of `columns` values, times scale, into panels; rows from `count` on and odd lanes
// are zero.
template <class T, class In>
void pack(T* dst, PanelLayout layout, void const* src, int64_t stride, int64_t count,
          int64_t columns, T scale) {
    constexpr int W = kLanes<T>;
    int64_t const step = layout.panel_step * W;
    for (int64_t t = 0; t < count; ++t) {
        T* out = dst + t * W;
        In const* row = static_cast<In const*>(src) + t * stride;
        int64_t c = 0;
        for (; c + W <= columns; c += W, out += step) store(out, widen(row + c) * scale);
        if (c < columns) store(out, widen_first<T>(row + c, columns - c) * scale);
    }
    for (int64_t t = count; t < layout.rows; ++t) {
        for (int64_t c = 0; c < columns; c += W)
            store(dst + c * layout.panel_step + t * W, Vector<T>{});
    }
}

template <class T, class Out>
void unpack(void* dst, T const* src, PanelLayout layout, int64_t stride, int64_t count,
            int64_t columns, T scale) {
    constexpr int W = kLanes<T>;
    int64_t const step = layout.panel_step * W;
    for (int64_t t = 0; t < count; ++t) {
        T const* in = src + t * W;
        Out* row = static_cast<Out*>(dst) + t * stride;
        int64_t c = 0;
        for (; c + W <= columns; c += W, in += step) narrow(row + c, load(in) * scale);
        if (c < columns) narrow_first<T>(row + c, load(in) * scale, columns - c);
    }
}

// One head's rows of a [B, T, H, D] tensor, from column `first` on; the dtype is settled here, once
// per task.
template <class T>
class HeadRows {
  public:
    HeadRows(Rows const& rows, Dtype dtype, int64_t batch, int64_t head, int64_t first = 0)
        : stride_(rows.time),
          bytes_(dtype == Dtype::f64   ? 8
                 : dtype == Dtype::f32 ? 4
                                       : 2) {
        data_ = static_cast<char*>(rows.data) +
                (batch * rows.batch + head * rows.head + first) * bytes_;
        if constexpr (sizeof(T) == 8) {
            pack_ = pack<T, double>, unpack_ = unpack<T, double>;
        } else if (dtype == Dtype::bf16) {
            pack_ = pack<T, Bf16>, unpack_ = unpack<T, Bf16>;
        } else if (dtype == Dtype::f16) {
            pack_ = pack<T, F16>, unpack_ = unpack<T, F16>;
        } else {
            pack_ = pack<T, float>, unpack_ = unpack<T, float>;
        }
    }

    // Tokens [t, t + count) to and from block panels.
    void read(T* dst, int64_t t, int64_t count, int64_t columns, T scale = 1) const {
        pack_(dst, kBlockPanels, at(t * stride_), stride_, count, columns, scale);
    }
    void write(T const* src, int64_t t, int64_t count, int64_t columns, T scale = 1) const {
        unpack_(at(t * stride_), src, kBlockPanels, stride_, count, columns, scale);
    }

    // Asks for tokens [t, t + count) ahead of their use: a head's rows lie H rows apart, too far
    // for the hardware.
    void prefetch(int64_t t, int64_t count, int64_t columns) const {
        char const* row = at(t * stride_);
        for (int64_t i = 0; i < count; ++i, row += stride_ * bytes_) {
            for (int64_t line = 0; line < columns * bytes_; line += 64)
                __builtin_prefetch(row + line);
        }
    }

    // Columns [first, first + columns) of token 0 to and from a plain row.
    void read_row(T* dst, int64_t first, int64_t columns, T scale = 1) const {
        pack_(dst, kRowPanels, at(first), 0, 1, columns, scale);
    }
    void write_row(T const* src, int64_t first, int64_t columns) const {
        unpack_(at(first), src, kRowPanels, 0, 1, columns, T(1));
    }

  private:
    char* at(int64_t elements) const { return data_ + elements * bytes_; }

    char* data_;
    int64_t stride_, bytes_;
    void (*pack_)(T*, PanelLayout, void const*, int64_t, int64_t, int64_t, T);
    void (*unpack_)(void*, T const*, PanelLayout, int64_t, int64_t, int64_t, T);
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
