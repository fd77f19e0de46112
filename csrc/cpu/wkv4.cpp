// RWKV-4's running average on the CPU: one task per sequence and block of channels.
#include "schedule.h"
#include "wkv4_kernels.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::Wkv4Task;

constexpr int64_t kBlock =
    256;  // channels of a task at most: a tile's states stay in the second cache
constexpr int64_t kUnit = 16;                       // blocks are multiples of it
constexpr int64_t kThreadGrain = int64_t(1) << 14;  // elements worth waking a thread for

struct Plan {
    int64_t threads, block;
    int64_t scratch;  // bytes per thread
    int64_t share;    // bytes of a sequence's gradients of channels
};

enum class Kind { forward, backward, both };

Plan make_plan(Wkv4Params const& p, Kind kind) {
    bool const backward = kind == Kind::backward;
    Plan plan{};
    int64_t const work = p.B * p.T * p.D / kThreadGrain;
    plan.threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t const wanted =
        std::max(ceil_div(plan.threads, std::max<int64_t>(1, p.N)), ceil_div(p.D, kBlock));
    plan.block = round_up(ceil_div(p.D, wanted), kUnit);
    plan.scratch = round_up(
        cpu::best_wkv4_kernels(p.dtype).scratch_bytes(p, plan.block, kind != Kind::forward),
        kAlign);
    plan.share = backward ? round_up(2 * p.D * (p.state_dtype == Dtype::f64 ? 8 : 4), kAlign) : 0;
    return plan;
}

int64_t workspace_bytes(Wkv4Params const& p, Kind kind) {
    Plan const plan = make_plan(p, kind);
    return plan.threads * plan.scratch + p.N * plan.share;
}

template <class Run>
void over_tasks(Wkv4Params const& p, Plan const& plan, void* workspace, Run const& run) {
    char* const scratch = static_cast<char*>(workspace);
    std::vector<Wkv4Task> tasks;
    for (int64_t n = 0, tile = 0; n < p.N; ++n) {
        bool const packed = p.cu_seqlens != nullptr;
        Wkv4Task task{};
        task.sequence = n, task.batch = packed ? 0 : n, task.tile = tile;
        task.begin = packed ? boundary(p, n) : 0, task.end = packed ? boundary(p, n + 1) : p.T;
        task.channel_grad = scratch + plan.threads * plan.scratch + n * plan.share;
        tile += ceil_div(task.end - task.begin, kWkv4Tile);
        for (int64_t c = 0; c < p.D; c += plan.block) {
            task.c_begin = c, task.c_end = std::min(c + plan.block, p.D);
            tasks.push_back(task);
        }
    }
    cpu::run_tasks(tasks, plan.threads, [&](Wkv4Task const& task, int64_t thread) {
        run(p, task, scratch + thread * plan.scratch);
    });
}

template <class T>
void sum_channel_grads(Wkv4Params const& p, Plan const& plan, char const* shares) {
    T* const sum = static_cast<T*>(p.channel_grad);
    for (int64_t i = 0; i < 2 * p.D; ++i) sum[i] = 0;
    for (int64_t n = 0; n < p.N; ++n) {
        T const* const share = reinterpret_cast<T const*>(shares + n * plan.share);
        for (int64_t i = 0; i < 2 * p.D; ++i) sum[i] += share[i];
    }
}

}  // namespace

int64_t wkv4_fwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(p, Kind::forward);
}

int64_t wkv4_bwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(p, Kind::backward);
}

int64_t bi_wkv_fwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(p, Kind::both);
}

void wkv4_fwd(Wkv4Params const& p, void* workspace, void*) {
    over_tasks(p, make_plan(p, Kind::forward), workspace, cpu::best_wkv4_kernels(p.dtype).forward);
}

void bi_wkv_fwd(Wkv4Params const& p, void* workspace, void*) {
    over_tasks(p, make_plan(p, Kind::both), workspace, cpu::best_wkv4_kernels(p.dtype).both);
}

void wkv4_bwd(Wkv4Params const& p, void* workspace, void*) {
    Plan const plan = make_plan(p, Kind::backward);
    over_tasks(p, plan, workspace, cpu::best_wkv4_kernels(p.dtype).backward);
    char const* const shares = static_cast<char*>(workspace) + plan.threads * plan.scratch;
    if (p.state_dtype == Dtype::f64) {
        sum_channel_grads<double>(p, plan, shares);
    } else {
        sum_channel_grads<float>(p, plan, shares);
    }
}

}  // namespace lsm
