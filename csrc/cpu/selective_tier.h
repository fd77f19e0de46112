// The selective scan for one instruction set. Channels lie in the lanes of vectors, states in
// registers: a tile of tokens is walked vector after vector, so that nothing of size [T, D, S] is ever
// written, and B and C are broadcast. The backward first walks forwards and keeps the states at the
// tiles' beginnings, then takes the tiles from the last to the first, each walked again with its
// states and decays kept.
#pragma once

#include "numbers.h"
#include "selective_kernels.h"
#include "selective_step.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

inline constexpr int kTile = 16;  // tokens: their states and decays stay in the first cache

template <class T>
LSM_INLINE Real<T> scaled(Real<T> a, Vector<T> s) {
    return {a.re * s};
}
template <class T>
LSM_INLINE Complex<T> scaled(Complex<T> a, Vector<T> s) {
    return {a.re * s, a.im * s};
}
// Re(a b)
template <class T>
LSM_INLINE Vector<T> real_product(Real<T> a, Real<T> b) {
    return a.re * b.re;
}
template <class T>
LSM_INLINE Vector<T> real_product(Complex<T> a, Complex<T> b) {
    return a.re * b.re - a.im * b.im;
}

// exp(dt A), from what prepare() makes of A.
template <class T>
LSM_INLINE Real<T> decay(Real<T> a_log2, Vector<T> dt) {
    return {exp2(a_log2.re * dt)};
}
template <class T>
LSM_INLINE Complex<T> decay(Complex<T> a, Vector<T> dt) {
    Vector<T> s{}, c{};
    sin_cos(a.im * dt, s, c);
    Vector<T> const r = exp2(a.re * dt);
    return {r * c, r * s};
}
template <class T>
LSM_INLINE Real<T> log2_rate(Real<T> a) {
    return {a.re * T(kLog2e)};
}
template <class T>
LSM_INLINE Complex<T> log2_rate(Complex<T> a) {  // the phase stays natural
    return {a.re * T(kLog2e), a.im};
}

// A number of every lane from one in memory.
template <class N>
LSM_INLINE N broadcast(typename N::Component const* p) {
    using T = typename N::Component;
    if constexpr (N::kComponents == 1) {
        return {splat<T>(p[0])};
    } else {
        return {splat<T>(p[0]), splat<T>(p[1])};
    }
}

template <class N_, class In_, int kStates_>
class Selective {
  public:
    using N = N_;
    using In = In_;
    using T = typename N::Component;
    using V = Vector<T>;
    static constexpr int W = kLanes<T>, K = N::kComponents;
    static constexpr int kStates = kStates_;  // in registers at once

    Selective(SelectiveParams const& p, SelectiveTask const& task, void* scratch)
        : p(p),
          task(task),
          S(round_up_to(p.S, kStates)),
          vectors((task.c_end - task.c_begin + W - 1) / W),
          free_(static_cast<char*>(scratch)) {
        A = take<N>(vectors * S);
        channel_b = take<N>(p.channel_B ? vectors * S : 0);
        channel_c = take<N>(p.channel_C ? vectors * S : 0);
        state = take<N>(vectors * S);
        tile_b = take<T>(kTile * S * K);
        tile_c = take<T>(kTile * S * K);
    }

    static int64_t bytes(SelectiveParams const& p, int64_t tokens, bool backward) {
        SelectiveTask task{};
        task.c_end = p.D / p.G;
        Selective s(p, task, nullptr);
        if (backward) s.take_backward(tokens);
        return s.free_ - static_cast<char*>(nullptr);
    }

    void forward() {
        prepare();
        for (int64_t n = task.n_begin; n < task.n_end; ++n) {
            locate(n);
            load_states(p.initial_state, state);
            for (int64_t t = begin; t < end; t += kTile) {
                int64_t const tokens = min_of(kTile, end - t);
                load_bc(t, tokens);
                channels([&](int64_t c, int64_t count, int64_t v) {
                    Prologue const x(*this, t, tokens, c, count);
                    V y[kTile] = {};
                    for (int64_t s = 0; s < S; s += kStates) walk(v, s, tokens, x, y);
                    finish(t, tokens, c, count, x, y);
                });
            }
            store_states(p.final_state, state);
        }
    }

    void backward() {
        int64_t longest = 0;
        for (int64_t n = task.n_begin; n < task.n_end; ++n) {
            locate(n);
            longest = longest > end - begin ? longest : end - begin;
        }
        take_backward(longest);
        prepare();
        for (int64_t i = 0; i < vectors * S; ++i) dA[i] = dB[i] = dC[i] = N{};
        for (int64_t v = 0; v < vectors; ++v) dskip[v] = dbias[v] = V{};
        for (int64_t n = task.n_begin; n < task.n_end; ++n) sequence_backward(n);
        store_channel_grads();
    }

  private:
    static int64_t round_up_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

    template <class E>
    E* take(int64_t count) {
        E* const at = reinterpret_cast<E*>(free_);
        free_ += round_up_to(count * int64_t(sizeof(E)), 64);
        return at;
    }

    void take_backward(int64_t tokens) {
        grad = take<N>(vectors * S);
        dA = take<N>(vectors * S);
        dB = take<N>(vectors * S);
        dC = take<N>(vectors * S);
        dskip = take<V>(vectors);
        dbias = take<V>(vectors);
        tile_db = take<N>(kTile * S);
        tile_dc = take<N>(kTile * S);
        kept_h = take<N>((kTile + 1) * kStates);
        kept_a = take<N>(kTile * kStates);
        checkpoints = take<N>((tokens + kTile - 1) / kTile * vectors * S);
    }

    template <class F>
    LSM_INLINE void channels(F const& f) const {
        int64_t c = task.c_begin, v = 0;
        for (; c + W <= task.c_end; c += W, ++v) f(c, int64_t(W), v);
        if (c < task.c_end) f(c, task.c_end - c, v);
    }

    // Number s of each of `count` channels of a [.., D, S] tensor.
    LSM_INLINE N gather(void const* data, int64_t row, int64_t c, int64_t count, int64_t s) const {
        T components[2 * W] = {};
        auto const* const from = static_cast<T const*>(data) + ((row * p.D + c) * p.S + s) * K;
        for (int64_t i = 0; i < count; ++i) {
            for (int k = 0; k < K; ++k) components[i * K + k] = from[i * p.S * K + k];
        }
        return read<N>(static_cast<T const*>(components), W);
    }
    LSM_INLINE void scatter(void* data, int64_t row, int64_t c, int64_t count, int64_t s,
                            N x) const {
        T components[2 * W] = {};
        write(components, x, W);
        auto* const to = static_cast<T*>(data) + ((row * p.D + c) * p.S + s) * K;
        for (int64_t i = 0; i < count; ++i) {
            for (int k = 0; k < K; ++k) to[i * p.S * K + k] = components[i * K + k];
        }
    }

    void prepare() {
        channels([&](int64_t c, int64_t count, int64_t v) {
            for (int64_t s = 0; s < S; ++s) {
                auto const of = [&](void const* data) {
                    return s < p.S ? gather(data, 0, c, count, s) : N{};
                };
                A[v * S + s] = log2_rate(of(p.A));
                if (p.channel_B) channel_b[v * S + s] = of(p.b.data);
                if (p.channel_C) channel_c[v * S + s] = of(p.c.data);
            }
        });
    }

    void locate(int64_t n) {
        bool const packed = p.cu_seqlens != nullptr;
        sequence = n, batch = packed ? 0 : n;
        auto const boundary = [&](int64_t i) {
            return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(p.cu_seqlens)[i]
                                         : static_cast<int32_t const*>(p.cu_seqlens)[i];
        };
        begin = packed ? boundary(n) : 0, end = packed ? boundary(n + 1) : p.T;
    }

    void load_states(void const* states, N* to) const {
        channels([&](int64_t c, int64_t count, int64_t v) {
            for (int64_t s = 0; s < S; ++s) {
                to[v * S + s] =
                    states != nullptr && s < p.S ? gather(states, sequence, c, count, s) : N{};
            }
        });
    }
    void store_states(void* states, N const* from) const {
        if (states == nullptr) return;
        channels([&](int64_t c, int64_t count, int64_t v) {
            for (int64_t s = 0; s < p.S; ++s)
                scatter(states, sequence, c, count, s, from[v * S + s]);
        });
    }

    int64_t token(int64_t position) const {
        return p.order == nullptr ? position : p.order[position];
    }
    // The row of a position's token.
    template <class E>
    E* at(Rows const& r, int64_t position) const {
        return static_cast<E*>(r.data) + batch * r.batch + token(position) * r.time;
    }

    // A tile of one vector of channels. Where channels lie apart, their rows are turned around.
    LSM_INLINE void read_tile(Rows const& r, int64_t t, int64_t tokens, int64_t c, int64_t count,
                              V* x) const {
        if (r.head == 1) {
            for (int64_t i = 0; i < tokens; ++i)
                x[i] = read<Real<T>>(at<In const>(r, t + i) + c, count).re;
            return;
        }
        for (int64_t i = 0; i < tokens; i += W) {
            int64_t const n = min_of(W, tokens - i);
            V square[W] = {};
            for (int64_t j = 0; j < count; ++j)
                square[j] = read<Real<T>>(at<In const>(r, t + i) + (c + j) * r.head, n).re;
            transpose<T>(square);
            for (int64_t k = 0; k < n; ++k) x[i + k] = square[k];
        }
    }
    LSM_INLINE void write_tile(Rows const& r, int64_t t, int64_t tokens, int64_t c, int64_t count,
                               V const* x) const {
        if (r.head == 1) {
            for (int64_t i = 0; i < tokens; ++i) write(at<In>(r, t + i) + c, Real<T>{x[i]}, count);
            return;
        }
        for (int64_t i = 0; i < tokens; i += W) {
            int64_t const n = min_of(W, tokens - i);
            V square[W] = {};
            for (int64_t k = 0; k < n; ++k) square[k] = x[i + k];
            transpose<T>(square);
            for (int64_t j = 0; j < count; ++j)
                write(at<In>(r, t + i) + (c + j) * r.head, Real<T>{square[j]}, n);
        }
    }

    // B and C of a tile's tokens, widened; states past S are zero.
    void load_bc(int64_t t, int64_t tokens) const {
        for (int64_t i = 0; i < tokens; ++i) {
            if (!p.channel_B) load_row(p.b, t + i, tile_b + i * S * K);
            if (!p.channel_C) load_row(p.c, t + i, tile_c + i * S * K);
        }
    }
    void load_row(Rows const& r, int64_t position, T* to) const {
        In const* const from =
            static_cast<In const*>(r.data) +
            (batch * r.batch + token(position) * r.time + task.group * r.head) * K;
        for (int64_t s = 0; s < S * K; s += W) {
            int64_t const left = p.S * K - s, room = S * K - s;
            V const x = left <= 0  ? V{}
                        : left < W ? widen_first<T>(from + s, left)
                                   : widen(from + s);
            if (room >= W) {
                store(to + s, x);
            } else {
                for (int64_t i = 0; i < room; ++i) to[s + i] = x[i];
            }
        }
    }
    // B or C of state s of a token of the tile, or of a vector of channels.
    template <bool kChannelBC>
    LSM_INLINE N b_of(T const* b, int64_t v, int64_t s) const {
        return kChannelBC && p.channel_B ? channel_b[v * S + s] : broadcast<N>(b + s * K);
    }
    template <bool kChannelBC>
    LSM_INLINE N c_of(T const* c, int64_t v, int64_t s) const {
        return kChannelBC && p.channel_C ? channel_c[v * S + s] : broadcast<N>(c + s * K);
    }

    LSM_INLINE V channel(void const* data, int64_t c, int64_t count) const {
        return data == nullptr ? V{} : read<Real<T>>(static_cast<T const*>(data) + c, count).re;
    }

    // u and dt of a tile of one vector of channels.
    struct Prologue {
        V u[kTile], dt[kTile], raw[kTile];
        LSM_INLINE Prologue(Selective const& s, int64_t t, int64_t tokens, int64_t c,
                            int64_t count) {
            V const bias = s.channel(s.p.dt_bias, c, count);
            s.read_tile(s.p.u, t, tokens, c, count, u);
            s.read_tile(s.p.dt, t, tokens, c, count, raw);
            for (int64_t i = 0; i < tokens; ++i) {
                raw[i] += bias;
                dt[i] = s.p.softplus ? softplus(raw[i]) : raw[i];
            }
        }
    };

    // A tile of one vector of channels and kStates states; kKeep: their h and a stay.
    template <bool kKeep = false, bool kChannelBC = false>
    LSM_INLINE void walk_tile(int64_t v, int64_t s0, int64_t tokens, Prologue const& x, V* y) {
        N h[kStates];
        N const* const a_log2 = A + v * S + s0;
        for (int s = 0; s < kStates; ++s) h[s] = state[v * S + s0 + s];
        if constexpr (kKeep) {
            for (int s = 0; s < kStates; ++s) kept_h[s] = h[s];
        }
        for (int64_t i = 0; i < tokens; ++i) {
            V const dt = x.dt[i], du = dt * x.u[i];
            T const *const b = tile_b + i * S * K, *const c = tile_c + i * S * K;
            V sum = y[i];
#pragma GCC unroll 16
            for (int s = 0; s < kStates; ++s) {
                N const a = decay(a_log2[s], dt);
                N const bn = b_of<kChannelBC>(b, v, s0 + s), cn = c_of<kChannelBC>(c, v, s0 + s);
                h[s] = a * h[s] + scaled(bn, du);
                sum += real_product(cn, h[s]);
                if constexpr (kKeep) {
                    kept_a[i * kStates + s] = a;
                    kept_h[(i + 1) * kStates + s] = h[s];
                }
            }
            y[i] = sum;
        }
        for (int s = 0; s < kStates; ++s) state[v * S + s0 + s] = h[s];
    }
    template <bool kKeep = false>
    LSM_INLINE void walk(int64_t v, int64_t s0, int64_t tokens, Prologue const& x, V* y) {
        if (p.channel_B || p.channel_C) {
            walk_tile<kKeep, true>(v, s0, tokens, x, y);
        } else {
            walk_tile<kKeep>(v, s0, tokens, x, y);
        }
    }

    static constexpr T kReadFactor = K == 2 ? 2 : 1;  // y = 2 Re(C h) of conjugate pairs

    LSM_INLINE void finish(int64_t t, int64_t tokens, int64_t c, int64_t count, Prologue const& x,
                           V* y) const {
        V const skip = channel(p.skip, c, count);
        for (int64_t i = 0; i < tokens; ++i) y[i] = kReadFactor * y[i] + skip * x.u[i];
        if (p.z.data != nullptr) {
            V z[kTile];
            read_tile(p.z, t, tokens, c, count, z);
            for (int64_t i = 0; i < tokens; ++i) y[i] = y[i] * z[i] * sigmoid(z[i]);
        }
        write_tile(p.y, t, tokens, c, count, y);
    }

    void sequence_backward(int64_t n) {
        locate(n);
        load_states(p.initial_state, state);
        for (int64_t t = begin, k = 0; t < end; t += kTile, ++k) {
            for (int64_t i = 0; i < vectors * S; ++i) checkpoints[k * vectors * S + i] = state[i];
            if (t + kTile >= end) break;
            load_bc(t, kTile);
            channels([&](int64_t c, int64_t count, int64_t v) {
                Prologue const x(*this, t, kTile, c, count);
                V y[kTile] = {};
                for (int64_t s = 0; s < S; s += kStates) walk(v, s, kTile, x, y);
            });
        }
        load_states(p.grad_final_state, grad);
        for (int64_t k = (end - begin + kTile - 1) / kTile; k-- > 0;) tile_backward(k);
        store_states(p.grad_initial_state, grad);
    }

    void tile_backward(int64_t k) {
        int64_t const t = begin + k * kTile, tokens = min_of(kTile, end - t);
        load_bc(t, tokens);
        for (int64_t i = 0; i < kTile * S; ++i) tile_db[i] = tile_dc[i] = N{};
        channels([&](int64_t c, int64_t count, int64_t v) {
            Prologue const x(*this, t, tokens, c, count);
            for (int64_t s = 0; s < S; ++s)
                state[v * S + s] = checkpoints[(k * vectors + v) * S + s];
            V y[kTile] = {}, dy[kTile], ddt[kTile] = {}, ddu[kTile] = {};
            V const skip = channel(p.skip, c, count);
            V z[kTile], out[kTile];  // out: the gradient of what z gated
            read_tile(p.grad_y, t, tokens, c, count, out);
            if (p.z.data != nullptr) read_tile(p.z, t, tokens, c, count, z);
            for (int64_t i = 0; i < tokens; ++i)
                dy[i] = p.z.data != nullptr ? out[i] * z[i] * sigmoid(z[i]) : out[i];
            for (int64_t s = 0; s < S; s += kStates) {
                walk<true>(v, s, tokens, x, y);
                if (p.channel_B || p.channel_C) {
                    states_backward<true>(v, s, tokens, x, dy, ddt, ddu);
                } else {
                    states_backward<false>(v, s, tokens, x, dy, ddt, ddu);
                }
            }
            V sum_bias{}, sum_skip{};
            for (int64_t i = 0; i < tokens; ++i) {
                if (p.z.data != nullptr) {
                    V const gate = sigmoid(z[i]), before = kReadFactor * y[i] + skip * x.u[i];
                    z[i] = out[i] * before * gate * (1 + z[i] * (1 - gate));
                }
                ddt[i] += x.u[i] * ddu[i];
                if (p.softplus) ddt[i] = ddt[i] * sigmoid(x.raw[i]);
                ddu[i] = x.dt[i] * ddu[i] + skip * dy[i];
                sum_bias += ddt[i], sum_skip += x.u[i] * dy[i];
            }
            if (p.z.data != nullptr) write_tile(p.dz, t, tokens, c, count, z);
            write_tile(p.du, t, tokens, c, count, ddu);
            write_tile(p.ddt, t, tokens, c, count, ddt);
            dbias[v] += sum_bias, dskip[v] += sum_skip;
        });
        store_tile(task.db, tile_db, t, tokens);
        store_tile(task.dc, tile_dc, t, tokens);
    }

    // The adjoint through a tile, last token first: g is the gradient of the state after the token.
    template <bool kChannelBC>
    LSM_INLINE void states_backward(int64_t v, int64_t s0, int64_t tokens, Prologue const& x,
                                    V const* dy, V* ddt, V* ddu) {
        N* const g_all = grad + v * S + s0;
        for (int64_t i = tokens; i-- > 0;) {
            V const dt = x.dt[i], du = dt * x.u[i], out = kReadFactor * dy[i];
            T const *const b = tile_b + i * S * K, *const c = tile_c + i * S * K;
            V sum_dt = ddt[i], sum_du = ddu[i];
#pragma GCC unroll 16
            for (int s = 0; s < kStates; ++s) {
                N const a = kept_a[i * kStates + s], h = kept_h[(i + 1) * kStates + s];
                N const bn = b_of<kChannelBC>(b, v, s0 + s), cn = c_of<kChannelBC>(c, v, s0 + s);
                N const g = g_all[s] + scaled(conj(cn), out);
                N const of_c = scaled(conj(h), out), of_b = scaled(g, du);
                if (kChannelBC && p.channel_C) {
                    dC[v * S + s0 + s] = dC[v * S + s0 + s] + of_c;
                } else {
                    tile_dc[i * S + s0 + s] = tile_dc[i * S + s0 + s] + of_c;
                }
                if (kChannelBC && p.channel_B) {
                    dB[v * S + s0 + s] = dB[v * S + s0 + s] + of_b;
                } else {
                    tile_db[i * S + s0 + s] = tile_db[i * S + s0 + s] + of_b;
                }
                sum_du += real_product(g, conj(bn));
                N const back = g * conj(a);  // the gradient of the state before the token
                N const q = back * conj(kept_h[i * kStates + s]);  // of dt A
                sum_dt += real_product(q, conj(rate(v, s0 + s)));
                dA[v * S + s0 + s] = dA[v * S + s0 + s] + scaled(q, dt);
                g_all[s] = back;
            }
            ddt[i] = sum_dt, ddu[i] = sum_du;
        }
    }

    // A itself.
    LSM_INLINE N rate(int64_t v, int64_t s) const {
        N a = A[v * S + s];
        a.re = a.re * T(0.69314718055994530942);
        return a;
    }

    LSM_INLINE void store_tile(void* to, N const* tile, int64_t t, int64_t tokens) const {
        if (to == nullptr) return;
        for (int64_t i = 0; i < tokens; ++i) {
            T* const row = static_cast<T*>(to) + (batch * p.T + token(t + i)) * p.S * K;
            for (int64_t s = 0; s < p.S; ++s) {
                N const x = tile[i * S + s];
                row[s * K] = sum_lanes<T>(x.re);
                if constexpr (K == 2) row[s * K + 1] = sum_lanes<T>(x.im);
            }
        }
    }

    void store_channel_grads() const {
        T* const rows = static_cast<T*>(task.channel_grads);
        auto const row = [&](int64_t i, int64_t c) { return rows + (i * p.D + c) * K; };
        channels([&](int64_t c, int64_t count, int64_t v) {
            for (int64_t s = 0; s < p.S; ++s) {
                write(row(s, c), dA[v * S + s], count);
                write(row(p.S + s, c), dB[v * S + s], count);
                write(row(2 * p.S + s, c), dC[v * S + s], count);
            }
            N skip{}, bias{};
            skip.re = dskip[v], bias.re = dbias[v];
            write(row(3 * p.S, c), skip, count);
            write(row(3 * p.S + 1, c), bias, count);
        });
    }

    SelectiveParams const& p;
    SelectiveTask const& task;
    int64_t S, vectors;
    char* free_;
    int64_t sequence = 0, batch = 0, begin = 0, end = 0;
    N *A, *channel_b, *channel_c, *state;
    T *tile_b, *tile_c;
    N *grad, *dA, *dB, *dC;
    V *dskip, *dbias;
    N *tile_db, *tile_dc, *kept_h, *kept_a, *checkpoints;
};

template <class F>
auto with_selective(SelectiveParams const& p, F const& f) {
    // As many states as the registers hold beside the rest.
    auto const sized = [&](auto number, auto in) {
        using N = decltype(number);
        using In = decltype(in);
        constexpr int kMost = (kRegisters >= 32 ? 16 : 8) / N::kComponents;
        if constexpr (!std::is_same_v<In, double>) {
            if (p.S > 4) return f(std::type_identity<Selective<N, In, kMost>>{});
        }
        return f(std::type_identity<Selective<N, In, 4>>{});
    };
    if (p.is_complex) {
        return with_accumulator(p.dtype, [&](auto zero) {
            using T = decltype(zero);
            return sized(Complex<T>{}, T{});
        });
    }
    switch (p.dtype) {
#if LSM_CPU_F64
        case Dtype::f64:
            return sized(Real<double>{}, double{});
#endif
        case Dtype::bf16:
            return sized(Real<float>{}, Bf16{});
        case Dtype::f16:
            return sized(Real<float>{}, F16{});
        default:
            return sized(Real<float>{}, float{});
    }
}

int64_t selective_scratch(SelectiveParams const& p, int64_t tokens, bool backward) {
    if (!backward && is_selective_step(p)) return 0;
    return with_selective(
        p, [&](auto type) { return decltype(type)::type::bytes(p, tokens, backward); });
}

void selective_forward(SelectiveParams const& p, SelectiveTask const& task, void* scratch) {
    if (is_selective_step(p)) {
        return with_types(p.dtype, [&](auto zero, auto element) {
            selective_step<decltype(zero), decltype(element)>(p, task);
        });
    }
    with_selective(p, [&](auto type) {
        typename decltype(type)::type(p, task, scratch).forward();
        return 0;
    });
}

void selective_backward(SelectiveParams const& p, SelectiveTask const& task, void* scratch) {
    with_selective(p, [&](auto type) {
        typename decltype(type)::type(p, task, scratch).backward();
        return 0;
    });
}

}  // namespace

constinit SelectiveKernels const selective_kernels{selective_scratch, selective_forward,
                                                   selective_backward};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
