// Block selection's plans and instances.
#include "kernels/fill.cuh"
#include "kernels/sparse_attn/select.cuh"

namespace lsm {
namespace {

namespace at = block_select;

constexpr std::size_t kMostShared = 160 * 1024;  // that every GPU since sm_80 has
constexpr i64 kMostRowFloats = 16 * 1024;        // keys and blocks of one row in shared memory
constexpr i64 kRangeKeys = 2048;                 // of a range, where blocks share a map's rows

// What segments ask of params.
struct Queries {
    i64 T, N;
    void const* cu_seqlens;
    bool cu_seqlens_is_64bit;
};

at::Plan make_plan(ScoreParams const& p, bool choosing) {
    at::Plan plan{};
    plan.members = static_cast<int>(p.block_q * (p.group ? p.Hq / p.Hk : 1));
    plan.passes = (plan.members + at::kMembers - 1) / at::kMembers;
    i64 const most = p.blocks > 1 ? p.blocks : 1, per_range = kRangeKeys / p.tap_step;
    plan.range_blocks = static_cast<int>(choosing           ? most
                                         : per_range < 1    ? 1
                                         : per_range < most ? per_range
                                                            : most);
    plan.ranges = (most + plan.range_blocks - 1) / plan.range_blocks;
    i64 const keys = plan.range_blocks * p.tap_step + p.tap_count;
    plan.range_keys = static_cast<int>(keys < p.Tk ? keys : p.Tk > 0 ? p.Tk : 1);
    i64 const room = kMostRowFloats / (plan.range_keys + plan.range_blocks);
    i64 const fit = plan.passes > 1 ? 1 : at::kMembers / plan.members;
    plan.units = static_cast<int>(room < 1 ? 1 : room < fit ? room : fit);
    return plan;
}

Segments plan_rows(ScoreParams const& p, at::Plan const& plan, void* workspace) {
    Queries const queries{p.Tq, p.N, p.cu_seqlens_q, p.cu_seqlens_is_64bit};
    return plan_segments(queries, plan.units * p.block_q, workspace);
}

template <class Math>
void run(ScoreParams const& p, BlockChoice const& choice, void* workspace, void* stream) {
    at::Plan plan = make_plan(p, p.index != nullptr);
    int const columns = static_cast<int>((p.K + Math::kUnit - 1) / Math::kUnit * Math::kUnit);
    plan.depth = columns < Math::kMostDepth ? columns : Math::kMostDepth;
    plan.slices = (columns + plan.depth - 1) / plan.depth;
    if (p.cu_seqlens_q != nullptr) {  // rows behind those of the sequences
        if (p.index != nullptr) {
            fill(p.index, p.B * p.heads * p.rows * choice.capacity, -1, stream);
        } else {
            fill(static_cast<float*>(p.scores), p.B * p.heads * p.rows * p.blocks, -INFINITY,
                 stream);
        }
    }
    Segments const segments = plan_rows(p, plan, workspace);
    i64 const count = segments.count * p.heads * plan.ranges;
    if (count == 0 || p.rows == 0) return;
    Queries const queries{p.Tq, p.N, p.cu_seqlens_q, p.cu_seqlens_is_64bit};
    build_segments(queries, segments, stream);
    launch(at::score_kernel<Math>, dim3(static_cast<unsigned>(count)), dim3(at::kThreads),
           at::kStorage + at::slice_bytes<Math>(plan) + at::row_bytes(plan), stream, p, choice,
           plan, segments);
}

void run(ScoreParams const& p, BlockChoice const& choice, void* workspace, void* stream) {
    switch (p.dtype) {
        case Dtype::bf16:
            return run<at::TensorProducts<bf16>>(p, choice, workspace, stream);
        case Dtype::f16:
            return run<at::TensorProducts<half>>(p, choice, workspace, stream);
        default:
            return run<at::FloatProducts>(p, choice, workspace, stream);
    }
}

static_assert(at::kStorage + 64 * 1024 + kMostRowFloats * sizeof(float) <= kMostShared);

}  // namespace

int64_t block_scores_workspace(ScoreParams const& p) {
    Queries const queries{p.Tq, p.N, p.cu_seqlens_q, p.cu_seqlens_is_64bit};
    return segments_bytes(queries, make_plan(p, p.index != nullptr).units * p.block_q);
}

int64_t most_scores() {
    return kMostRowFloats;
}

void block_scores(ScoreParams const& p, void* workspace, void* stream) {
    run(p, BlockChoice{}, workspace, stream);
}

void select_blocks(ScoreParams const& p, BlockChoice const& choice, void* workspace, void* stream) {
    run(p, choice, workspace, stream);
}

void choose_blocks(ScoreParams const& p, BlockChoice const& choice, void* stream) {
    i64 const rows = p.B * p.heads * p.rows;
    if (rows == 0) return;
    launch(at::choose_kernel, dim3(static_cast<unsigned>((rows + at::kWarps - 1) / at::kWarps)),
           dim3(at::kThreads), 0, stream, p, choice);
}

namespace {

// f(a number of the type).
template <class F>
void with_type(Dtype dtype, F const& f) {
    if (dtype == Dtype::bf16) return f(bf16{});
    if (dtype == Dtype::f16) return f(half{});
    f(float{});
}

}  // namespace

void block_pool(PoolParams const& p, void* stream) {
    i64 const count = p.B * p.blocks * p.H;
    if (count == 0) return;
    with_type(p.dtype, [&](auto zero) {
        launch(at::pool_kernel<decltype(zero)>, dim3(static_cast<unsigned>(count)),
               dim3(at::kThreads), 0, stream, p);
    });
}

int64_t block_pool_bwd_workspace(PoolParams const& p) {
    return p.B * p.blocks * p.H * (p.pool == Pool::bounds ? 2 : 1) * p.K * sizeof(float);
}

void block_pool_bwd(PoolParams const& p, void* workspace, void* stream) {
    i64 const windows = p.B * p.blocks * p.H, numbers = p.B * p.T * p.H * p.K;
    float* const shares = static_cast<float*>(workspace);
    with_type(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (windows > 0)
            launch(at::share_kernel<T>, dim3(static_cast<unsigned>(windows)), dim3(at::kThreads), 0,
                   stream, p, shares);
        if (numbers > 0)
            launch(at::collect_kernel<T>,
                   dim3(static_cast<unsigned>((numbers + at::kThreads - 1) / at::kThreads)),
                   dim3(at::kThreads), 0, stream, p, static_cast<float const*>(shares));
    });
}

}  // namespace lsm
