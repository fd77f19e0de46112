// The scan engine's kernels for one instruction set: token after token, all channels of a block, whose
// states lie in the first cache. What a token does to a channel is a policy: Gate, ConstantGate, RgLru.
#pragma once

#include "logistic.h"
#include "numbers.h"
#include "scan_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// h -> a h + x
template <class N>
struct Affine {
    N a, x;
};

// One block of channels of a task: rows of its tokens, and of states.
template <class N_, class In_>
struct Block {
    using N = N_;
    using T = typename N::Component;
    using In = In_;
    static constexpr int W = kLanes<T>;

    ScanParams const& p;
    ScanTask const& task;

    int64_t position(int64_t i) const { return p.reverse ? task.end - 1 - i : task.begin + i; }
    int64_t token(int64_t position) const {
        return p.order == nullptr ? position : p.order[position];
    }
    template <class E>
    E* row(Rows const& r, int64_t token) const {
        return static_cast<E*>(r.data) + (task.batch * r.batch + token * r.time) * N::kComponents;
    }
    // f(c, count, index of the vector in the block)
    template <class F>
    LSM_INLINE void channels(F const& f) const {
        int64_t c = task.c_begin, v = 0;
        for (; c + W <= task.c_end; c += W, ++v) f(c, int64_t(W), v);
        if (c < task.c_end) f(c, task.c_end - c, v);
    }
    N read_row(void const* row, int64_t c, int64_t count) const {
        return row == nullptr ? N{}
                              : read<N>(static_cast<T const*>(row) + c * N::kComponents, count);
    }
    void write_row(void* row, int64_t c, int64_t count, N x) const {
        if (row != nullptr) write(static_cast<T*>(row) + c * N::kComponents, x, count);
    }
};

// a [B, T, D], or its logarithm.
template <class B, class G, bool kLog>
struct Gate {
    using N = typename B::N;
    using In = typename B::In;
    struct Token {
        In const* x;
        G const* a;
        In* dx;
        G* da;
    };
    B const& b;

    void prepare(N*) const {}
    Token at(int64_t token, bool, bool backward) const {
        Token t{b.template row<In const>(b.p.x, token), b.template row<G const>(b.p.a, token),
                nullptr, nullptr};
        if (backward) t.dx = b.template row<In>(b.p.dx, token);
        if (backward && b.p.da.data != nullptr) t.da = b.template row<G>(b.p.da, token);
        return t;
    }
    LSM_INLINE N gate(Token const& t, int64_t c, int64_t count, N const*) const {
        N const a = read<N>(t.a + c * N::kComponents, count);
        return kLog ? exp(a) : a;
    }
    LSM_INLINE Affine<N> load(Token const& t, int64_t c, int64_t count, N const* channel) const {
        return {gate(t, c, count, channel), read<N>(t.x + c * N::kComponents, count)};
    }
    // dh: gradient of the state after the token; before: the state before it.
    LSM_INLINE void gradients(Token const& t, int64_t c, int64_t count, N const*, N a, N dh,
                              N before, N&) const {
        write(t.dx + c * N::kComponents, dh, count);
        if (t.da == nullptr) return;
        N const da = dh * conj(before);
        write(t.da + c * N::kComponents, kLog ? da * conj(a) : da, count);
    }
    LSM_INLINE N finish(N sum, N const*) const { return sum; }
    bool needs_before(Token const& t) const { return t.da != nullptr; }
};

// a [D], or its logarithm.
template <class B>
struct ConstantGate {
    using N = typename B::N;
    using In = typename B::In;
    struct Token {
        In const* x;
        In* dx;
    };
    B const& b;

    void prepare(N* channel) const {
        b.channels([&](int64_t c, int64_t count, int64_t v) {
            N const a = b.read_row(b.p.channel, c, count);
            channel[v] = b.p.log ? exp(a) : a;
        });
    }
    Token at(int64_t token, bool, bool backward) const {
        return {b.template row<In const>(b.p.x, token),
                backward ? b.template row<In>(b.p.dx, token) : nullptr};
    }
    LSM_INLINE N gate(Token const&, int64_t, int64_t, N const* channel) const { return *channel; }
    LSM_INLINE Affine<N> load(Token const& t, int64_t c, int64_t count, N const* channel) const {
        return {*channel, read<N>(t.x + c * N::kComponents, count)};
    }
    LSM_INLINE void gradients(Token const& t, int64_t c, int64_t count, N const*, N, N dh, N before,
                              N& sum) const {
        write(t.dx + c * N::kComponents, dh, count);
        sum = sum + dh * conj(before);
    }
    LSM_INLINE N finish(N sum, N const* channel) const {
        return b.p.log ? sum * conj(*channel) : sum;
    }
    bool needs_before(Token const&) const { return b.task.channel_grad != nullptr; }
};

// 1 / sqrt(x) for x > 0, to about 1 ulp.
LSM_INLINE Vector<float> reciprocal_sqrt(Vector<float> x) {
#if LSM_CPU_VECTOR_BYTES == 64
    Vector<float> const y = Vector<float>(_mm512_maskz_rsqrt14_ps(0xffff, __m512(x)));
    return y * (1.5f - 0.5f * x * y * y);
#else
    return 1.0f / sqrt(x);
#endif
}
LSM_INLINE Vector<double> reciprocal_sqrt(Vector<double> x) {
    return 1.0 / sqrt(x);
}

// a = 2^x and 1 − a², x <= 0, both precise, also near 1 and 0: with 2^x = 2^n (1 + y), n the integer nearest to x, 1 − a
// is (1 − 2^n) − 2^n y.
struct Decay {
    LSM_INLINE explicit Decay(Vector<float> x) {
        using V = Vector<float>;
#if LSM_CPU_VECTOR_BYTES == 64
        V const r = V(_mm512_maskz_reduce_ps(0xffff, __m512(x), _MM_FROUND_TO_NEAREST_INT));
        V const n = x - r;
#else
        x = bounded(x, -160.0f, 130.0f);
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        V const n = (x + kRound) - kRound, r = x - n;
#endif
        V y = V{} + 1.540351278e-4f;
        for (float const c :
             {1.339073550e-3f, 9.618237494e-3f, 5.550357434e-2f, 2.402264979e-1f, 6.931471879e-1f})
            y = y * r + c;
        V const power = scale_by_power_of_two(V{} + 1.0f, n), step = power * (y * r);
        a = power + step;
        one_minus_square = ((1.0f - power) - step) * (1.0f + a);
    }
    Vector<float> a, one_minus_square;
};
// The same in fp64, of a natural logarithm.
struct PreciseDecay {
    LSM_INLINE explicit PreciseDecay(Vector<double> x)
        : a(exp(x)),
          one_minus_square(each_lane<double>(x, [](double v) { return -std::expm1(2 * v); })) {}
    Vector<double> a, one_minus_square;
};

// log a = c σ(r), x scaled by m σ(i), m = sqrt(1 - a²), or 1 at a first token.
template <class B>
struct RgLru {
    using N = typename B::N;
    using In = typename B::In;
    using T = typename B::T;
    using V = Vector<T>;
    struct Token {
        In const *x, *i, *r;
        In *dx, *di, *dr;
        bool first;
    };
    B const& b;

    void prepare(N* channel) const {
        b.channels([&](int64_t c, int64_t count, int64_t v) {
            channel[v] = {b.read_row(b.p.channel, c, count).re * T(kSingle ? kLog2e : 1)};
        });
    }
    Token at(int64_t token, bool first, bool backward) const {
        Token t{b.template row<In const>(b.p.x, token),
                b.template row<In const>(b.p.i, token),
                b.template row<In const>(b.p.a, token),
                nullptr,
                nullptr,
                nullptr,
                first && b.p.initial_state == nullptr};
        if (backward) {
            t.dx = b.template row<In>(b.p.dx, token), t.di = b.template row<In>(b.p.di, token);
            t.dr = b.template row<In>(b.p.da, token);
        }
        return t;
    }
    static constexpr bool kSingle = std::is_same_v<T, float>;
    using Decays = std::conditional_t<kSingle, Decay, PreciseDecay>;
    static constexpr T kUnit = T(kSingle ? 1 / kLog2e : 1);  // of its argument, and of `channel`

    // m = sqrt(1 - a²), and 1 / m; that ends at 2000, as in the paper's code the root's slope at 1000.
    struct Root {
        LSM_INLINE explicit Root(V square) {
            V const inverse = reciprocal_sqrt(max_of(square, V{} + T(1e-30)));
            m = square * inverse;
            slope = inverse < T(2000) ? inverse : V{} + T(2000);
        }
        V m, slope;
    };
    LSM_INLINE Decays decay(V r, N const* channel) const { return Decays(channel->re * r); }
    LSM_INLINE N gate(Token const& t, int64_t c, int64_t count, N const* channel) const {
        return {decay(logistic<T>(read<N>(t.r + c, count).re), channel).a};
    }
    LSM_INLINE Affine<N> load(Token const& t, int64_t c, int64_t count, N const* channel) const {
        Decays const d = decay(logistic<T>(read<N>(t.r + c, count).re), channel);
        V const x = read<N>(t.x + c, count).re, i = read<N>(t.i + c, count).re;
        V const m = t.first ? V{} + 1 : Root(d.one_minus_square).m;
        return {{d.a}, {m * logistic<T>(i) * x}};
    }
    LSM_INLINE void gradients(Token const& t, int64_t c, int64_t count, N const* channel, N a, N dh,
                              N before, N& sum) const {
        V const x = read<N>(t.x + c, count).re, i = logistic<T>(read<N>(t.i + c, count).re);
        V const r = logistic<T>(read<N>(t.r + c, count).re);
        Root const root(decay(r, channel).one_minus_square);
        V const m = t.first ? V{} + 1 : root.m, through = dh.re * i;
        write(t.dx + c, N{through * m}, count);
        write(t.di + c, N{through * m * x * (1 - i)}, count);
        V const through_m = t.first ? V{} : through * x * (a.re * a.re * root.slope);
        V const d = (a.re * dh.re * before.re - through_m) * r;  // of log a, times r
        write(t.dr + c, N{d * (channel->re * kUnit) * (1 - r)}, count);
        sum.re += d;
    }
    LSM_INLINE N finish(N sum, N const*) const { return sum; }
    bool needs_before(Token const&) const { return true; }
};

template <class N>
N* panels_of(void* scratch, int64_t which, int64_t vectors) {
    return static_cast<N*>(scratch) + which * vectors;
}

template <class B>
int64_t vectors_of(int64_t channels) {
    return (channels + B::W - 1) / B::W;
}

template <class B, class Policy, bool kOutputs>
void scan_forward(B const& b, Policy const& policy, void* scratch) {
    using N = typename B::N;
    int64_t const vectors = vectors_of<B>(b.task.c_end - b.task.c_begin);
    N* const channel = panels_of<N>(scratch, 0, vectors);
    N* const state = panels_of<N>(scratch, 1, vectors);
    N* const decay = panels_of<N>(scratch, 2, vectors);
    policy.prepare(channel);
    b.channels([&](int64_t c, int64_t count, int64_t v) {
        state[v] = b.read_row(b.task.state_begin, c, count);
        if (!kOutputs) decay[v] = one<N>();
    });
    for (int64_t i = 0, n = b.task.end - b.task.begin; i < n; ++i) {
        int64_t const token = b.token(b.position(i));
        auto const t = policy.at(token, b.task.first && i == 0, false);
        auto* const h = b.template row<typename B::In>(b.p.h, token);
        b.channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
            Affine<N> const e = policy.load(t, c, count, channel + v);
            state[v] = e.a * state[v] + e.x;
            if constexpr (kOutputs) {
                write(h + c * N::kComponents, state[v], count);
            } else {
                decay[v] = e.a * decay[v];
            }
        });
    }
    b.channels([&](int64_t c, int64_t count, int64_t v) {
        b.write_row(b.task.state_end, c, count, state[v]);
        if (!kOutputs) b.write_row(b.task.decay, c, count, decay[v]);
    });
}

template <class B, class Policy, bool kOutputs>
void scan_backward(B const& b, Policy const& policy, void* scratch) {
    using N = typename B::N;
    using In = typename B::In;
    int64_t const vectors = vectors_of<B>(b.task.c_end - b.task.c_begin);
    N* const channel = panels_of<N>(scratch, 0, vectors);
    N* const grad = panels_of<N>(scratch, 1, vectors);   // of the state after the token, less dy
    N* const extra = panels_of<N>(scratch, 2, vectors);  // sums per channel, or the decay
    policy.prepare(channel);
    b.channels([&](int64_t c, int64_t count, int64_t v) {
        grad[v] = b.read_row(b.task.grad_end, c, count);
        extra[v] = kOutputs ? N{} : one<N>();
    });
    for (int64_t i = b.task.end - b.task.begin; i-- > 0;) {
        int64_t const position = b.position(i), token = b.token(position);
        bool const first = b.task.first && i == 0;
        auto const t = policy.at(token, first, true);
        auto const* const dy = b.template row<In const>(b.p.grad_h, token);
        if constexpr (!kOutputs) {
            b.channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                N const a = conj(policy.gate(t, c, count, channel + v));
                grad[v] = a * (read<N>(dy + c * N::kComponents, count) + grad[v]);
                extra[v] = a * extra[v];
            });
        } else {
            In const* before = nullptr;
            if (!first && policy.needs_before(t)) {
                before = b.template row<In const>(
                    b.p.h, b.token(b.p.reverse ? position + 1 : position - 1));
            }
            void const* const start = first ? b.task.state_begin : nullptr;
            b.channels([&](int64_t c, int64_t count, int64_t v) __attribute__((always_inline)) {
                N const a = policy.gate(t, c, count, channel + v);
                N const dh = read<N>(dy + c * N::kComponents, count) + grad[v];
                N const h = before != nullptr ? read<N>(before + c * N::kComponents, count)
                                              : b.read_row(start, c, count);
                policy.gradients(t, c, count, channel + v, a, dh, h, extra[v]);
                grad[v] = conj(a) * dh;
            });
        }
    }
    b.channels([&](int64_t c, int64_t count, int64_t v) {
        b.write_row(b.task.grad_begin, c, count, grad[v]);
        if constexpr (kOutputs) {
            b.write_row(b.task.channel_grad, c, count, policy.finish(extra[v], channel + v));
        } else {
            b.write_row(b.task.decay, c, count, extra[v]);
        }
    });
}

// run(block, policy) with the numbers, the dtype and the policy at hand.
template <class N, class In, class Run>
void with_policy(ScanParams const& p, ScanTask const& task, Run const& run) {
    using B = Block<N, In>;
    B const b{p, task};
    auto const gated = [&](auto gate) {
        using G = decltype(gate);
        if (p.log) {
            run(b, Gate<B, G, true>{b});
        } else {
            run(b, Gate<B, G, false>{b});
        }
    };
    if (p.kind == Scan::constant) return run(b, ConstantGate<B>{b});
    if constexpr (N::kComponents == 1) {
        if (p.kind == Scan::rg_lru) return run(b, RgLru<B>{b});
    }
    if constexpr (sizeof(In) < sizeof(typename N::Component)) {
        if (p.gate_dtype == Dtype::f32) return gated(float{});
    }
    gated(In{});
}

template <class Run>
void with_scan(ScanParams const& p, ScanTask const& task, Run const& run) {
    if (p.is_complex) {
        return with_accumulator(p.dtype, [&](auto zero) {
            using T = decltype(zero);
            with_policy<Complex<T>, T>(p, task, run);
        });
    }
    with_types(p.dtype, [&](auto zero, auto element) {
        with_policy<Real<decltype(zero)>, decltype(element)>(p, task, run);
    });
}

int64_t scan_scratch_bytes(ScanParams const& p, int64_t channels) {
    int64_t const lanes = p.dtype == Dtype::f64 ? kLanes<double> : kLanes<float>;
    return 3 * ((channels + lanes - 1) / lanes) * kVectorBytes * (p.is_complex ? 2 : 1);
}

template <bool kOutputs>
void scan_forward_any(ScanParams const& p, ScanTask const& task, void* scratch) {
    with_scan(p, task, [&](auto const& b, auto const& policy) {
        scan_forward<std::decay_t<decltype(b)>, std::decay_t<decltype(policy)>, kOutputs>(b, policy,
                                                                                          scratch);
    });
}

template <bool kOutputs>
void scan_backward_any(ScanParams const& p, ScanTask const& task, void* scratch) {
    with_scan(p, task, [&](auto const& b, auto const& policy) {
        scan_backward<std::decay_t<decltype(b)>, std::decay_t<decltype(policy)>, kOutputs>(
            b, policy, scratch);
    });
}

}  // namespace

constinit ScanKernels const scan_kernels{scan_scratch_bytes, scan_forward_any<true>,
                                         scan_forward_any<false>, scan_backward_any<true>,
                                         scan_backward_any<false>};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
