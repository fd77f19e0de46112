// The sLSTM cell on the CPU: one task per sequence and head, which nothing can cut along time.
#include "schedule.h"
#include "slstm_kernels.h"

namespace lsm {
namespace {

using cpu::SlstmTask;

constexpr int64_t kThreadGrain = int64_t(1) << 17;  // multiply-adds worth waking a thread for

int64_t threads_for(SlstmParams const& p) {
    int64_t const work = p.B * p.T * p.H * 4 * p.D * p.D / kThreadGrain;
    return std::clamp<int64_t>(std::min(work, p.N * p.H), 1, torch::stable::get_num_threads());
}

int64_t scratch_bytes(SlstmParams const& p) {
    return cpu::round_up(cpu::best_slstm_kernels(p.dtype).scratch_bytes(p), cpu::kAlign);
}

template <class Run>
void over_tasks(SlstmParams const& p, void* workspace, Run const& run) {
    std::vector<SlstmTask> tasks;
    for (int64_t n = 0; n < p.N; ++n) {
        bool const packed = p.cu_seqlens != nullptr;
        int64_t const begin = packed ? cpu::boundary(p, n) : 0,
                      end = packed ? cpu::boundary(p, n + 1) : p.T;
        for (int64_t h = 0; h < p.H; ++h) tasks.push_back({packed ? 0 : n, n, h, begin, end});
    }
    int64_t const scratch = scratch_bytes(p);
    cpu::run_tasks(tasks, threads_for(p), [&](SlstmTask const& task, int64_t thread) {
        run(task, static_cast<char*>(workspace) + thread * scratch);
    });
}

}  // namespace

int64_t slstm_workspace(SlstmParams const& p) {
    return threads_for(p) * scratch_bytes(p);
}

void slstm_fwd(SlstmParams const& p, void* workspace, void*) {
    over_tasks(p, workspace, [&](SlstmTask const& task, void* scratch) {
        cpu::best_slstm_kernels(p.dtype).forward(p, task, scratch);
    });
}

void slstm_bwd(SlstmParams const& p, void* workspace, void*) {
    over_tasks(p, workspace, [&](SlstmTask const& task, void* scratch) {
        cpu::best_slstm_kernels(p.dtype).backward(p, task, scratch);
    });
}

}  // namespace lsm
