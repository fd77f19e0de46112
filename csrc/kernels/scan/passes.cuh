// What the stream kernel does to a token, forwards and backwards, for each kind of gate.
//
// Backwards, with c_t the gradient that reaches h_t from later tokens:
//     dh_t = dy_t + c_t      dx_t = dh_t      da_t = dh_t conj(h_{t-1})      c_{t-1} = conj(a_t) dh_t
// so the walk is again h -> a h + x, folded with x = a dy. a is never shifted; only h is read one position ahead.
#pragma once

#include "kernels/scan/stream.cuh"

namespace lsm::scan_kernel {

// h -> a h + x
template <class V>
struct Affine {
    struct alignas(2 * sizeof(V)) Aggregate {
        V a, x;
    };
    using State = V;
    LSM_DEVICE static Aggregate identity() { return {number<V>(1.f), number<V>(0.f)}; }
    LSM_DEVICE static State nothing() { return number<V>(0.f); }
    LSM_DEVICE static void apply(State& h, Aggregate const& next) {
        h = multiply_add(next.a, h, next.x);
    }
    LSM_DEVICE static void combine(Aggregate& sum, Aggregate const& next) {
        sum.x = multiply_add(next.a, sum.x, next.x);
        sum.a = multiply(next.a, sum.a);
    }
};

template <class V>
LSM_DEVICE V not_a_number() {
    return number<V>(nan_value());
}
template <>
LSM_DEVICE Complex not_a_number<Complex>() {
    return {nan_value(), nan_value()};
}

// What all passes over affine maps share; states are rows of [N, D].
template <class T_, int kInputs_, int kBefore_>
struct AffinePass {
    using Params = ScanParams;
    using T = T_;
    using V = typename Lane<T>::V;
    using Monoid = Affine<V>;
    static constexpr int kLane = Lane<T>::kChannels;
    static constexpr int kTokens = sizeof(T) == 2 ? 8 : 4;
    static constexpr bool kRecomputes = false;
    static constexpr int kInputs = kInputs_;
    static constexpr int kBefore = kBefore_;
    static constexpr int kChannelSums = 0;

    LSM_DEVICE static void load_state(void const* states, i64 sequence, i64 D, i64 channel,
                                      V (&h)[kLane]) {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            h[j] = states == nullptr
                       ? number<V>(0.f)
                       : load_global(static_cast<V const*>(states) + sequence * D + channel + j);
        }
    }
    LSM_DEVICE static void store_state(void* states, i64 sequence, i64 D, i64 channel,
                                       V const (&h)[kLane]) {
        if (states == nullptr) return;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j)
            store_global(static_cast<V*>(states) + sequence * D + channel + j, h[j]);
    }
    template <class Out>
    LSM_DEVICE static void store_token(Rows const& rows, i64 batch, i64 token, i64 channel,
                                       V const (&x)[kLane]) {
        if (rows.data != nullptr) Lane<Out>::store(row_at<Out>(rows, batch, token) + channel, x);
    }
    LSM_DEVICE static void fill(V (&x)[kLane], V value) {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) x[j] = value;
    }
};

// Adds a lane's sums over warps and leaves the block's share of the channels' gradient.
template <class V, int kLane>
LSM_DEVICE void store_share(V (&sum)[kLane], char* shared, void* partial, i64 at, bool inside) {
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    V* const all = reinterpret_cast<V*>(shared);
    __syncthreads();  // the carries have been read
    LSM_UNROLL
    for (int j = 0; j < kLane; ++j) all[(warp * kLane + j) * 32 + lane] = sum[j];
    __syncthreads();
    if (warp != 0 || !inside) return;
    LSM_UNROLL
    for (int j = 0; j < kLane; ++j) {
        V total = all[j * 32 + lane];
        for (int w = 1; w < kWarps; ++w) total = add(total, all[(w * kLane + j) * 32 + lane]);
        store_global(static_cast<V*>(partial) + at + j, total);
    }
}

// ---- Forward ----

template <class T, int kInputs>
struct Forward : AffinePass<T, kInputs, -1> {
    using Base = AffinePass<T, kInputs, -1>;
    using Base::kLane;
    using typename Base::V;

    LSM_DEVICE static int direction(ScanParams const& p) { return p.reverse ? -1 : 1; }
    LSM_DEVICE static void start(ScanParams const& p, i64 sequence, i64 channel, V (&h)[kLane]) {
        Base::load_state(p.initial_state, sequence, p.D, channel, h);
    }
    LSM_DEVICE static void end(ScanParams const& p, i64 sequence, i64 channel,
                               V const (&h)[kLane]) {
        Base::store_state(p.final_state, sequence, p.D, channel, h);
    }
    struct Element {
        V a[kLane], x[kLane];
    };
    LSM_DEVICE static void fold(typename Base::Monoid::Aggregate& sum, Element const& e, int j) {
        Base::Monoid::combine(sum, {e.a[j], e.x[j]});
    }
    template <class Row>
    LSM_DEVICE void step(ScanParams const& p, Walk const& walk, Row const&, i64, i64 token,
                         i64 channel, bool inside, Element const& e, V (&h)[kLane]) const {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) h[j] = multiply_add(e.a[j], h[j], e.x[j]);
        if (inside) Base::template store_token<T>(p.h, walk.segment.batch, token, channel, h);
    }
    LSM_DEVICE static void poison(ScanParams const& p, i64 batch, i64 token, i64 channel) {
        V nan[kLane];
        Base::fill(nan, not_a_number<V>());
        Base::template store_token<T>(p.h, batch, token, channel, nan);
    }
    LSM_DEVICE static void poison_ends(ScanParams const& p, i64 sequence, i64 channel, void*, i64) {
        V nan[kLane];
        Base::fill(nan, not_a_number<V>());
        if (sequence >= 0) end(p, sequence, channel, nan);
    }
};

template <class T, class G>
struct GateForward : Forward<T, 2> {
    using typename Forward<T, 2>::V;
    using typename Forward<T, 2>::Element;
    using Forward<T, 2>::kLane;
    template <int I>
    using Input = std::conditional_t<I == 1, G, T>;
    bool log;

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        return I == 0 ? p.x : p.a;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64, bool) { log = p.log; }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.x);
        row.template read<1>(e.a);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.a[j] = log ? exponential(e.a[j]) : e.a[j];
    }
};

// The constants of a lane's channels; of a constant gate, the factors.
template <class V, int kLane>
LSM_DEVICE void load_channels(ScanParams const& p, i64 channel, bool inside, V (&x)[kLane]) {
    LSM_UNROLL
    for (int j = 0; j < kLane; ++j) {
        x[j] =
            inside ? load_global(static_cast<V const*>(p.channel) + channel + j) : number<V>(0.f);
        if (p.kind == Scan::constant && p.log) x[j] = exponential(x[j]);
    }
}

template <class T>
struct ConstantForward : Forward<T, 1> {
    using typename Forward<T, 1>::V;
    using typename Forward<T, 1>::Element;
    using Forward<T, 1>::kLane;
    template <int I>
    using Input = T;
    V a[kLane];

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        return p.x;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64 channel, bool inside) {
        load_channels(p, channel, inside, a);
    }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.x);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.a[j] = a[j];
    }
};

// The root of RG-LRU, sqrt(1 - a²), or 1 at a first token.
LSM_DEVICE float root(float log_a, bool first) {
    return first ? 1.f : sqrtf(-expm1f(2.f * log_a));
}

template <class T>
struct RgLruForward : Forward<T, 3> {
    using typename Forward<T, 3>::Element;
    using Forward<T, 3>::kLane;
    template <int I>
    using Input = T;
    float c[kLane];
    bool resets;

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        return I == 0 ? p.x : I == 1 ? p.i : p.a;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64 channel, bool inside) {
        load_channels(p, channel, inside, c);
        resets = p.initial_state == nullptr;
    }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const& walk, i64 step, Element& e) const {
        bool const first = resets && walk.starts && step == 0;
        float x[kLane], i[kLane], r[kLane];
        row.template read<0>(x), row.template read<1>(i), row.template read<2>(r);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            float const log_a = c[j] * sigmoid(r[j]);
            e.a[j] = expf(log_a);
            e.x[j] = root(log_a, first) * sigmoid(i[j]) * x[j];
        }
    }
};

// ---- Backward ----

template <class T, int kInputs, int kBefore>
struct Backward : AffinePass<T, kInputs, kBefore> {
    using Base = AffinePass<T, kInputs, kBefore>;
    using Base::kLane;
    using typename Base::V;

    LSM_DEVICE static int direction(ScanParams const& p) { return p.reverse ? 1 : -1; }
    LSM_DEVICE static void start(ScanParams const& p, i64 sequence, i64 channel, V (&c)[kLane]) {
        Base::load_state(p.grad_final_state, sequence, p.D, channel, c);
    }
    LSM_DEVICE static void end(ScanParams const& p, i64 sequence, i64 channel,
                               V const (&c)[kLane]) {
        Base::store_state(p.grad_initial_state, sequence, p.D, channel, c);
    }
    struct Element {
        V a[kLane], dy[kLane];  // a conjugated
    };
    LSM_DEVICE static void fold(typename Base::Monoid::Aggregate& sum, Element const& e, int j) {
        sum.x = multiply(e.a[j], add(e.dy[j], sum.x));
        sum.a = multiply(e.a[j], sum.a);
    }

    // The state before a token.
    template <class Row>
    LSM_DEVICE static void before(ScanParams const& p, Walk const& walk, Row const& row, i64 step,
                                  i64 channel, bool inside, V (&h)[kLane]) {
        if (step + 1 < walk.length || !walk.ends) {
            row.template read<kBefore>(h);
        } else if (inside) {
            Base::load_state(p.initial_state, walk.segment.sequence, p.D, channel, h);
        } else {
            Base::fill(h, number<V>(0.f));
        }
    }
    // The gradient of the state after the token, and the walk past it.
    LSM_DEVICE static void pass_by(Element const& e, V (&c)[kLane], V (&dh)[kLane]) {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            dh[j] = add(e.dy[j], c[j]);
            c[j] = multiply(e.a[j], dh[j]);
        }
    }
    LSM_DEVICE static void poison_ends(ScanParams const& p, i64 sequence, i64 channel,
                                       void* partial, i64 record) {
        V nan[kLane];
        Base::fill(nan, not_a_number<V>());
        if (sequence >= 0) end(p, sequence, channel, nan);
        if (partial != nullptr) Base::store_state(partial, record, p.D, channel, nan);
    }
};

template <class T, class G>
struct GateBackward : Backward<T, 3, 2> {
    using Base = Backward<T, 3, 2>;
    using Base::kLane;
    using typename Base::Element;
    using typename Base::V;
    template <int I>
    using Input = std::conditional_t<I == 1, G, T>;
    bool log;

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        if (I == 2) return p.da.data != nullptr ? p.h : Rows{};
        return I == 0 ? p.grad_h : p.a;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64, bool) { log = p.log; }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.dy);
        row.template read<1>(e.a);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.a[j] = conj(log ? exponential(e.a[j]) : e.a[j]);
    }
    template <class Row>
    LSM_DEVICE void step(ScanParams const& p, Walk const& walk, Row const& row, i64 step, i64 token,
                         i64 channel, bool inside, Element const& e, V (&c)[kLane]) const {
        V dh[kLane];
        Base::pass_by(e, c, dh);
        if (inside) Base::template store_token<T>(p.dx, walk.segment.batch, token, channel, dh);
        if (p.da.data == nullptr) return;
        V h[kLane];
        Base::before(p, walk, row, step, channel, inside, h);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            h[j] = multiply(dh[j], conj(h[j]));
            if (log) h[j] = multiply(h[j], e.a[j]);
        }
        if (inside) Base::template store_token<G>(p.da, walk.segment.batch, token, channel, h);
    }
    LSM_DEVICE static void poison(ScanParams const& p, i64 batch, i64 token, i64 channel) {
        V nan[kLane];
        Base::fill(nan, not_a_number<V>());
        Base::template store_token<T>(p.dx, batch, token, channel, nan);
        Base::template store_token<G>(p.da, batch, token, channel, nan);
    }
};

template <class T>
struct ConstantBackward : Backward<T, 2, 1> {
    using Base = Backward<T, 2, 1>;
    using Base::kLane;
    using typename Base::Element;
    using typename Base::V;
    static constexpr int kChannelSums = 1;
    template <int I>
    using Input = T;
    V a[kLane], sum[kLane];

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        if (I == 1) return p.channel_grad != nullptr ? p.h : Rows{};
        return p.grad_h;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64 channel, bool inside) {
        load_channels(p, channel, inside, a);
        Base::fill(sum, number<V>(0.f));
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) a[j] = conj(a[j]);
    }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.dy);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.a[j] = a[j];
    }
    template <class Row>
    LSM_DEVICE void step(ScanParams const& p, Walk const& walk, Row const& row, i64 step, i64 token,
                         i64 channel, bool inside, Element const& e, V (&c)[kLane]) {
        V dh[kLane];
        Base::pass_by(e, c, dh);
        if (inside) Base::template store_token<T>(p.dx, walk.segment.batch, token, channel, dh);
        if (p.channel_grad == nullptr) return;
        V h[kLane];
        Base::before(p, walk, row, step, channel, inside, h);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) sum[j] = multiply_add(dh[j], conj(h[j]), sum[j]);
    }
    LSM_DEVICE void store_sums(ScanParams const& p, char* shared, void* partial, i64 record,
                               i64 channel, bool inside) {
        if (p.channel_grad == nullptr) return;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) sum[j] = p.log ? multiply(sum[j], a[j]) : sum[j];
        store_share(sum, shared, partial, record * p.D + channel, inside);
    }
    LSM_DEVICE static void poison(ScanParams const& p, i64 batch, i64 token, i64 channel) {
        V nan[kLane];
        Base::fill(nan, not_a_number<V>());
        Base::template store_token<T>(p.dx, batch, token, channel, nan);
    }
};

template <class T>
struct RgLruBackward : Backward<T, 5, 2> {
    using Base = Backward<T, 5, 2>;
    using Base::kLane;
    using typename Base::Element;
    static constexpr int kChannelSums = 1;
    template <int I>
    using Input = T;
    float c[kLane], sum[kLane];
    bool resets;

    template <int I>
    LSM_DEVICE static Rows rows(ScanParams const& p) {
        return I == 0 ? p.grad_h : I == 1 ? p.a : I == 2 ? p.h : I == 3 ? p.x : p.i;
    }
    LSM_DEVICE void begin(ScanParams const& p, Walk const&, i64 channel, bool inside) {
        load_channels(p, channel, inside, c);
        Base::fill(sum, 0.f);
        resets = p.initial_state == nullptr;
    }
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.dy);
        row.template read<1>(e.a);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.a[j] = expf(c[j] * sigmoid(e.a[j]));
    }
    template <class Row>
    LSM_DEVICE void step(ScanParams const& p, Walk const& walk, Row const& row, i64 step, i64 token,
                         i64 channel, bool inside, Element const& e, float (&carry)[kLane]) {
        float dh[kLane], h[kLane], x[kLane], i[kLane], r[kLane];
        Base::pass_by(e, carry, dh);
        Base::before(p, walk, row, step, channel, inside, h);
        row.template read<1>(r), row.template read<3>(x), row.template read<4>(i);
        bool const first = resets && walk.ends && step + 1 == walk.length;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            float const gate = sigmoid(i[j]), rate = sigmoid(r[j]), a = e.a[j];
            float const m = root(c[j] * rate, first);
            // The root's slope ends at 1000, as in the paper's code.
            float const through_m =
                first ? 0.f : dh[j] * gate * x[j] * __fdividef(a * a, fmaxf(m, 0.0005f));
            float const d = a * dh[j] * h[j] - through_m;  // of log a
            i[j] = dh[j] * m * x[j] * gate * (1.f - gate);
            x[j] = dh[j] * m * gate;
            r[j] = d * c[j] * rate * (1.f - rate);
            sum[j] = fmaf(d, rate, sum[j]);
        }
        if (!inside) return;
        i64 const batch = walk.segment.batch;
        Base::template store_token<T>(p.dx, batch, token, channel, x);
        Base::template store_token<T>(p.di, batch, token, channel, i);
        Base::template store_token<T>(p.da, batch, token, channel, r);
    }
    LSM_DEVICE void store_sums(ScanParams const& p, char* shared, void* partial, i64 record,
                               i64 channel, bool inside) {
        store_share(sum, shared, partial, record * p.D + channel, inside);
    }
    LSM_DEVICE static void poison(ScanParams const& p, i64 batch, i64 token, i64 channel) {
        float nan[kLane];
        Base::fill(nan, not_a_number<float>());
        Base::template store_token<T>(p.dx, batch, token, channel, nan);
        Base::template store_token<T>(p.di, batch, token, channel, nan);
        Base::template store_token<T>(p.da, batch, token, channel, nan);
    }
};

}  // namespace lsm::scan_kernel
