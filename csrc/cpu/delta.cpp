// The delta engine on the CPU: which kernels, which threads. A task is one sequence of one value
// head; the forward is also dealt out by value columns, which do not know of each other. The
// backward keeps all columns together, over which the gradients of keys are summed.
#include <memory>
#include <new>

#include "delta_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::DeltaKernels;
using cpu::DeltaTask;

constexpr int64_t kColumnTile = 64;                 // of V, four vectors at most
constexpr int64_t kThreadGrain = int64_t(1) << 17;  // state elements times slots worth a thread

DeltaKernels const& kernels(Dtype dtype) {
    return cpu::best_delta_kernels(dtype);
}

struct Plan {
    std::vector<DeltaTask> tasks;
    int64_t threads = 1;
    int64_t scratch = 0;  // bytes per thread
};

template <class State>
State* state_of(State* states, DeltaParams const& p, int64_t sequence, int64_t head) {
    if (states == nullptr) return nullptr;
    using Byte = std::conditional_t<std::is_const_v<State>, char const, char>;
    int64_t const bytes = p.K * p.V * (p.dtype == Dtype::f64 ? 8 : 4);
    return reinterpret_cast<Byte*>(states) + (sequence * p.HV + head) * bytes;
}

Plan make_plan(DeltaParams const& p, bool backward) {
    Plan plan;
    int64_t const work = p.B * p.T * p.n * p.HV * p.K * p.V / kThreadGrain;
    int64_t const threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t const chains = std::max<int64_t>(1, p.N * p.HV);
    int64_t const tiles =
        backward ? 1 : std::min(ceil_div(p.V, kColumnTile), ceil_div(threads, chains));
    int64_t const columns = tiles > 1 ? round_up(ceil_div(p.V, tiles), kColumnTile) : p.V;
    int64_t longest = 0;
    plan.tasks.reserve(size_t(chains * tiles));
    for (int64_t n = 0; n < p.N; ++n) {
        bool const packed = p.cu_seqlens != nullptr;
        for (int64_t h = 0; h < p.HV; ++h) {
            DeltaTask task{};
            task.batch = packed ? 0 : n, task.head = h;
            task.begin = packed ? boundary(p, n) : 0;
            task.end = packed ? boundary(p, n + 1) : p.T;
            task.state_begin = state_of(p.initial_state, p, n, h);
            task.state_end = state_of(p.final_state, p, n, h);
            if (backward) {
                task.grad_end = state_of(p.grad_final_state, p, n, h);
                task.grad_begin = state_of(p.grad_initial_state, p, n, h);
            }
            longest = std::max(longest, task.end - task.begin);
            for (int64_t v = 0; v < p.V; v += columns) {
                task.v_begin = v, task.v_end = std::min(v + columns, p.V);
                plan.tasks.push_back(task);
            }
        }
    }
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(
        plan.tasks.begin(), plan.tasks.end(),
        [](DeltaTask const& a, DeltaTask const& b) { return a.end - a.begin > b.end - b.begin; });
    plan.threads = std::max<int64_t>(1, std::min<int64_t>(threads, int64_t(plan.tasks.size())));
    // The last columns may be fewer, which is no less scratch: the blocks of their tokens can be longer.
    auto const bytes = [&](int64_t width) {
        return kernels(p.dtype).scratch_bytes(p, longest, width, backward);
    };
    plan.scratch = round_up(std::max(bytes(columns), bytes(p.V % columns)), kAlign);
    return plan;
}

template <class Kernel>
void run(DeltaParams const& p, Plan const& plan, void* workspace, Kernel kernel) {
    char* const base = static_cast<char*>(workspace);
    cpu::run_tasks(plan.tasks, plan.threads, [&](DeltaTask const& task, int64_t thread) {
        kernel(p, task, base + thread * plan.scratch);
    });
}

int64_t workspace_bytes(Plan const& plan) {
    return plan.threads * plan.scratch;
}

}  // namespace

int64_t delta_fwd_workspace(DeltaParams const& p) {
    return workspace_bytes(make_plan(p, false));
}

int64_t delta_bwd_workspace(DeltaParams const& p) {
    return workspace_bytes(make_plan(p, true));
}

void delta_fwd(DeltaParams const& p, void* workspace, void*) {
    run(p, make_plan(p, false), workspace, kernels(p.dtype).forward);
}

void delta_bwd(DeltaParams const& p, void* workspace, void*) {
    run(p, make_plan(p, true), workspace, kernels(p.dtype).backward);
}

// A forward over one token.
void delta_step(DeltaStepParams const& s, void*) {
    DeltaParams p{};
    p.transition = s.transition, p.decay = s.decay, p.beta_per_channel = s.beta_per_channel;
    p.dtype = s.dtype, p.gate_dtype = s.gate_dtype, p.beta_dtype = s.beta_dtype;
    p.state_dtype = s.state_dtype;
    p.B = p.N = s.B, p.T = 1, p.H = s.H, p.HV = s.HV, p.K = s.K, p.V = s.V, p.n = s.n;
    p.scale = s.scale;
    p.q = s.q, p.k = s.k, p.v = s.v, p.erase = s.erase, p.write = s.write;
    p.g = s.g, p.beta = s.beta, p.o = s.o;
    p.initial_state = p.final_state = s.state;
    Plan const plan = make_plan(p, false);
    struct Free {
        void operator()(char* bytes) const { operator delete[](bytes, std::align_val_t(kAlign)); }
    };
    std::unique_ptr<char[], Free> const workspace(
        new (std::align_val_t(kAlign)) char[size_t(workspace_bytes(plan))]);
    run(p, plan, workspace.get(), kernels(p.dtype).forward);
}

}  // namespace lsm
