// RWKV-4's running average as passes of the scan engine's stream (docs/kernels/scan.md; equations of the backward in
// csrc/cpu/wkv4_tier.h). Logarithms are to base 2 in here, and in the states that the forward leaves for the backward.
#include "kernels/scan/passes.cuh"
#include "kernels/scan/weights.cuh"
#include "params/wkv4.h"

namespace lsm::scan_kernel {

// Sums over e^scale, which fade on their way.
struct FadingSums {
    struct alignas(16) Aggregate {
        float fade, scale, numerator, denominator;
    };
    struct alignas(16) State {
        float scale, numerator, denominator;
    };
    LSM_DEVICE static State nothing() { return {-__uint_as_float(0x7f800000u), 0.f, 0.f}; }
    LSM_DEVICE static Aggregate identity() {
        return {0.f, -__uint_as_float(0x7f800000u), 0.f, 0.f};
    }
    template <class Sum>
    LSM_DEVICE static void apply(Sum& sum, Aggregate const& next) {
        Weights const w = weigh(sum.scale - next.fade, next.scale);
        sum.scale = w.scale;
        sum.numerator = fmaf(w.first, sum.numerator, w.second * next.numerator);
        sum.denominator = fmaf(w.first, sum.denominator, w.second * next.denominator);
    }
    LSM_DEVICE static void combine(Aggregate& sum, Aggregate const& next) {
        apply(sum, next);
        sum.fade += next.fade;
    }
};

template <class T_, int kInputs_, int kTokens_, bool kRecomputes_>
struct Wkv4Pass {
    using Params = Wkv4Params;
    using T = T_;
    using V = float;
    using Monoid = FadingSums;
    using State = FadingSums::State;
    using Aggregate = FadingSums::Aggregate;
    template <int I>
    using Input = T;
    static constexpr int kLane = Lane<T>::kChannels;
    static constexpr int kInputs = kInputs_;
    static constexpr int kBefore = -1;
    static constexpr int kTokens = kTokens_;
    static constexpr bool kRecomputes = kRecomputes_;
    static constexpr int kChannelSums = 0;

    float rate[kLane], bonus[kLane];

    LSM_DEVICE void load_channels(Wkv4Params const& p, i64 channel, bool inside) {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            rate[j] = inside ? kLog2e * number_at(p.channel, channel + j) : 0.f;
            bonus[j] = inside ? kLog2e * number_at(p.bonus, channel + j) : 0.f;
        }
    }
    LSM_DEVICE static float number_at(void const* data, i64 at) {
        return load_global(static_cast<float const*>(data) + at);
    }
    LSM_DEVICE static void set_number(void* data, i64 at, float x) {
        if (data != nullptr) store_global(static_cast<float*>(data) + at, x);
    }
    LSM_DEVICE static void store_token(Rows const& rows, i64 batch, i64 token, i64 channel,
                                       float const (&x)[kLane]) {
        Lane<T>::store(row_at<T>(rows, batch, token) + channel, x);
    }
    // A channel's place in p.states, before a position that begins a tile of the sequence.
    LSM_DEVICE static float* saved(Wkv4Params const& p, Walk const& walk, i64 position,
                                   i64 channel) {
        i64 const sequence = walk.segment.sequence;
        i64 const first = p.cu_seqlens != nullptr ? walk.begin / kWkv4Tile + sequence
                                                  : sequence * ((p.T + kWkv4Tile - 1) / kWkv4Tile);
        i64 const tile = first + (position - walk.begin) / kWkv4Tile;
        return static_cast<float*>(p.states) + tile * 3 * p.D + channel;
    }
};

// ---- Forward ----

template <class T>
struct Wkv4Forward : Wkv4Pass<T, 2, sizeof(T) == 2 ? 8 : 4, false> {
    using Base = Wkv4Pass<T, 2, sizeof(T) == 2 ? 8 : 4, false>;
    using Base::kLane;
    using typename Base::Aggregate;
    using typename Base::State;

    template <int I>
    LSM_DEVICE static Rows rows(Wkv4Params const& p) {
        return I == 0 ? p.a : p.x;
    }
    LSM_DEVICE static int direction(Wkv4Params const&) { return 1; }
    LSM_DEVICE static void start(Wkv4Params const& p, i64 sequence, i64 channel,
                                 State (&state)[kLane]) {
        if (p.initial_state == nullptr) return;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            i64 const at = sequence * p.D + channel + j;
            state[j] = {kLog2e * Base::number_at(p.initial_scale, at),
                        Base::number_at(p.initial_state, at),
                        Base::number_at(p.initial_denominator, at)};
        }
    }
    LSM_DEVICE static void end(Wkv4Params const& p, i64 sequence, i64 channel,
                               State const (&state)[kLane]) {
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            i64 const at = sequence * p.D + channel + j;
            Base::set_number(p.final_state, at, state[j].numerator);
            Base::set_number(p.final_denominator, at, state[j].denominator);
            Base::set_number(p.final_scale, at, kLn2 * state[j].scale);
        }
    }
    LSM_DEVICE void begin(Wkv4Params const& p, Walk const&, i64 channel, bool inside) {
        Base::load_channels(p, channel, inside);
    }
    struct Element {
        float k[kLane], v[kLane];
    };
    template <class Row>
    LSM_DEVICE void read(Row const& row, Walk const&, i64, Element& e) const {
        row.template read<0>(e.k);
        row.template read<1>(e.v);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) e.k[j] *= kLog2e;
    }
    LSM_DEVICE Aggregate aggregate(Element const& e, int j) const {
        return {this->rate[j], e.k[j], e.v[j], 1.f};
    }
    LSM_DEVICE void fold(Aggregate& sum, Element const& e, int j) const {
        FadingSums::combine(sum, aggregate(e, j));
    }
    template <class Row>
    LSM_DEVICE void step(Wkv4Params const& p, Walk const& walk, Row const&, i64 step, i64 token,
                         i64 channel, bool inside, Element const& e, State (&state)[kLane]) const {
        bool const save = p.states != nullptr && inside && step % kWkv4Tile == 0;
        float o[kLane];
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            if (save) {
                float* const to = Base::saved(p, walk, walk.position(step), channel + j);
                store_global(to, state[j].numerator);
                store_global(to + p.D, state[j].denominator);
                store_global(to + 2 * p.D, state[j].scale);
            }
            Weights const w = weigh(state[j].scale, e.k[j] + this->bonus[j]);
            o[j] = __fdividef(fmaf(w.first, state[j].numerator, w.second * e.v[j]),
                              fmaf(w.first, state[j].denominator, w.second));
            FadingSums::apply(state[j], aggregate(e, j));
        }
        if (inside) Base::store_token(p.h, walk.segment.batch, token, channel, o);
    }
    LSM_DEVICE static void poison(Wkv4Params const& p, i64 batch, i64 token, i64 channel) {
        float nan[kLane];
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) nan[j] = not_a_number<float>();
        Base::store_token(p.h, batch, token, channel, nan);
    }
    LSM_DEVICE static void poison_ends(Wkv4Params const& p, i64 sequence, i64 channel, void*, i64) {
        float const nan = not_a_number<float>();
        State const state[kLane] = {{nan, nan, nan}, {nan, nan, nan}};
        if (sequence >= 0) end(p, sequence, channel, state);
    }
};

// ---- Backward ----

// The walk is over the sums GA and GB; a tile's averages are made again first.
template <class T>
struct Wkv4Backward : Wkv4Pass<T, 3, kWkv4Tile / kWarps, true> {
    using Base = Wkv4Pass<T, 3, kWkv4Tile / kWarps, true>;
    using Base::kLane;
    using Base::kTokens;
    using typename Base::Aggregate;
    using typename Base::State;
    static constexpr int kChannelSums = 2;  // of the rate and the bonus

    template <int I>
    LSM_DEVICE static Rows rows(Wkv4Params const& p) {
        return I == 0 ? p.grad_h : I == 1 ? p.a : p.x;
    }
    LSM_DEVICE static int direction(Wkv4Params const&) { return -1; }
    LSM_DEVICE static void start(Wkv4Params const& p, i64 sequence, i64 channel,
                                 State (&state)[kLane]) {
        if (p.grad_final_state == nullptr) return;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            i64 const at = sequence * p.D + channel + j;
            state[j] = {-kLog2e * Base::number_at(p.final_scale, at),
                        Base::number_at(p.grad_final_state, at),
                        Base::number_at(p.grad_final_denominator, at)};
        }
    }
    // Through A_0 = numerator e^m; where both ends are infinite, the sequence is empty, and the factor 1.
    LSM_DEVICE static void end(Wkv4Params const& p, i64 sequence, i64 channel,
                               State const (&state)[kLane]) {
        if (p.grad_initial_state == nullptr) return;
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            i64 const at = sequence * p.D + channel + j;
            float const m = kLog2e * Base::number_at(p.initial_scale, at);
            float const weight = state[j].scale == -m ? 1.f : exp2_approx(m + state[j].scale);
            Base::set_number(p.grad_initial_state, at, weight * state[j].numerator);
            Base::set_number(p.grad_initial_denominator, at, weight * state[j].denominator);
        }
    }

    struct Element {
        State past[kLane];  // before the token
        float scale[kLane], q[kLane], qo[kLane];
    };
    float sum_rate[kLane], sum_bonus[kLane];
    State ahead[kLane];  // before the next tile, asked for early by the warp that walks it first

    LSM_DEVICE void begin(Wkv4Params const& p, Walk const& walk, i64 channel, bool inside) {
        Base::load_channels(p, channel, inside);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) sum_rate[j] = sum_bonus[j] = 0.f;
        look_ahead(p, walk, 0, channel, inside);
    }
    LSM_DEVICE void look_ahead(Wkv4Params const& p, Walk const& walk, i64 tile, i64 channel,
                               bool inside) {
        i64 const whole = (walk.length + kWkv4Tile - 1) / kWkv4Tile * kWkv4Tile;
        i64 const first = whole - (tile + 1) * kWkv4Tile;  // of the tile, in the segment
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            ahead[j] = FadingSums::nothing();
            if (!inside || first < 0 || threadIdx.x / 32 != kWarps - 1) continue;
            float const* const from = Base::saved(p, walk, walk.segment.t0 + first, channel + j);
            ahead[j] = {load_global(from + 2 * p.D), load_global(from), load_global(from + p.D)};
        }
    }

    // A tile's last row is its earliest position.
    template <class Self, class Outside>
    LSM_DEVICE void recompute(Self const& self, char const* stage, i64 tile, Outside const& outside,
                              Element (&element)[kTokens]) {
        int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        i64 const channel = self.column + lane * kLane;
        State state[kLane];
        Aggregate mine[kLane];
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            state[j] = ahead[j];
            mine[j] = {0.f, state[j].scale, state[j].numerator, state[j].denominator};
        }
        look_ahead(self.p, self.walk, tile + 1, channel, channel < self.p.D);
        float k[kLane], v[kLane], dy[kLane];
        auto const read = [&](int i) {
            TileRow<Wkv4Backward> const row{stage, warp * kTokens + i};
            row.template read<0>(dy), row.template read<1>(k), row.template read<2>(v);
        };
        auto const aggregate = [&](int j) {
            return Aggregate{this->rate[j], kLog2e * k[j], v[j], 1.f};
        };
        LSM_UNROLL
        for (int i = kTokens; i-- > 0;) {
            if (outside(i)) continue;
            read(i);
            LSM_UNROLL
            for (int j = 0; j < kLane; ++j) FadingSums::combine(mine[j], aggregate(j));
        }
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j)
            self.second_carry()[(j * kWarps + warp) * 32 + lane] = mine[j];
        __syncthreads();
        for (int w = kWarps; --w > warp;) {
            LSM_UNROLL
            for (int j = 0; j < kLane; ++j)
                FadingSums::apply(state[j], self.second_carry()[(j * kWarps + w) * 32 + lane]);
        }
        LSM_UNROLL
        for (int i = kTokens; i-- > 0;) {
            if (outside(i)) continue;
            read(i);
            LSM_UNROLL
            for (int j = 0; j < kLane; ++j) {
                Weights const w = weigh(state[j].scale, fmaf(kLog2e, k[j], this->bonus[j]));
                float const inverse =
                    __fdividef(1.f, fmaf(w.first, state[j].denominator, w.second));
                float const q = dy[j] * inverse;
                element[i].past[j] = state[j];
                element[i].scale[j] = w.scale;
                element[i].q[j] = q;
                element[i].qo[j] = q * fmaf(w.first, state[j].numerator, w.second * v[j]) * inverse;
                FadingSums::apply(state[j], aggregate(j));
            }
        }
    }
    template <class Row>
    LSM_DEVICE void read(Row const&, Walk const&, i64, Element&) const {}

    LSM_DEVICE Aggregate aggregate(Element const& e, int j) const {
        return {this->rate[j], -e.scale[j], e.q[j], -e.qo[j]};
    }
    LSM_DEVICE void fold(Aggregate& sum, Element const& e, int j) const {
        FadingSums::combine(sum, aggregate(e, j));
    }
    template <class Row>
    LSM_DEVICE void step(Wkv4Params const& p, Walk const& walk, Row const& row, i64, i64 token,
                         i64 channel, bool inside, Element const& e, State (&grad)[kLane]) {
        float k[kLane], v[kLane];
        row.template read<1>(k), row.template read<2>(v);
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            float const logit = kLog2e * k[j];
            float const own = exp2_approx(logit + this->bonus[j] - e.scale[j]);
            float const of_logit = own * fmaf(e.q[j], v[j], -e.qo[j]);
            float const weight = exp2_approx(logit + grad[j].scale);
            float const rest = exp2_approx(e.past[j].scale + (grad[j].scale - this->rate[j]));
            sum_bonus[j] += of_logit;
            sum_rate[j] -= rest * fmaf(e.past[j].numerator, grad[j].numerator,
                                       e.past[j].denominator * grad[j].denominator);
            k[j] = fmaf(weight, fmaf(v[j], grad[j].numerator, grad[j].denominator), of_logit);
            v[j] = fmaf(weight, grad[j].numerator, own * e.q[j]);
            FadingSums::apply(grad[j], aggregate(e, j));
        }
        if (!inside) return;
        Base::store_token(p.da, walk.segment.batch, token, channel, k);
        Base::store_token(p.dx, walk.segment.batch, token, channel, v);
    }
    LSM_DEVICE void store_sums(Wkv4Params const& p, char* shared, void* partial, i64 record,
                               i64 channel, bool inside) {
        store_share(sum_rate, shared, partial, 2 * record * p.D + channel, inside);
        store_share(sum_bonus, shared, partial, (2 * record + 1) * p.D + channel, inside);
    }
    LSM_DEVICE static void poison(Wkv4Params const& p, i64 batch, i64 token, i64 channel) {
        float nan[kLane];
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) nan[j] = not_a_number<float>();
        Base::store_token(p.da, batch, token, channel, nan);
        Base::store_token(p.dx, batch, token, channel, nan);
    }
    LSM_DEVICE static void poison_ends(Wkv4Params const& p, i64 sequence, i64 channel,
                                       void* partial, i64 record) {
        float const nan = not_a_number<float>();
        LSM_UNROLL
        for (int j = 0; j < kLane; ++j) {
            Base::set_number(partial, 2 * record * p.D + channel + j, nan);
            Base::set_number(partial, (2 * record + 1) * p.D + channel + j, nan);
            if (sequence < 0) continue;
            Base::set_number(p.grad_initial_state, sequence * p.D + channel + j, nan);
            Base::set_number(p.grad_initial_denominator, sequence * p.D + channel + j, nan);
        }
    }
};

template <template <class> class Pass>
int64_t run_typed(Wkv4Params const& p, void* workspace, void* stream) {
    return with_element(p.dtype, [&](auto type) {
        return run_pass<Pass<typename decltype(type)::type>>(p, workspace, stream);
    });
}

}  // namespace lsm::scan_kernel

namespace lsm {

using namespace scan_kernel;

// Never none: a null workspace asks for a size.
int64_t wkv4_fwd_workspace(Wkv4Params const& p) {
    return 256 + run_typed<Wkv4Forward>(p, nullptr, nullptr);
}

int64_t wkv4_bwd_workspace(Wkv4Params const& p) {
    return 256 + run_typed<Wkv4Backward>(p, nullptr, nullptr);
}

void wkv4_fwd(Wkv4Params const& p, void* workspace, void* stream) {
    run_typed<Wkv4Forward>(p, workspace, stream);
}

void wkv4_bwd(Wkv4Params const& p, void* workspace, void* stream) {
    run_typed<Wkv4Backward>(p, workspace, stream);
}

}  // namespace lsm
