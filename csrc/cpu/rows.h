// Rows of tokens in and out: from any dtype and stride to zero-filled panels of the accumulation
// type, and back. A panel holds one vector's worth of channels of every token of a block of C:
// [channels / lanes][C][lanes].
#pragma once

#include "params/chunk.h"
#include "simd.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

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

// To nearest even in the upper half of each lane, for any number but NaN.
LSM_INLINE Bits rounded_to_bf16(Vector<float> x) {
    return Bits(x) + 0x7fff + (Bits(x) >> 16 & 1);
}

// A NaN keeps its upper bits and is made quiet.
LSM_INLINE void narrow(Bf16* p, Vector<float> x) {
    Bits const bits = x == x ? rounded_to_bf16(x) : Bits(x) | 0x400000;
    HalfBits const half = __builtin_convertvector(bits >> 16, HalfBits);
    std::memcpy(p, &half, sizeof(half));
}

// Each in the lower half of a lane.
LSM_INLINE Bits spread_halves(Bf16 const* p) {
#if LSM_CPU_VECTOR_BYTES == 64
    return Bits(_mm512_maskz_cvtepu16_epi32(0xffff, load_bytes<__m256i>(p)));
#else
    return __builtin_convertvector(load_bytes<HalfBits>(p), Bits);
#endif
}

// In the lower and in the upper half of each lane. A NaN whose mantissa is all ones comes out as 0: calculations do not make
// one.
LSM_INLINE Bits bf16_pairs(Vector<float> low, Vector<float> high) {
    return rounded_to_bf16(low) >> 16 | (rounded_to_bf16(high) & 0xffff0000u);
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

// Rows [first, first + count) of a block of C come from memory, times scale; the other rows and odd
// lanes are zero.
template <class T, class In, int C>
void pack(T* dst, void const* src, int64_t stride, int64_t first, int64_t count, int64_t columns,
          T scale) {
    constexpr int W = kLanes<T>;
    for (int64_t t = 0; t < C; ++t) {
        T* out = dst + t * W;
        if (t < first || t >= first + count) {
            for (int64_t c = 0; c < columns; c += W, out += C * W) store(out, Vector<T>{});
            continue;
        }
        In const* row = static_cast<In const*>(src) + (t - first) * stride;
        int64_t c = 0;
        for (; c + W <= columns; c += W, out += C * W) store(out, widen(row + c) * scale);
        if (c < columns) store(out, widen_first<T>(row + c, columns - c) * scale);
    }
}

// The same of whole rows, dst's `width` apart.
template <class T, class In>
void pack_rows(T* dst, int64_t width, void const* src, int64_t stride, int64_t count,
               int64_t columns, T scale) {
    for (int64_t t = 0; t < count; ++t)
        pack<T, In, 1>(dst + t * width, static_cast<In const*>(src) + t * stride, 0, 0, 1, columns,
                       scale);
}

template <class T, class In>
T first_element(void const* src) {
    if constexpr (std::is_same_v<T, In>) return *static_cast<T const*>(src);
    return widen_first<T>(static_cast<In const*>(src), 1)[0];
}

template <class T, class Out, int C>
void unpack(void* dst, T const* src, int64_t stride, int64_t first, int64_t count, int64_t columns,
            T scale) {
    constexpr int W = kLanes<T>;
    for (int64_t t = 0; t < count; ++t) {
        T const* in = src + (first + t) * W;
        Out* row = static_cast<Out*>(dst) + t * stride;
        int64_t c = 0;
        for (; c + W <= columns; c += W, in += C * W) narrow(row + c, load(in) * scale);
        if (c < columns) narrow_first<T>(row + c, load(in) * scale, columns - c);
    }
}

// C scalars, likewise.
template <class T, class In, int C>
void gather(T* dst, void const* src, int64_t stride, int64_t first, int64_t count) {
    In full[C] = {};
    for (int64_t t = 0; t < count; ++t) full[first + t] = static_cast<In const*>(src)[t * stride];
    for (int t = 0; t < C; t += kLanes<T>) store(dst + t, widen(full + t));
}

template <class T, class Out, int C>
void scatter(void* dst, T const* src, int64_t stride, int64_t first, int64_t count) {
    Out full[C];
    for (int t = 0; t < C; t += kLanes<T>) narrow(full + t, load(src + t));
    for (int64_t t = 0; t < count; ++t) static_cast<Out*>(dst)[t * stride] = full[first + t];
}

LSM_INLINE int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// f(Element{}) with the type that T's rows have in memory.
template <class T, class F>
LSM_INLINE void with_element(Dtype dtype, F const& f) {
    if constexpr (sizeof(T) == 8) {
        f(double{});
    } else if (dtype == Dtype::bf16) {
        f(Bf16{});
    } else if (dtype == Dtype::f16) {
        f(F16{});
    } else {
        f(float{});
    }
}

// f(T{}) with the type to accumulate in.
template <class F>
LSM_INLINE auto with_accumulator([[maybe_unused]] Dtype dtype, F const& f) {
#if LSM_CPU_F64
    if (dtype == Dtype::f64) return f(double{});
#endif
    return f(float{});
}

// f(T{}, Element{}) with both.
template <class F>
LSM_INLINE void with_types(Dtype dtype, F const& f) {
    with_accumulator(dtype, [&](auto zero) {
        with_element<decltype(zero)>(dtype, [&](auto element) { f(zero, element); });
    });
}

// Tokens [begin, end) in blocks of C slots, after `delay` slots that stay empty.
struct Span {
    int64_t begin, end, delay = 0;
};

template <int C>
struct Slots {
    Slots(Span const& s, int64_t block) {
        int64_t const slot = block * C - s.delay;
        first = slot < 0 ? -slot : 0;
        token = s.begin + slot + first;
        count = min_of(s.end - token, C - first);
        if (count < 0) count = 0;
    }
    int64_t token, first, count;
};

// One head of a [B, T, H, ...] tensor.
class Head {
  protected:
    Head(Rows const& rows, Dtype dtype, int64_t batch, int64_t head, Span const& span)
        : span_(span), stride_(rows.time), bytes_(bytes_of(dtype)) {
        data_ = static_cast<char*>(rows.data) + (batch * rows.batch + head * rows.head) * bytes_;
    }
    char* at(int64_t token) const { return data_ + token * stride_ * bytes_; }

    Span span_;
    char* data_;
    int64_t stride_, bytes_;
};

// The rows of a [B, T, H, D] tensor, or its columns from `column` on; the dtype is settled here,
// once per task.
template <class T, int C>
class HeadRows : Head {
  public:
    HeadRows(Rows const& rows, Dtype dtype, int64_t batch, int64_t head, Span const& span,
             int64_t columns, int64_t column = 0)
        : Head(rows, dtype, batch, head, span), columns_(columns) {
        data_ += column * bytes_;
        with_element<T>(dtype, [&](auto zero) {
            using Element = decltype(zero);
            pack_ = pack<T, Element, C>, unpack_ = unpack<T, Element, C>;
            pack_rows_ = pack_rows<T, Element>, first_of_ = first_element<T, Element>;
        });
    }

    // A block to and from panels.
    void read(T* dst, int64_t block, T scale = 1) const {
        Slots<C> const s(span_, block);
        pack_(dst, at(s.token), stride_, s.first, s.count, columns_, scale);
    }
    void write(T const* src, int64_t block, T scale = 1) const {
        Slots<C> const s(span_, block);
        unpack_(at(s.token), src, stride_, s.first, s.count, columns_, scale);
    }

    // Of single tokens: `count` rows from the i-th on, dst's `width` apart; and what a row begins with.
    void read_rows(T* dst, int64_t width, int64_t i, int64_t count, T scale = 1) const {
        pack_rows_(dst, width, at(span_.begin + i), stride_, count, columns_, scale);
    }
    T first_of(int64_t i) const { return first_of_(at(span_.begin + i)); }

    // Asks for a block ahead of its use: a head's rows lie H rows apart, too far for the hardware.
    // Always inline: a function that does nothing else is taken for one without effect.
    LSM_INLINE void prefetch(int64_t block) const {
        Slots<C> const s(span_, block);
        char const* row = at(s.token);
        for (int64_t i = 0; i < s.count; ++i, row += stride_ * bytes_) {
            for (int64_t line = 0; line < columns_ * bytes_; line += 64)
                __builtin_prefetch(row + line);
        }
    }

  private:
    int64_t columns_;
    void (*pack_)(T*, void const*, int64_t, int64_t, int64_t, int64_t, T);
    void (*unpack_)(void*, T const*, int64_t, int64_t, int64_t, int64_t, T);
    void (*pack_rows_)(T*, int64_t, void const*, int64_t, int64_t, int64_t, T);
    T (*first_of_)(void const*);
};

// The scalars of a [B, T, H] tensor.
template <class T, int C>
class HeadScalars : Head {
  public:
    HeadScalars(Rows const& rows, Dtype dtype, int64_t batch, int64_t head, Span const& span)
        : Head(rows, dtype, batch, head, span) {
        with_element<T>(dtype, [&](auto zero) {
            gather_ = gather<T, decltype(zero), C>, scatter_ = scatter<T, decltype(zero), C>;
        });
    }
    void read(T* dst, int64_t block) const {
        Slots<C> const s(span_, block);
        gather_(dst, at(s.token), stride_, s.first, s.count);
    }
    void write(T const* src, int64_t block) const {
        Slots<C> const s(span_, block);
        scatter_(at(s.token), src, stride_, s.first, s.count);
    }

  private:
    void (*gather_)(T*, void const*, int64_t, int64_t, int64_t);
    void (*scatter_)(void*, T const*, int64_t, int64_t, int64_t);
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
