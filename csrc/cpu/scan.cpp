// The scan engine on the CPU: which kernels, which stretches, which threads. Work is dealt out by
// sequence and block of channels; when that is too little for the threads, sequences are cut into
// segments, joined exactly: every segment's end state from zero and its total decay, then the states
// at the boundaries in order, then all segments at once. The backward does the same from the end.
#include <complex>
#include <cstring>

#include "scan_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::ScanKernels;
using cpu::ScanTask;

constexpr int64_t kBlock =
    1024;  // channels of a task at most: their states stay in the first cache
constexpr int64_t kStepBlock = 256;   // likewise of a single token, whose states lie on the stack
constexpr int64_t kUnit = 64;         // blocks are multiples of it
constexpr int64_t kMinSegment = 256;  // positions
constexpr int64_t kThreadGrain = int64_t(1) << 15;  // elements worth waking a thread for

ScanKernels const& kernels(Dtype dtype) {
    return cpu::best_scan_kernels(dtype);
}

// One sequence, cut into segments of equal length (the last may be shorter); numbered as they are
// walked.
struct Chain {
    int64_t sequence, batch, begin, end, segments, length;
    int64_t first_row;  // of the segments' rows in the workspace
};

struct Plan {
    std::vector<Chain> chains;
    int64_t block = 0;  // channels
    int64_t blocks = 0;
    int64_t rows = 0;  // segments in all
    int64_t threads = 1;
    bool segmented = false;
};

Plan make_plan(ScanParams const& p) {
    Plan plan;
    int64_t const work = p.B * p.T * p.D / kThreadGrain;
    plan.threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t const wanted =
        std::max<int64_t>(ceil_div(plan.threads, std::max<int64_t>(1, p.N)), ceil_div(p.D, kBlock));
    plan.block = round_up(ceil_div(p.D, wanted), kUnit);
    plan.blocks = ceil_div(p.D, plan.block);
    int64_t const want =
        ceil_div(plan.threads, std::max<int64_t>(1, p.N * plan.blocks));  // segments per sequence
    plan.chains.reserve(size_t(p.N));
    for (int64_t n = 0; n < p.N; ++n) {
        bool const packed = p.cu_seqlens != nullptr;
        int64_t const begin = packed ? boundary(p, n) : 0, end = packed ? boundary(p, n + 1) : p.T;
        int64_t const segments =
            std::clamp<int64_t>(std::min(want, (end - begin) / kMinSegment), 1, want);
        plan.chains.push_back({n, packed ? 0 : n, begin, end, segments,
                               std::max<int64_t>(1, ceil_div(end - begin, segments)), plan.rows});
        plan.rows += segments;
        plan.segmented |= segments > 1;
    }
    return plan;
}

int64_t number_bytes(ScanParams const& p) {
    return (p.state_dtype == Dtype::f64 ? 8 : 4) * (p.is_complex ? 2 : 1);
}

// Rows of [D] per segment: states (and in the backward their gradients) at the boundaries, decays,
// shares of the channels' gradient; then each thread's scratch.
class Workspace {
  public:
    enum Row { kState, kGrad, kDecay, kChannelGrad, kRows };

    Workspace(ScanParams const& p, Plan const& plan, void* base)
        : base_(static_cast<char*>(base)),
          row_(round_up(p.D * number_bytes(p), kAlign)),
          segments_(plan.segmented || p.channel_grad != nullptr ? plan.rows : 0),
          scratch_(round_up(kernels(p.dtype).scratch_bytes(p, plan.block), kAlign)),
          threads_(plan.threads) {}

    int64_t bytes() const { return scratch_begin() + threads_ * scratch_; }
    void* row(Row kind, int64_t segment) const {
        return base_ + (int64_t(kind) * segments_ + segment) * row_;
    }
    void* scratch(int64_t thread) const { return base_ + scratch_begin() + thread * scratch_; }

  private:
    int64_t scratch_begin() const { return kRows * segments_ * row_; }

    char* base_;
    int64_t row_, segments_, scratch_, threads_;
};

void run_all(std::vector<ScanTask> const& tasks, Plan const& plan, Workspace const& w,
             ScanParams const& p, void (*run)(ScanParams const&, ScanTask const&, void*)) {
    cpu::run_tasks(tasks, plan.threads,
                   [&](ScanTask const& task, int64_t thread) { run(p, task, w.scratch(thread)); });
}

// f(task, chain, segment) for every segment and block of channels.
template <class F>
std::vector<ScanTask> make_tasks(ScanParams const& p, Plan const& plan, F const& f) {
    std::vector<ScanTask> tasks;
    tasks.reserve(size_t(plan.rows * plan.blocks));
    for (Chain const& chain : plan.chains) {
        for (int64_t s = 0; s < chain.segments; ++s) {
            int64_t const from = std::min(s * chain.length, chain.end - chain.begin);
            int64_t const to = std::min(from + chain.length, chain.end - chain.begin);
            for (int64_t c = 0; c < p.D; c += plan.block) {
                ScanTask task{};
                task.batch = chain.batch, task.first = s == 0;
                task.begin = p.reverse ? chain.end - to : chain.begin + from;
                task.end = p.reverse ? chain.end - from : chain.begin + to;
                task.c_begin = c, task.c_end = std::min(c + plan.block, p.D);
                if (f(task, chain, s)) tasks.push_back(task);
            }
        }
    }
    return tasks;
}

template <class State>
State* state_of(State* states, ScanParams const& p, int64_t sequence) {
    if (states == nullptr) return nullptr;
    using Byte = std::conditional_t<std::is_const_v<State>, char const, char>;
    return reinterpret_cast<Byte*>(states) + sequence * p.D * number_bytes(p);
}

template <class F>
void with_number(ScanParams const& p, F const& f) {
    if (p.is_complex) {
        p.state_dtype == Dtype::f64 ? f(std::complex<double>{}) : f(std::complex<float>{});
    } else {
        p.state_dtype == Dtype::f64 ? f(double{}) : f(float{});
    }
}

// state += decay * before
void join(ScanParams const& p, void const* decay, void const* before, void* state) {
    if (before == nullptr) return;
    with_number(p, [&](auto zero) {
        using N = decltype(zero);
        auto const *a = static_cast<N const*>(decay), *h = static_cast<N const*>(before);
        for (int64_t c = 0; c < p.D; ++c) static_cast<N*>(state)[c] += a[c] * h[c];
    });
}

// h at the end of every segment but the last.
void boundary_states(ScanParams const& p, Plan const& plan, Workspace const& w) {
    auto const tasks = make_tasks(p, plan, [&](ScanTask& task, Chain const& chain, int64_t s) {
        task.state_end = w.row(Workspace::kState, chain.first_row + s);
        task.decay = w.row(Workspace::kDecay, chain.first_row + s);
        return s + 1 < chain.segments;
    });
    run_all(tasks, plan, w, p, kernels(p.dtype).end_state);
    for (Chain const& chain : plan.chains) {
        void const* before = state_of(p.initial_state, p, chain.sequence);
        for (int64_t s = 0; s + 1 < chain.segments; ++s) {
            void* const state = w.row(Workspace::kState, chain.first_row + s);
            join(p, w.row(Workspace::kDecay, chain.first_row + s), before, state);
            before = state;
        }
    }
}

// dh before every segment but the first.
void boundary_grads(ScanParams const& p, Plan const& plan, Workspace const& w) {
    auto const tasks = make_tasks(p, plan, [&](ScanTask& task, Chain const& chain, int64_t s) {
        task.grad_begin = w.row(Workspace::kGrad, chain.first_row + s);
        task.decay = w.row(Workspace::kDecay, chain.first_row + s);
        return s > 0;
    });
    run_all(tasks, plan, w, p, kernels(p.dtype).begin_grad);
    for (Chain const& chain : plan.chains) {
        void const* after = state_of(p.grad_final_state, p, chain.sequence);
        for (int64_t s = chain.segments - 1; s > 0; --s) {
            void* const grad = w.row(Workspace::kGrad, chain.first_row + s);
            join(p, w.row(Workspace::kDecay, chain.first_row + s), after, grad);
            after = grad;
        }
    }
}

// The segments' shares of the channels' gradient, added in order.
void sum_channel_grads(ScanParams const& p, Plan const& plan, Workspace const& w) {
    std::memset(p.channel_grad, 0, size_t(p.D * number_bytes(p)));
    with_number(p, [&](auto zero) {
        using N = decltype(zero);
        auto* const sum = static_cast<N*>(p.channel_grad);
        for (int64_t s = 0; s < plan.rows; ++s) {
            auto const* const share = static_cast<N const*>(w.row(Workspace::kChannelGrad, s));
            for (int64_t c = 0; c < p.D; ++c) sum[c] += share[c];
        }
    });
}

// A token that one thread has done before a plan is made.
bool is_small_step(ScanParams const& p) {
    return p.T == 1 && p.cu_seqlens == nullptr && p.N * p.D < 2 * kThreadGrain;
}

void small_step(ScanParams const& p) {
    constexpr int64_t kNumber = 16;  // bytes, at most
    alignas(64) char scratch[3 * kStepBlock * kNumber];
    ScanKernels const& run = kernels(p.dtype);
    for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t c = 0; c < p.D; c += kStepBlock) {
            ScanTask task{};
            task.batch = n, task.first = true, task.end = 1;
            task.c_begin = c, task.c_end = std::min(c + kStepBlock, p.D);
            task.state_begin = state_of(p.initial_state, p, n);
            task.state_end = state_of(p.final_state, p, n);
            run.forward(p, task, scratch);
        }
    }
}

}  // namespace

int64_t scan_fwd_workspace(ScanParams const& p) {
    if (is_small_step(p)) return 0;
    return Workspace(p, make_plan(p), nullptr).bytes();
}

int64_t scan_bwd_workspace(ScanParams const& p) {
    return Workspace(p, make_plan(p), nullptr).bytes();
}

void scan_fwd(ScanParams const& p, void* workspace, void*) {
    if (is_small_step(p)) return small_step(p);
    Plan const plan = make_plan(p);
    Workspace const w(p, plan, workspace);
    if (plan.segmented) boundary_states(p, plan, w);
    auto const tasks = make_tasks(p, plan, [&](ScanTask& task, Chain const& chain, int64_t s) {
        task.state_begin = s == 0 ? state_of(p.initial_state, p, chain.sequence)
                                  : w.row(Workspace::kState, chain.first_row + s - 1);
        if (s + 1 == chain.segments) task.state_end = state_of(p.final_state, p, chain.sequence);
        return true;
    });
    run_all(tasks, plan, w, p, kernels(p.dtype).forward);
}

void scan_bwd(ScanParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p);
    Workspace const w(p, plan, workspace);
    if (plan.segmented) boundary_grads(p, plan, w);
    auto const tasks = make_tasks(p, plan, [&](ScanTask& task, Chain const& chain, int64_t s) {
        if (s == 0) {
            task.state_begin = state_of(p.initial_state, p, chain.sequence);
            task.grad_begin = state_of(p.grad_initial_state, p, chain.sequence);
        }
        task.grad_end = s + 1 == chain.segments ? state_of(p.grad_final_state, p, chain.sequence)
                                                : w.row(Workspace::kGrad, chain.first_row + s + 1);
        if (p.channel_grad != nullptr)
            task.channel_grad = w.row(Workspace::kChannelGrad, chain.first_row + s);
        return true;
    });
    run_all(tasks, plan, w, p, kernels(p.dtype).backward);
    if (p.channel_grad != nullptr) sum_channel_grads(p, plan, w);
}

}  // namespace lsm
