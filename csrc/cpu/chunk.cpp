// The chunk engine on the CPU: which kernels, which stretches, which threads. Work is dealt out by
// value head and sequence; the forward also by value columns. When that is too little for the
// threads, sequences are cut into segments, joined exactly: every segment's state from zero and its
// total decay, then the states at the boundaries in order, then all segments at once. The backward
// does the same from the end.
#include "chunk_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::boundary, cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::ChunkKernels;
using cpu::ChunkTask;

constexpr int64_t kMinSegment = 256;  // tokens; shorter ones do not pay for the additional pass
constexpr int64_t kColumnTile = 32;   // of V, two vectors at most
constexpr int64_t kStepGrain = int64_t(1) << 16;    // state elements worth waking a thread for
constexpr int64_t kThreadGrain = int64_t(1) << 18;  // state elements times tokens, likewise

ChunkKernels const& kernels(Dtype dtype) {
    return cpu::best_chunk_kernels(dtype);
}

// One sequence of one value head, cut into segments of equal length (the last may be shorter).
struct Chain {
    int64_t sequence, batch, head, begin, end;
    int64_t segments, length, first_state;  // first_state: of the segments' states in the workspace

    int64_t segment_begin(int64_t i) const { return std::min(begin + i * length, end); }
};

struct Plan {
    std::vector<Chain> chains;
    int64_t column_tiles = 1;
    int64_t columns = 0;  // per tile
    int64_t boundary_states = 0;
    int64_t longest = 0;  // tokens of the longest segment
    int64_t threads = 1;
    int64_t scratch = 0;  // bytes per thread
    bool backward = false;

    bool segmented() const { return boundary_states > 0; }
};

int64_t accumulator_bytes(ChunkParams const& p) {
    return p.dtype == Dtype::f64 ? 8 : 4;
}

int64_t matrix_bytes(ChunkParams const& p) {
    return p.K * p.V * accumulator_bytes(p);
}

// Of the states at boundaries, which have their normaliser behind them if there is one.
int64_t state_bytes(ChunkParams const& p) {
    return matrix_bytes(p) + (p.normaliser.sums() ? p.K * accumulator_bytes(p) : 0);
}

void* normaliser_of(ChunkParams const& p, void* state) {
    return p.normaliser.sums() ? static_cast<char*>(state) + matrix_bytes(p) : nullptr;
}

Plan make_plan(ChunkParams const& p, bool backward) {
    Plan plan;
    plan.backward = backward;
    int64_t const work = p.B * p.T * p.HV * p.K * p.V / kThreadGrain;
    int64_t const threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    int64_t const units = std::max<int64_t>(1, p.N * p.HV);
    if (!backward)
        plan.column_tiles = std::min(ceil_div(p.V, kColumnTile), ceil_div(threads, units));
    plan.columns =
        round_up(ceil_div(p.V, plan.column_tiles), plan.column_tiles > 1 ? kColumnTile : 1);
    plan.column_tiles = ceil_div(p.V, plan.columns);
    int64_t const want = ceil_div(threads, units * plan.column_tiles);
    plan.chains.reserve(size_t(p.N * p.HV));
    int64_t segments_in_all = 0;
    for (int64_t n = 0; n < p.N; ++n) {
        bool const packed = p.cu_seqlens != nullptr;
        int64_t const begin = packed ? boundary(p, n) : 0, end = packed ? boundary(p, n + 1) : p.T;
        int64_t const segments =
            std::clamp<int64_t>(std::min(want, (end - begin) / kMinSegment), 1, want);
        int64_t const length = std::max<int64_t>(1, ceil_div(end - begin, segments));
        plan.longest = std::max(plan.longest, std::min(length, end - begin));
        for (int64_t h = 0; h < p.HV; ++h) {
            plan.chains.push_back(
                {n, packed ? 0 : n, h, begin, end, segments, length, plan.boundary_states});
            if (segments > 1) plan.boundary_states += segments;
        }
        segments_in_all += segments * p.HV;
    }
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(plan.chains.begin(), plan.chains.end(),
                     [](Chain const& a, Chain const& b) { return a.length > b.length; });
    plan.threads = std::max<int64_t>(1, std::min(threads, segments_in_all * plan.column_tiles));
    plan.scratch = round_up(kernels(p.dtype).scratch_bytes(p, plan.longest, backward), kAlign);
    return plan;
}

// Boundary states, their decays (twice for the backward: S forwards, dS backwards), then each
// thread's scratch.
class Workspace {
  public:
    Workspace(ChunkParams const& p, Plan const& plan, void* base)
        : base_(static_cast<char*>(base)),
          state_(round_up(state_bytes(p), 64)),
          decay_(round_up(gates_per_token(p.decay, p.K, p.V) * accumulator_bytes(p), 64)),
          states_(plan.boundary_states),
          scratch_(plan.scratch),
          threads_(plan.threads),
          directions_(plan.backward ? 2 : 1) {}

    int64_t bytes() const { return scratch_begin() + threads_ * scratch_; }
    void* state(int64_t direction, int64_t i) const {
        return base_ + (direction * states_ + i) * state_;
    }
    void* decay(int64_t i) const { return base_ + directions_ * states_ * state_ + i * decay_; }
    void* scratch(int64_t thread) const { return base_ + scratch_begin() + thread * scratch_; }

  private:
    int64_t scratch_begin() const {
        return round_up(directions_ * states_ * state_ + states_ * decay_, kAlign);
    }

    char* base_;
    int64_t state_, decay_, states_, scratch_, threads_, directions_;
};

template <class Run>
void run_tasks(std::vector<ChunkTask> const& tasks, Plan const& plan, Workspace const& workspace,
               Run run) {
    cpu::run_tasks(tasks, plan.threads, [&](ChunkTask const& task, int64_t thread) {
        run(task, workspace.scratch(thread));
    });
}

ChunkTask segment_task(Plan const& plan, Chain const& chain, int64_t segment, int64_t tile,
                       int64_t V) {
    ChunkTask task{};
    task.sequence = chain.sequence, task.batch = chain.batch, task.head = chain.head;
    task.begin = chain.segment_begin(segment), task.end = chain.segment_begin(segment + 1);
    task.v_begin = tile * plan.columns, task.v_end = std::min(task.v_begin + plan.columns, V);
    return task;
}

// A chain's part of states, or of what has `bytes` for each.
template <class State>
State* part_of(State* states, ChunkParams const& p, Chain const& chain, int64_t bytes) {
    if (states == nullptr) return nullptr;
    using Byte = std::conditional_t<std::is_const_v<State>, char const, char>;
    return reinterpret_cast<Byte*>(states) + (chain.sequence * p.HV + chain.head) * bytes;
}
template <class State>
State* state_of(State* states, ChunkParams const& p, Chain const& chain) {
    return part_of(states, p, chain, matrix_bytes(p));
}

template <class Sums>
Sums* sums_of(Sums* sums, ChunkParams const& p, Chain const& chain) {
    return part_of(sums, p, chain, p.K * accumulator_bytes(p));
}

// Segment-local states become the states at the segments' far boundaries, in the order of the
// recurrence.
template <class T>
void join(ChunkParams const& p, T const* decay, T const* before, T* state) {
    T const* const of_values =
        decays_values(p.decay) ? decay + (decays_keys(p.decay) ? p.K : 0) : nullptr;
    bool const of_state = p.decay == Decay::scalar;
    for (int64_t k = 0; k < p.K; ++k, before += p.V, state += p.V) {
        T const of_row = decays_keys(p.decay) ? decay[k] : of_state ? decay[0] : T(1);
        for (int64_t v = 0; v < p.V; ++v) {
            state[v] += (of_values != nullptr ? of_row * of_values[v] : of_row) * before[v];
        }
    }
}

void join_states(ChunkParams const& p, void const* decay, void const* before, void* state) {
    if (before == nullptr) return;
    if (p.dtype == Dtype::f64) {
        join(p, static_cast<double const*>(decay), static_cast<double const*>(before),
             static_cast<double*>(state));
    } else {
        join(p, static_cast<float const*>(decay), static_cast<float const*>(before),
             static_cast<float*>(state));
    }
}

// The same of a normaliser's sums, which decay like the state.
void join_sums(ChunkParams const& p, void const* decay, void const* before, void* sums) {
    ChunkParams one_column = p;
    one_column.V = 1;
    join_states(one_column, decay, before, sums);
}

// S at the end of every segment but the last (direction 0).
void boundary_states(ChunkParams const& p, Plan const& plan, Workspace const& w) {
    std::vector<ChunkTask> tasks;
    for (Chain const& chain : plan.chains) {
        for (int64_t i = 0; i + 1 < chain.segments; ++i) {
            ChunkTask task = segment_task(plan, chain, i, 0, p.V);
            task.v_begin = 0, task.v_end = p.V;
            task.state_end = w.state(0, chain.first_state + i);
            task.n_end = normaliser_of(p, task.state_end);
            task.decay = w.decay(chain.first_state + i);
            tasks.push_back(task);
        }
    }
    run_tasks(tasks, plan, w, [&](ChunkTask const& task, void* scratch) {
        kernels(p.dtype).end_state(p, task, scratch);
    });
    for (Chain const& chain : plan.chains) {
        void const* before = state_of(p.initial_state, p, chain);
        void const* n_before = sums_of(p.normaliser.n0, p, chain);
        for (int64_t i = 0; i + 1 < chain.segments; ++i) {
            void* const state = w.state(0, chain.first_state + i);
            void* const n = normaliser_of(p, state);
            join_states(p, w.decay(chain.first_state + i), before, state);
            if (n != nullptr) join_sums(p, w.decay(chain.first_state + i), n_before, n);
            before = state, n_before = n;
        }
    }
}

// dS at the beginning of every segment but the first (direction 1).
void boundary_grads(ChunkParams const& p, Plan const& plan, Workspace const& w) {
    std::vector<ChunkTask> tasks;
    for (Chain const& chain : plan.chains) {
        for (int64_t i = 1; i < chain.segments; ++i) {
            ChunkTask task = segment_task(plan, chain, i, 0, p.V);
            task.grad_begin = w.state(1, chain.first_state + i);
            task.n_grad_begin = normaliser_of(p, task.grad_begin);
            task.decay = w.decay(chain.first_state + i);
            tasks.push_back(task);
        }
    }
    run_tasks(tasks, plan, w, [&](ChunkTask const& task, void* scratch) {
        kernels(p.dtype).begin_grad(p, task, scratch);
    });
    for (Chain const& chain : plan.chains) {
        void const* after = state_of(p.grad_final_state, p, chain);
        void const* n_after = sums_of(p.normaliser.grad_n, p, chain);
        for (int64_t i = chain.segments - 1; i > 0; --i) {
            void* const grad = w.state(1, chain.first_state + i);
            void* const n = normaliser_of(p, grad);
            join_states(p, w.decay(chain.first_state + i), after, grad);
            if (n != nullptr) join_sums(p, w.decay(chain.first_state + i), n_after, n);
            after = grad, n_after = n;
        }
    }
}

// What a normaliser's gates are, for all tokens.
void gates(ChunkParams const& p, Plan const& plan, Workspace const& w) {
    std::vector<ChunkTask> tasks;
    for (Chain const& chain : plan.chains) {
        ChunkTask task = segment_task(plan, chain, 0, 0, p.V);
        task.end = chain.end;
        tasks.push_back(task);
    }
    run_tasks(tasks, plan, w,
              [&](ChunkTask const& task, void*) { kernels(p.dtype).gates(p, task); });
}

void const* state_before(ChunkParams const& p, Workspace const& w, Chain const& chain,
                         int64_t segment) {
    return segment == 0 ? state_of(p.initial_state, p, chain)
                        : w.state(0, chain.first_state + segment - 1);
}

void const* sums_before(ChunkParams const& p, Workspace const& w, Chain const& chain,
                        int64_t segment) {
    return segment == 0 ? sums_of(p.normaliser.n0, p, chain)
                        : normaliser_of(p, w.state(0, chain.first_state + segment - 1));
}

void const* grad_after(ChunkParams const& p, Workspace const& w, Chain const& chain,
                       int64_t segment) {
    return segment + 1 == chain.segments ? state_of(p.grad_final_state, p, chain)
                                         : w.state(1, chain.first_state + segment + 1);
}

void const* sums_grad_after(ChunkParams const& p, Workspace const& w, Chain const& chain,
                            int64_t segment) {
    return segment + 1 == chain.segments
               ? sums_of(p.normaliser.grad_n, p, chain)
               : normaliser_of(p, w.state(1, chain.first_state + segment + 1));
}

}  // namespace

int64_t chunk_fwd_workspace(ChunkParams const& p) {
    return Workspace(p, make_plan(p, false), nullptr).bytes();
}

int64_t chunk_bwd_workspace(ChunkParams const& p) {
    return Workspace(p, make_plan(p, true), nullptr).bytes();
}

void chunk_fwd(ChunkParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p, false);
    Workspace const w(p, plan, workspace);
    if (p.normaliser.on) gates(p, plan, w);
    if (plan.segmented()) boundary_states(p, plan, w);
    std::vector<ChunkTask> tasks;
    for (Chain const& chain : plan.chains) {
        for (int64_t i = 0; i < chain.segments; ++i) {
            for (int64_t tile = 0; tile < plan.column_tiles; ++tile) {
                ChunkTask task = segment_task(plan, chain, i, tile, p.V);
                task.state_begin = state_before(p, w, chain, i);
                task.n_begin = sums_before(p, w, chain, i);
                if (i + 1 == chain.segments) {
                    task.state_end = state_of(p.final_state, p, chain);
                    if (tile == 0) task.n_end = sums_of(p.normaliser.n, p, chain);
                }
                tasks.push_back(task);
            }
        }
    }
    run_tasks(tasks, plan, w, [&](ChunkTask const& task, void* scratch) {
        kernels(p.dtype).forward(p, task, scratch);
    });
}

void chunk_bwd(ChunkParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p, true);
    Workspace const w(p, plan, workspace);
    if (p.normaliser.weights_only) gates(p, plan, w);
    if (plan.segmented()) {
        boundary_states(p, plan, w);
        boundary_grads(p, plan, w);
    }
    std::vector<ChunkTask> tasks;
    for (Chain const& chain : plan.chains) {
        for (int64_t i = 0; i < chain.segments; ++i) {
            ChunkTask task = segment_task(plan, chain, i, 0, p.V);
            task.state_begin = state_before(p, w, chain, i);
            task.grad_end = grad_after(p, w, chain, i);
            task.n_begin = sums_before(p, w, chain, i);
            task.n_grad_end = sums_grad_after(p, w, chain, i);
            if (i == 0) {
                task.grad_begin = state_of(p.grad_initial_state, p, chain);
                task.n_grad_begin = sums_of(p.normaliser.grad_n0, p, chain);
            }
            tasks.push_back(task);
        }
    }
    run_tasks(tasks, plan, w, [&](ChunkTask const& task, void* scratch) {
        kernels(p.dtype).backward(p, task, scratch);
    });
}

int64_t step_workspace(StepParams const& p) {
    return p.B * p.HV * cpu::step_features(p) * (p.dtype == Dtype::f64 ? 8 : 4);
}

void step(StepParams const& p, void* workspace, void*) {
    int64_t const grain = std::max<int64_t>(1, kStepGrain / (p.K * p.V)), states = p.B * p.HV;
    auto const run = [&](int64_t first, int64_t last) {
        kernels(p.dtype).step(p, workspace, first, last);
    };
    if (states <= grain) {
        run(0, states);
    } else {
        torch::stable::parallel_for(0, states, grain, run);
    }
}

}  // namespace lsm
