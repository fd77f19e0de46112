// RWKV-4's running average, and that of both directions, on the CPU: one task per sequence and block of channels.
#include "bi_wkv_kernels.h"
#include "schedule.h"
#include "wkv4_kernels.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::Wkv4Kernels, cpu::Wkv4Task;

constexpr int64_t kBlock =
    256;  // channels of a task at most: a tile's states stay in the second cache
constexpr int64_t kUnit = 16;              // blocks are multiples of it
constexpr int64_t kMostScratch = 4 << 20;  // bytes of a thread, where blocks can be smaller
constexpr int64_t kThreadGrain = int64_t(1) << 14;  // elements worth waking a thread for

struct Plan {
    int64_t threads, block;
    int64_t scratch;  // bytes per thread
    int64_t share;    // bytes of a sequence's gradients of channels
};

Plan make_plan(Wkv4Kernels const& kernels, Wkv4Params const& p, bool backward) {
    Plan plan{};
    int64_t const work = p.B * p.T * p.D / kThreadGrain;
    plan.threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t const wanted =
        std::max(ceil_div(plan.threads, std::max<int64_t>(1, p.N)), ceil_div(p.D, kBlock));
    plan.block = round_up(ceil_div(p.D, wanted), kUnit);
    while (plan.block > kUnit && kernels.scratch_bytes(p, plan.block, backward) > kMostScratch)
        plan.block = round_up(plan.block / 2, kUnit);
    plan.scratch = round_up(kernels.scratch_bytes(p, plan.block, backward), kAlign);
    plan.share = backward ? round_up(2 * p.D * (p.state_dtype == Dtype::f64 ? 8 : 4), kAlign) : 0;
    return plan;
}

int64_t workspace_bytes(Wkv4Kernels const& kernels, Wkv4Params const& p, bool backward) {
    Plan const plan = make_plan(kernels, p, backward);
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

void forward(Wkv4Kernels const& kernels, Wkv4Params const& p, void* workspace) {
    over_tasks(p, make_plan(kernels, p, false), workspace, kernels.forward);
}

void backward(Wkv4Kernels const& kernels, Wkv4Params const& p, void* workspace) {
    Plan const plan = make_plan(kernels, p, true);
    over_tasks(p, plan, workspace, kernels.backward);
    char const* const shares = static_cast<char*>(workspace) + plan.threads * plan.scratch;
    if (p.state_dtype == Dtype::f64) {
        sum_channel_grads<double>(p, plan, shares);
    } else {
        sum_channel_grads<float>(p, plan, shares);
    }
}

}  // namespace

int64_t wkv4_fwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(cpu::best_wkv4_kernels(p.dtype), p, false);
}
int64_t wkv4_bwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(cpu::best_wkv4_kernels(p.dtype), p, true);
}
int64_t bi_wkv_fwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(cpu::best_bi_wkv_kernels(p.dtype), p, false);
}
int64_t bi_wkv_bwd_workspace(Wkv4Params const& p) {
    return workspace_bytes(cpu::best_bi_wkv_kernels(p.dtype), p, true);
}

void wkv4_fwd(Wkv4Params const& p, void* workspace, void*) {
    forward(cpu::best_wkv4_kernels(p.dtype), p, workspace);
}
void wkv4_bwd(Wkv4Params const& p, void* workspace, void*) {
    backward(cpu::best_wkv4_kernels(p.dtype), p, workspace);
}
void bi_wkv_fwd(Wkv4Params const& p, void* workspace, void*) {
    forward(cpu::best_bi_wkv_kernels(p.dtype), p, workspace);
}
void bi_wkv_bwd(Wkv4Params const& p, void* workspace, void*) {
    backward(cpu::best_bi_wkv_kernels(p.dtype), p, workspace);
}

}  // namespace lsm
