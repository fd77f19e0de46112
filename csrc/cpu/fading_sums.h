// Sums whose terms are weighted by exponentials and fade by a rate, without overflow, and the averages made of them:
// RWKV-4's (wkv4_tier.h), and those of both directions (bi_wkv_tier.h). A block of channels of one sequence at a time.
#pragma once

#include "numbers.h"
#include "wkv4_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Sums of two kinds over e^scale.
template <class T>
struct Sums {
    Vector<T> numerator, denominator, scale;
};

// Two logarithms, on the scale of the larger one. Equal ones, -inf too, weigh 1.
template <class T>
struct Weights {
    Vector<T> scale, first, second;

    LSM_INLINE Weights(Vector<T> a, Vector<T> b) {
        Vector<T> const one = splat<T>(1), d = a - b;
        Vector<T> const small = a == b ? one : exp(d < 0 ? d : -d);
        scale = d >= 0 ? a : b;
        first = d >= 0 ? one : small, second = d >= 0 ? small : one;
    }
};

template <class T>
LSM_INLINE Sums<T> merge(Sums<T> const& a, Sums<T> const& b) {
    Weights<T> const w(a.scale, b.scale);
    return {w.first * a.numerator + w.second * b.numerator,
            w.first * a.denominator + w.second * b.denominator, w.scale};
}

// One token further.
template <class T>
LSM_INLINE void add(Sums<T>& sums, Vector<T> rate, Sums<T> const& token) {
    sums.scale -= rate;
    sums = merge<T>(sums, token);
}

template <class T_, class In_>
struct ChannelBlock {
    using T = T_;
    using In = In_;
    using V = Vector<T>;
    static constexpr int W = kLanes<T>;

    ChannelBlock(Wkv4Params const& p, Wkv4Task const& task)
        : p(p), task(task), vectors((task.c_end - task.c_begin + W - 1) / W) {}

    // f(c, count, index of the vector in the block)
    template <class F>
    LSM_INLINE void channels(F const& f) const {
        int64_t c = task.c_begin, v = 0;
        for (; c + W <= task.c_end; c += W, ++v) f(c, int64_t(W), v);
        if (c < task.c_end) f(c, task.c_end - c, v);
    }
    LSM_INLINE V row(void const* data, int64_t c, int64_t count) const {
        return read<Real<T>>(static_cast<T const*>(data) + c, count).re;
    }
    LSM_INLINE void set_row(void* data, int64_t c, int64_t count, V x) const {
        write(static_cast<T*>(data) + c, Real<T>{x}, count);
    }
    In* token(Rows const& r, int64_t t) const {
        return static_cast<In*>(r.data) + task.batch * r.batch + t * r.time;
    }
    static Sums<T> nothing() { return {V{}, V{}, V{} - T(__builtin_inf())}; }

    // A token's average: that of all others, and the token itself.
    struct Average {
        V own, denominator, o, scale;
        LSM_INLINE Average(Sums<T> const& others, V logit, V v) {
            Weights<T> const w(others.scale, logit);
            own = w.second, scale = w.scale;
            denominator = w.first * others.denominator + own;
            o = (w.first * others.numerator + own * v) / denominator;
        }
    };

    // Of the rate and the bonus, which every block's channels have.
    template <class Channel>
    void store_channel_grads(Channel const* channel) const {
        T* const grads = static_cast<T*>(task.channel_grad);
        channels([&](int64_t c, int64_t count, int64_t v) {
            set_row(grads, c, count, channel[v].rate_grad);
            set_row(grads + p.D, c, count, channel[v].bonus_grad);
        });
    }

    Wkv4Params const& p;
    Wkv4Task const& task;
    int64_t vectors;
};

// The kernels of Block<T, In>, for whatever types a call has.
template <template <class, class> class Block>
struct KernelsOf {
    template <class Run>
    static void with_block(Wkv4Params const& p, Run const& run) {
        with_types(p.dtype, [&](auto zero, auto element) {
            run(std::type_identity<Block<decltype(zero), decltype(element)>>{});
        });
    }
    static int64_t scratch_bytes(Wkv4Params const& p, int64_t channels, bool backward) {
        int64_t bytes = 0;
        with_block(p,
                   [&](auto type) { bytes = decltype(type)::type::bytes(p, channels, backward); });
        return bytes;
    }
    static void forward(Wkv4Params const& p, Wkv4Task const& task, void* scratch) {
        with_block(p,
                   [&](auto type) { typename decltype(type)::type(p, task, scratch).forward(); });
    }
    static void backward(Wkv4Params const& p, Wkv4Task const& task, void* scratch) {
        with_block(p,
                   [&](auto type) { typename decltype(type)::type(p, task, scratch).backward(); });
    }
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
