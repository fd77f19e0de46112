// The selective scan on the CPU: blocks of channels and runs of sequences for the threads. Gradients that
// several tasks have shares of, those of B and C and of the channels, are added in the tasks' order.
#include <cstring>

#include "schedule.h"
#include "selective_kernels.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::SelectiveTask;

constexpr int64_t kBlock = 512;  // channels of a task at most
constexpr int64_t kApart = 64;   // likewise where channels lie apart, each in pages of its own
constexpr int64_t kUnit = 16;    // blocks are multiples of it
constexpr int64_t kThreadGrain = int64_t(1) << 13;  // states of tokens worth waking a thread for

cpu::SelectiveKernels const& kernels(Dtype dtype) {
    return cpu::best_selective_kernels(dtype);
}

struct Plan {
    int64_t threads;
    int64_t block, blocks;  // channels of a block, blocks of a group
    int64_t runs;           // of sequences
    int64_t longest = 0;    // sequence
    int64_t scratch = 0;    // bytes per thread
};

Plan make_plan(SelectiveParams const& p, bool backward) {
    Plan plan{};
    int64_t const work = p.B * p.T * p.D * p.S / kThreadGrain, channels = p.D / p.G;
    plan.threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t blocks = ceil_div(channels, p.u.head == 1 ? kBlock : kApart);
    if (p.N * p.G * blocks % plan.threads != 0) {
        blocks = round_up(blocks, ceil_div(plan.threads, std::max<int64_t>(1, p.N * p.G)));
    }
    plan.block = round_up(ceil_div(channels, blocks), kUnit);
    plan.blocks = ceil_div(channels, plan.block);
    plan.runs = std::clamp<int64_t>(ceil_div(2 * plan.threads, p.G * plan.blocks), 1,
                                    std::max<int64_t>(1, p.N));
    for (int64_t n = 0; n < p.N; ++n) {
        int64_t const length = p.cu_seqlens == nullptr ? p.T : boundary(p, n + 1) - boundary(p, n);
        plan.longest = std::max(plan.longest, length);
    }
    plan.scratch = round_up(kernels(p.dtype).scratch_bytes(p, plan.longest, backward), kAlign);
    return plan;
}

int64_t number_bytes(SelectiveParams const& p) {
    return (p.state_dtype == Dtype::f64 ? 8 : 4) * (p.is_complex ? 2 : 1);
}

// Each thread's scratch; in the backward each block's shares of dB and dC of tokens and each task's of the
// channels' gradients.
class Workspace {
  public:
    Workspace(SelectiveParams const& p, Plan const& plan, bool backward, void* base)
        : base_(static_cast<char*>(base)), scratch_(plan.scratch), threads_(plan.threads) {
        if (!backward) return;
        tokens_ = round_up(p.B * p.T * p.S * number_bytes(p), kAlign);
        channels_ = round_up(cpu::selective_channel_rows(p) * p.D * number_bytes(p), kAlign);
        blocks_ = p.G * plan.blocks, runs_ = plan.runs;
    }
    int64_t bytes() const {
        return threads_ * scratch_ + 2 * blocks_ * tokens_ + runs_ * channels_;
    }
    void* scratch(int64_t thread) const { return base_ + thread * scratch_; }
    void* tokens(int64_t which, int64_t block) const {
        return base_ + threads_ * scratch_ + (which * blocks_ + block) * tokens_;
    }
    void* channels(int64_t run) const {
        return base_ + threads_ * scratch_ + 2 * blocks_ * tokens_ + run * channels_;
    }

  private:
    char* base_;
    int64_t scratch_, threads_, tokens_ = 0, channels_ = 0, blocks_ = 0, runs_ = 0;
};

std::vector<SelectiveTask> make_tasks(SelectiveParams const& p, Plan const& plan,
                                      Workspace const& w, bool backward) {
    std::vector<SelectiveTask> tasks;
    tasks.reserve(size_t(plan.runs * p.G * plan.blocks));
    int64_t const channels = p.D / p.G, per_run = ceil_div(p.N, plan.runs);
    for (int64_t run = 0; run < plan.runs; ++run) {
        for (int64_t g = 0; g < p.G; ++g) {
            for (int64_t k = 0; k < plan.blocks; ++k) {
                SelectiveTask task{};
                task.n_begin = std::min(run * per_run, p.N);
                task.n_end = std::min(task.n_begin + per_run, p.N);
                task.group = g;
                task.c_begin = g * channels + k * plan.block;
                task.c_end = g * channels + std::min((k + 1) * plan.block, channels);
                if (backward) {
                    if (!p.channel_B) task.db = w.tokens(0, g * plan.blocks + k);
                    if (!p.channel_C) task.dc = w.tokens(1, g * plan.blocks + k);
                    task.channel_grads = w.channels(run);
                }
                tasks.push_back(task);
            }
        }
    }
    return tasks;
}

// to[i * to_stride + j] = sum over shares of share[i * count + j]
template <class T>
void add_shares(void* to, int64_t rows, int64_t count, int64_t to_stride,
                std::vector<void const*> const& shares) {
    for (int64_t i = 0; i < rows; ++i) {
        T* const row = static_cast<T*>(to) + i * to_stride;
        for (int64_t j = 0; j < count; ++j) row[j] = 0;
        for (void const* share : shares) {
            T const* const from = static_cast<T const*>(share) + i * count;
            for (int64_t j = 0; j < count; ++j) row[j] += from[j];
        }
    }
}

// Sums of the runs' rows [.., D], and from rows by state to [D, S].
template <class T>
void sum_channel_grads(SelectiveParams const& p, Plan const& plan, Workspace const& w) {
    int64_t const K = p.is_complex ? 2 : 1;
    auto const sum = [&](void* to, int64_t first_row, int64_t states, int64_t components) {
        if (to == nullptr) return;
        for (int64_t c = 0; c < p.D; ++c) {
            for (int64_t s = 0; s < states; ++s) {
                for (int64_t k = 0; k < components; ++k) {
                    T total = 0;
                    for (int64_t run = 0; run < plan.runs; ++run) {
                        total += static_cast<T const*>(
                            w.channels(run))[((first_row + s) * p.D + c) * K + k];
                    }
                    static_cast<T*>(to)[(c * states + s) * components + k] = total;
                }
            }
        }
    };
    sum(p.dA, 0, p.S, K);
    if (p.channel_B) sum(p.db, p.S, p.S, K);
    if (p.channel_C) sum(p.dc, 2 * p.S, p.S, K);
    sum(p.dskip, 3 * p.S, 1, 1);
    sum(p.ddt_bias, 3 * p.S + 1, 1, 1);
}

template <class T>
void sum_token_grads(SelectiveParams const& p, Plan const& plan, Workspace const& w) {
    int64_t const width = p.S * (p.is_complex ? 2 : 1);
    for (int64_t which = 0; which < 2; ++which) {
        if (which == 0 ? p.channel_B : p.channel_C) continue;
        for (int64_t g = 0; g < p.G; ++g) {
            std::vector<void const*> shares;
            for (int64_t k = 0; k < plan.blocks; ++k)
                shares.push_back(w.tokens(which, g * plan.blocks + k));
            T* const to = static_cast<T*>(which == 0 ? p.db : p.dc) + g * width;
            add_shares<T>(to, p.B * p.T, width, p.G * width, shares);
        }
    }
}

}  // namespace

// The backward walks forwards again.
int64_t selective_saved_states(SelectiveParams const&) {
    return 0;
}

int64_t selective_fwd_workspace(SelectiveParams const& p) {
    return Workspace(p, make_plan(p, false), false, nullptr).bytes();
}

int64_t selective_bwd_workspace(SelectiveParams const& p) {
    return Workspace(p, make_plan(p, true), true, nullptr).bytes();
}

void selective_fwd(SelectiveParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p, false);
    Workspace const w(p, plan, false, workspace);
    cpu::run_tasks(make_tasks(p, plan, w, false), plan.threads,
                   [&](SelectiveTask const& task, int64_t thread) {
                       kernels(p.dtype).forward(p, task, w.scratch(thread));
                   });
}

void selective_bwd(SelectiveParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p, true);
    Workspace const w(p, plan, true, workspace);
    cpu::run_tasks(make_tasks(p, plan, w, true), plan.threads,
                   [&](SelectiveTask const& task, int64_t thread) {
                       kernels(p.dtype).backward(p, task, w.scratch(thread));
                   });
    if (p.state_dtype == Dtype::f64) {
        sum_token_grads<double>(p, plan, w);
        sum_channel_grads<double>(p, plan, w);
    } else {
        sum_token_grads<float>(p, plan, w);
        sum_channel_grads<float>(p, plan, w);
    }
}

}  // namespace lsm
