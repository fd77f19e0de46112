// Averages of both directions (Bi-WKV), and their gradients (equations in csrc/cpu/bi_wkv_tier.h), in one launch each:
// passes of both_ways.cuh.
#include <algorithm>

#include "kernels/carver.h"
#include "kernels/fill.cuh"
#include "kernels/scan/both_ways.cuh"

namespace lsm::scan_kernel {

template <class T>
struct BiWkvForward : Operator<T, 48 / sizeof(T), 2, 0> {
    static constexpr int kPiece = 6, kPasses = 1, kChannelSums = 0;
    using Largest = Sum;

    template <int I>
    LSM_DEVICE static Rows rows(Wkv4Params const& p) {
        return I == 0 ? p.a : p.x;
    }
};
template <class T>
struct BiWkvBackward : Operator<T, sizeof(T) == 2 ? 6 : 4, 3, 3> {
    static constexpr int kPiece = BiWkvBackward::kRun, kPasses = 2,
                         kChannelSums = 2;  // of the rate and the bonus
    using Largest = SlopedSum;

    template <int I>
    LSM_DEVICE static Rows rows(Wkv4Params const& p) {
        return I == 0 ? p.a : I == 1 ? p.x : p.grad_h;
    }
};

// ---- Passes ----

// Stored, or with the scale and the gradient over the denominator kept for the gradients' pass.
template <class Op>
struct Averages {
    using S = Sum;
    using Row = SegmentRow<Op>;
    static constexpr int kNumber = 0;

    LSM_DEVICE static void added(Row row, Sum (&x)[kChannels]) {
        float k[kChannels], v[kChannels];
        row.template read<0>(k), row.template read<1>(v);
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) x[j] = {1.f, kLog2e * k[j], v[j], 1.f};
    }
    LSM_DEVICE void emit(Wkv4Params const& p, Row row, float const (&bonus)[kChannels],
                         Sum const (&past)[kChannels], Sum const (&future)[kChannels],
                         Place const& at) {
        Sum x[kChannels];
        added(row, x);
        float scale[kChannels], inverse[kChannels], o[kChannels];
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) {
            Weights const others = weigh(past[j].scale, future[j].scale);
            Weights const w = weigh(others.scale, x[j].scale + bonus[j]);
            float const left = w.first * others.first, right = w.first * others.second;
            scale[j] = w.scale;
            inverse[j] = __fdividef(
                1.f, fmaf(left, past[j].bottom, fmaf(right, future[j].bottom, w.second)));
            o[j] = fmaf(left, past[j].top, fmaf(right, future[j].top, w.second * x[j].top)) *
                   inverse[j];
        }
        if constexpr (Op::kKept > 0) {
            float q[kChannels];
            row.template read<2>(q);
            LSM_UNROLL
            for (int j = 0; j < kChannels; ++j) q[j] *= inverse[j];
            row.template keep<0>(scale), row.template keep<1>(q), row.template keep<2>(o);
        } else if (at.inside) {
            Lane<typename Op::T>::store(
                row_at<typename Op::T>(p.h, at.batch, at.token) + at.channel, o);
        }
    }
};

template <class Op>
struct Gradients {
    using S = SlopedSum;
    using Row = SegmentRow<Op>;
    static constexpr int kNumber = 1;

    float sum_rate[kChannels] = {}, sum_bonus[kChannels] = {};

    LSM_DEVICE static void added(Row row, SlopedSum (&x)[kChannels]) {
        float scale[kChannels], q[kChannels], o[kChannels];
        row.template read_kept<0>(scale), row.template read_kept<1>(q);
        row.template read_kept<2>(o);
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) x[j] = {1.f, -scale[j], q[j], -q[j] * o[j], 0.f, 0.f};
    }
    LSM_DEVICE void emit(Wkv4Params const& p, Row row, float const (&bonus)[kChannels],
                         SlopedSum const (&past)[kChannels], SlopedSum const (&future)[kChannels],
                         Place const& at) {
        float k[kChannels], v[kChannels], scale[kChannels], q[kChannels], o[kChannels];
        row.template read<0>(k), row.template read<1>(v);
        row.template read_kept<0>(scale), row.template read_kept<1>(q);
        row.template read_kept<2>(o);
        LSM_UNROLL
        for (int j = 0; j < kChannels; ++j) {
            float const logit = kLog2e * k[j];
            float const own = exp2_approx(logit + bonus[j] - scale[j]) * q[j];
            float const of_logit = own * (v[j] - o[j]);
            float const left = exp2_approx(logit + past[j].scale);
            float const right = exp2_approx(logit + future[j].scale);
            float const dv = fmaf(left, past[j].top, right * future[j].top);
            float const rest = fmaf(left, past[j].bottom, right * future[j].bottom);
            float const slope = fmaf(left, past[j].top_slope, right * future[j].top_slope);
            float const rest_slope =
                fmaf(left, past[j].bottom_slope, right * future[j].bottom_slope);
            sum_bonus[j] += of_logit;
            sum_rate[j] -= fmaf(v[j], slope, rest_slope);
            k[j] = fmaf(v[j], dv, rest) + of_logit;
            v[j] = dv + own;
        }
        if (!at.inside) return;
        using T = typename Op::T;
        Lane<T>::store(row_at<T>(p.da, at.batch, at.token) + at.channel, k);
        Lane<T>::store(row_at<T>(p.dx, at.batch, at.token) + at.channel, v);
    }
};

// ---- The kernel ----

// Two blocks a multiprocessor: one's rows arrive while the other's run.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    both_ways(Wkv4Params const p, Chains const chains, float* partial) {
    using B = Block<Op>;
    B block(p, chains);
    int const group = static_cast<int>(blockIdx.x / chains.segments),
              groups = static_cast<int>(gridDim.x / chains.segments);
    LSM_UNROLL_BY(1)
    for (int piece = B::kPieces - 1; piece >= 0; --piece) block.ask(group, piece);
    LSM_UNROLL_BY(1)
    for (int chain = group; chain < chains.count; chain += groups) {
        block.load_channels(chain);
        {
            Averages<Op> averages;
            if (!PassOver<Op, Averages>{block}.run(averages, chain, chain + groups)) break;
        }
        if constexpr (Op::kPasses > 1) {
            Gradients<Op> gradients;
            if (!PassOver<Op, Gradients>{block}.run(gradients, chain, chain + groups)) break;
            i64 const record = block.batch_of(chain) * chains.segments + block.segment;
            i64 const channel = block.channel_of(chain);
            store_share(gradients.sum_rate, B::carries(), partial, 2 * record * p.D + channel,
                        channel < p.D);
            store_share(gradients.sum_bonus, B::carries(), partial,
                        (2 * record + 1) * p.D + channel, channel < p.D);
        }
    }
    cp_async_wait<0>();
}

// A null workspace: only counts its bytes.
template <class Op>
int64_t run_both(Wkv4Params const& p, void* workspace, void* stream) {
    constexpr int kBytes = Block<Op>::kSharedBytes;
    constexpr i64 kLeast = Op::kLength / 4;  // tokens of a segment, where blocks would be too few
    auto const ceil_div = [](i64 a, i64 b) { return (a + b - 1) / b; };
    Chains chains{};
    chains.columns = static_cast<unsigned>(ceil_div(p.D, kColumn));
    i64 const count = p.N * chains.columns;
    chains.count = static_cast<int>(count);
    if (count == 0 || p.T == 0) {
        if (Op::kChannelSums > 0 && workspace != nullptr)
            fill(static_cast<float*>(p.channel_grad), Op::kChannelSums * p.D, 0.f, stream);
        return 0;
    }
    i64 const together = blocks_together(both_ways<Op>, dim3(kThreads), kBytes);
    i64 const wanted = std::min(together / count, ceil_div(p.T, kLeast));
    chains.length = ceil_div(p.T, std::max(wanted, ceil_div(p.T, Op::kLength)));
    chains.segments = static_cast<unsigned>(ceil_div(p.T, chains.length));
    bool const is_cut = chains.segments > 1;

    Carver carver(workspace);
    i64 const sums = count * chains.segments * kSides * kColumn;
    if (is_cut) {
        u32* const arrived = carver.take<u32>(Op::kPasses * count);
        chains.arrived[0] = arrived, chains.arrived[1] = arrived + count;
        chains.left[0] = carver.take<Sum>(sums);
        if (Op::kPasses > 1) chains.left[1] = carver.take<SlopedSum>(sums);
    }
    Segments const records = plan_segments(p, chains.length, nullptr);
    float* const partial = carver.take<float>(Op::kChannelSums * records.count * p.D);
    if (workspace == nullptr) return carver.used();

    if (is_cut) fill(chains.arrived[0], Op::kPasses * count, u32{0}, stream);
    auto const go = [&](auto const& launcher, i64 groups) {
        launcher(both_ways<Op>, dim3(static_cast<unsigned>(groups * chains.segments)),
                 dim3(kThreads), kBytes, stream, p, chains, partial);
    };
    auto const alone = [](auto... x) { launch(x...); };
    chains.at_once = is_cut && chains.segments <= together;
    if (!is_cut) {
        go(alone, std::min(count, std::max<i64>(together, 1)));
    } else if (chains.at_once) {
        go([](auto... x) { launch_together(x...); }, std::min(count, together / chains.segments));
    } else {
        for (; chains.ready <= Op::kPasses; ++chains.ready) go(alone, count);
    }
    if constexpr (Op::kChannelSums > 0) {
        i64 const numbers = Op::kChannelSums * p.D;
        launch(add_shares<float>, dim3(static_cast<unsigned>(ceil_div(numbers, 128))), dim3(128), 0,
               stream, records, static_cast<float const*>(partial),
               static_cast<float*>(p.channel_grad), numbers);
    }
    return 0;
}

template <template <class> class Op>
int64_t run_both_typed(Wkv4Params const& p, void* workspace, void* stream) {
    return with_element(p.dtype, [&](auto type) {
        return run_both<Op<typename decltype(type)::type>>(p, workspace, stream);
    });
}

}  // namespace lsm::scan_kernel

namespace lsm {

using namespace scan_kernel;

// Never none: a null workspace asks for a size.
int64_t bi_wkv_fwd_workspace(Wkv4Params const& p) {
    return 256 + run_both_typed<BiWkvForward>(p, nullptr, nullptr);
}

int64_t bi_wkv_bwd_workspace(Wkv4Params const& p) {
    return 256 + run_both_typed<BiWkvBackward>(p, nullptr, nullptr);
}

void bi_wkv_fwd(Wkv4Params const& p, void* workspace, void* stream) {
    run_both_typed<BiWkvForward>(p, workspace, stream);
}

void bi_wkv_bwd(Wkv4Params const& p, void* workspace, void* stream) {
    run_both_typed<BiWkvBackward>(p, workspace, stream);
}

}  // namespace lsm
