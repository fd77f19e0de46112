// Polynomial attention: which kernels a call has, how it cuts time, features and columns, and the launches it takes.
#include <cmath>

#include "kernels/carver.h"
#include "kernels/chunk/join.cuh"
#include "kernels/dispatch.h"
#include "kernels/polynomial/launch.h"
#include "kernels/polynomial/step.cuh"
#include "kernels/polynomial/sums.cuh"
#include "kernels/polynomial/tensor.h"

namespace lsm {
namespace polynomial {
namespace {

// Tokens; below that the join costs more than it frees. On tensor cores below that a state has more bytes than its tokens.
constexpr i64 kLeastSegment = 64, kLeastTensorSegment = 128;
constexpr i64 kMostFeatures = 256;

using FeatureBuckets = Buckets<64, 160, 256>;

// States on tensor cores are of channels without the scale, which is a factor of what they take and give, squared.
bool fits_tensor_cores(ChunkParams const& p) {
    double const scale = std::fabs(p.scale);
    return p.dtype == Dtype::bf16 && p.channels <= kTensorChannels && p.channels % 8 == 0 &&
           p.V % 8 == 0 && scale >= 0x1p-40 && scale <= 0x1p40;
}

struct Plan {
    bool const tensor;
    i64 width, slices, tiles;
    Segments segments;
    StatePair forward, reverse;  // what segments start from; null: sequences are not cut
    float *inverse = nullptr, *below = nullptr;
    float *columns = nullptr, *totals = nullptr, *dq = nullptr, *dk = nullptr;  // shares
    i64 bytes;

    Plan(ChunkParams const& p, bool backward, void* workspace) : tensor(fits_tensor_cores(p)) {
        slices = (p.K + kMostFeatures - 1) / kMostFeatures;
        width = p.K / slices;  // features_of cuts them into equal parts
        tiles = (p.V + kColumns - 1) / kColumns;
        i64 const chains = (p.cu_seqlens != nullptr ? 1 : p.B) * p.HV * slices * tiles;
        i64 const per_multiprocessor = tensor         ? kTensorBlocks
                                       : width <= 64  ? 3
                                       : width <= 160 ? 2
                                                      : 1;
        i64 const L = segment_length(p.T, chains, per_multiprocessor * multiprocessors(),
                                     tensor ? kLeastTensorSegment : kLeastSegment);
        Carver carve(workspace);
        segments = plan_segments(
            p, L, carve.take<Segment>(segments_bytes(p, L) / static_cast<i64>(sizeof(Segment))));
        for (StatePair* const pair : {&forward, &reverse}) {
            if (L >= p.T || (pair == &reverse && !backward)) continue;
            i64 const owners = segments.count * p.HV;
            *pair = {carve.take<float>(owners * p.K * p.V), carve.take<float>(owners * p.K), true};
        }
        i64 const tokens = p.B * p.T * p.HV;
        if (slices > 1) columns = carve.take<float>(slices * tokens * p.V);
        if (slices > 1 && !backward) totals = carve.take<float>(slices * tokens);
        if (backward && p.normaliser.divides)
            inverse = carve.take<float>(tokens), below = carve.take<float>(tokens);
        if (backward && slices * tiles > 1) {
            dq = carve.take<float>(slices * tiles * tokens * p.channels);
            dk = carve.take<float>(slices * tiles * tokens * p.channels);
        }
        bytes = carve.used();
    }
};

StatePair states(void const* S, void const* z) {
    return {static_cast<float*>(const_cast<void*>(S)), static_cast<float*>(const_cast<void*>(z)),
            false};
}

class Passes {
  public:
    Passes(ChunkParams const& p, Plan const& plan, void* stream)
        : p_(p), plan_(plan), stream_(stream) {}

    // What every segment starts from, if there is more than one per sequence.
    void join(bool reverse) const {
        StatePair const& boundary = reverse ? plan_.reverse : plan_.forward;
        if (boundary.S == nullptr) return;
        PassParams w = params(reverse);
        w.start = {}, w.end = boundary;
        run<Pass::state>(w);
        StatePair const initial = given(reverse);
        auto const each = [&](float* local, float const* from, i64 V) {
            run_join({local, nullptr, from, static_cast<int>(p_.HV), static_cast<int>(p_.K),
                      static_cast<int>(V), 0, Decay::none, reverse},
                     plan_.segments, stream_);
        };
        each(boundary.S, initial.S, p_.V);
        each(boundary.z, initial.z, 1);
    }

    void outputs() const {
        PassParams w = params(false);
        w.columns = {p_.o, p_.dtype, plan_.columns};
        w.totals = plan_.totals;
        w.tokens = static_cast<float*>(p_.normaliser.tokens);
        w.end = states(p_.final_state, p_.normaliser.n);
        run<Pass::o>(w);
        SumParams sum = sum_of(w.columns, plan_.slices, p_.V);
        sum.totals = w.totals, sum.tokens = w.tokens, sum.slices = w.slices;
        sum.divides = w.divides, sum.eps = w.eps;
        run_sum(sum, stream_);
    }

    void gradients() const {
        PassParams w = params(false);
        w.rows = {p_.dq, p_.key_grad_dtype, plan_.dq};
        run<Pass::dq>(w);
        run_sum(sum_of(w.rows, plan_.slices * plan_.tiles, p_.channels), stream_);
        w = params(true);
        w.rows = {p_.dk, p_.key_grad_dtype, plan_.dk};
        w.columns = {p_.dv, p_.dtype, plan_.columns};
        w.end = states(p_.grad_initial_state, p_.normaliser.grad_n0);
        if (plan_.tensor) {
            run<Pass::dv>(w);
            run<Pass::dk>(w);
        } else {
            run<Pass::dkv>(w);
        }
        run_sum(sum_of(w.rows, plan_.slices * plan_.tiles, p_.channels), stream_);
        run_sum(sum_of(w.columns, plan_.slices, p_.V), stream_);
    }

    void divisors() const {
        Normaliser const& own = p_.normaliser;
        if (!own.divides) return;
        i64 const tokens = p_.B * p_.T * p_.HV;
        run_divisors({p_.o, p_.grad_o, p_.dtype, static_cast<float const*>(own.tokens) + 2 * tokens,
                      plan_.inverse, plan_.below, p_.B, p_.T, static_cast<int>(p_.HV),
                      static_cast<int>(p_.V), static_cast<float>(own.eps)},
                     stream_);
    }

  private:
    StatePair given(bool reverse) const {
        return reverse ? states(p_.grad_final_state, p_.normaliser.grad_n)
                       : states(p_.initial_state, p_.normaliser.n0);
    }

    PassParams params(bool reverse) const {
        PassParams w{.basis = {p_.features, p_.channels}};
        Side const keys{p_.k, 1.f, p_.v, {}, {}};
        Side const queries{p_.q,
                           static_cast<float>(p_.scale),
                           p_.grad_o,
                           {plan_.inverse, 1.f},
                           {plan_.below, 0.f}};
        w.writer = reverse ? queries : keys, w.reader = reverse ? keys : queries;
        w.start = (reverse ? plan_.reverse : plan_.forward);
        if (w.start.S == nullptr) w.start = given(reverse);
        w.type = p_.dtype;
        w.B = p_.B, w.T = p_.T;
        w.H = static_cast<int>(p_.H), w.HV = static_cast<int>(p_.HV);
        w.V = static_cast<int>(p_.V), w.channels = static_cast<int>(p_.channels);
        w.width = static_cast<int>(plan_.width), w.slices = static_cast<int>(plan_.slices);
        w.tiles = static_cast<int>(plan_.tiles);
        w.eps = static_cast<float>(p_.normaliser.eps);
        w.reverse = reverse, w.divides = p_.normaliser.divides;
        return w;
    }

    template <Pass pass>
    void run(PassParams const& w) const {
        if constexpr (pass != Pass::dkv) {
            if (plan_.tensor) return run_tensor<pass>(w, plan_.segments, stream_);
        }
        if constexpr (pass != Pass::dv && pass != Pass::dk) {
            dispatch(FeatureBuckets{}, w.width,
                     [&](auto F) { run_walk<F, pass>(w, plan_.segments, stream_); });
        }
    }

    SumParams sum_of(Result const& to, i64 shares, i64 width) const {
        SumParams sum{};
        sum.to = to, sum.shares = static_cast<int>(shares), sum.width = static_cast<int>(width);
        sum.B = p_.B, sum.T = p_.T, sum.HV = static_cast<int>(p_.HV);
        return sum;
    }

    ChunkParams const& p_;
    Plan const& plan_;
    void* const stream_;
};

}  // namespace
}  // namespace polynomial

using namespace polynomial;

int64_t polynomial_fwd_workspace(ChunkParams const& p) {
    return Plan(p, false, nullptr).bytes;
}

int64_t polynomial_bwd_workspace(ChunkParams const& p) {
    return Plan(p, true, nullptr).bytes;
}

void polynomial_fwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, false, workspace);
    build_segments(p, plan.segments, stream);
    Passes const passes(p, plan, stream);
    passes.join(false);
    passes.outputs();
}

void polynomial_bwd(ChunkParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    build_segments(p, plan.segments, stream);
    Passes const passes(p, plan, stream);
    passes.divisors();
    passes.join(false);
    passes.join(true);
    passes.gradients();
}

void polynomial_step(StepParams const& p, void* stream) {
    i64 const column = p.values_first ? p.K : 1, row = p.values_first ? 1 : p.V;
    bool const whole =
        column == 1 && row % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % 16 == 0;
    StepOperands const operands{
        {p.features, p.channels},
        p.q,
        p.k,
        p.v,
        p.o,
        p.dtype,
        static_cast<float*>(p.state),
        static_cast<float*>(p.normaliser.n),
        row,
        column,
        static_cast<int>(p.H),
        static_cast<int>(p.HV),
        static_cast<int>(p.K),
        static_cast<int>(p.V),
        static_cast<int>(p.channels),
        static_cast<int>((p.V + StepTile::kColumns - 1) / StepTile::kColumns),
        static_cast<float>(p.scale),
        static_cast<float>(p.normaliser.eps),
        p.normaliser.divides,
        whole};
    run_step(operands, p.B * p.HV, stream);
}

}  // namespace lsm
