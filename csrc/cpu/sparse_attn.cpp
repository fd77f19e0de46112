// Sparse attention on the CPU: which queries, which threads.
//
// The forward's tasks are tiles of queries. The backward's tasks own what they add up: one takes all queries of a
// key/value head of a sequence, or, where there are few of those, a stretch of them, and sums over stretches follow in
// order. How work is cut does not depend on the number of threads, so that results do not either.
#include <cstring>

#include "schedule.h"
#include "sparse_attn_kernels.h"

namespace lsm {
namespace {

using cpu::ceil_div, cpu::kAlign, cpu::round_up;
using cpu::SparseAttnKernels;
using cpu::SparseAttnSums;
using cpu::SparseAttnTask;

constexpr int64_t kThreadGrain = int64_t(1) << 20;  // multiply-adds worth waking a thread for
constexpr int64_t kEnoughTasks = 8;                 // of a backward
constexpr int64_t kMinStretch = 256;                // queries; a multiple of any block
constexpr int64_t kWriteKeys = 512;                 // of a task that adds up stretches

SparseAttnKernels const& kernels(Dtype dtype) {
    return cpu::best_sparse_attn_kernels(dtype);
}

int64_t boundary(SparseAttnParams const& p, void const* cu, int64_t n) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(cu)[n]
                                 : static_cast<int32_t const*>(cu)[n];
}

int64_t threads_for(SparseAttnParams const& p) {
    double pairs = double(p.B) * p.Tq * p.Tk * p.Hq;
    if (p.lists.index != nullptr)
        pairs = double(p.lists.entries) * p.lists.block_q * p.lists.block_k * p.Hq / p.lists.heads;
    auto const work = int64_t(pairs * double(p.K + p.V) / double(kThreadGrain));
    return std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
}

// All queries of each sequence, for its first key/value head.
std::vector<SparseAttnTask> sequences(SparseAttnParams const& p) {
    std::vector<SparseAttnTask> all;
    bool const packed = p.cu_seqlens_q != nullptr;
    int64_t row = 0;
    for (int64_t n = 0; n < p.N; ++n) {
        SparseAttnTask task{packed ? 0 : n, 0, 0, p.Hq / p.Hkv, 0, p.Tq, 0, p.Tk, row, 0, p.Tq};
        if (packed) {
            task.first_q = boundary(p, p.cu_seqlens_q, n);
            task.first_k = boundary(p, p.cu_seqlens_k, n);
            task.end = task.queries = boundary(p, p.cu_seqlens_q, n + 1) - task.first_q;
            task.keys = boundary(p, p.cu_seqlens_k, n + 1) - task.first_k;
            row += ceil_div(task.queries, p.lists.block_q);
        }
        all.push_back(task);
    }
    return all;
}

// f(heads of one pass) for the heads of a task.
template <class F>
void over_heads(SparseAttnParams const& p, SparseAttnTask task, F const& f) {
    int64_t const first = task.head, end = task.head + task.heads, step = cpu::heads_of_tile(p);
    for (int64_t h = first; h < end; h += step) {
        task.head = h, task.heads = std::min(step, end - h);
        f(task, h - first);
    }
}

// ---- Backward ----

// Stretches of one key/value head of one sequence, and where their sums are.
struct Unit {
    SparseAttnTask task;
    int64_t stretches, length;
    int64_t first;  // of its stretches
    int64_t sums;   // bytes before those of its first stretch
};

struct Plan {
    std::vector<Unit> units;
    int64_t stretches = 0, threads = 1;
    bool cut = false;           // sums of every stretch are kept, else a thread's
    int64_t sum_bytes = 0;      // of dk and dv, all that are kept or of one thread
    bool shared_lists = false;  // the bias's gradient is a sum over key/value heads
    int64_t scratch_bytes = 0;  // of a thread
    int64_t per_head = 0;       // numbers of sink logits and ramps, of one stretch
    int64_t number_bytes = 4;   // of a sum
};

int64_t row_bytes(SparseAttnParams const& p, Plan const& plan) {
    return (kernels(p.dtype).columns(p, p.K) + kernels(p.dtype).columns(p, p.V)) *
           plan.number_bytes;
}

Plan make_plan(SparseAttnParams const& p) {
    Plan plan;
    plan.threads = threads_for(p);
    plan.number_bytes = p.acc_dtype == Dtype::f64 ? 8 : 4;
    plan.scratch_bytes = round_up(kernels(p.dtype).scratch_bytes(p, true), kAlign);
    int64_t const wanted = ceil_div(kEnoughTasks, std::max<int64_t>(1, p.N * p.Hkv));
    for (SparseAttnTask task : sequences(p)) {
        int64_t const stretches = std::clamp<int64_t>(task.queries / kMinStretch, 1, wanted);
        int64_t const length =
            std::max(kMinStretch, round_up(ceil_div(task.queries, stretches), kMinStretch));
        for (int64_t kv = 0; kv < p.Hkv; ++kv) {
            task.kv_head = kv, task.head = kv * task.heads;
            int64_t const own = std::max<int64_t>(1, ceil_div(task.queries, length));
            plan.units.push_back({task, own, length, plan.stretches, 0});
            plan.stretches += own;
            plan.cut |= own > 1;
        }
    }
    int64_t const row = row_bytes(p, plan);
    for (Unit& unit : plan.units) {
        int64_t const bytes = round_up(unit.task.keys * row * unit.stretches, kAlign);
        unit.sums = plan.cut ? plan.sum_bytes : 0;
        plan.sum_bytes = plan.cut ? plan.sum_bytes + bytes : std::max(plan.sum_bytes, bytes);
    }
    plan.shared_lists = p.lists.bias != nullptr && p.lists.heads == 1 && p.Hkv > 1;
    plan.per_head = 2 * (p.Hq / p.Hkv);
    return plan;
}

// The workspace, piece by piece.
struct Places {
    Places(SparseAttnParams const& p, Plan const& plan, void* workspace) {
        auto const take = [&](int64_t size) {
            char* const piece =
                workspace == nullptr ? nullptr : static_cast<char*>(workspace) + bytes;
            bytes += round_up(size, kAlign);
            return piece;
        };
        scratch = take(plan.threads * plan.scratch_bytes);
        sums = take((plan.cut ? 1 : plan.threads) * plan.sum_bytes);
        per_head = take(plan.stretches * plan.per_head * plan.number_bytes);
        bias = take(plan.shared_lists ? p.Hkv * p.lists.entries * plan.number_bytes : 0);
    }
    char *scratch, *sums, *per_head, *bias;
    int64_t bytes = 0;
};

// to[i] = sum over n of from[n * stride + i].
template <class T>
void add_up(void* to, void const* from, int64_t numbers, int64_t parts, int64_t stride) {
    for (int64_t i = 0; i < numbers; ++i) {
        T sum = 0;
        for (int64_t n = 0; n < parts; ++n) sum += static_cast<T const*>(from)[n * stride + i];
        static_cast<T*>(to)[i] = sum;
    }
}

// Sink logits' and ramps' gradients: of a stretch first the ones of its heads, then the others'.
template <class T>
void add_up_per_head(SparseAttnParams const& p, Plan const& plan, void const* per_head) {
    int64_t const group = p.Hq / p.Hkv;
    for (auto [to, offset] : {std::pair{p.grad_sink_logits, int64_t(0)}, {p.grad_ramp, group}}) {
        if (to == nullptr) continue;
        T* const sum = static_cast<T*>(to);
        std::fill(sum, sum + p.Hq, T(0));
        for (Unit const& unit : plan.units) {
            for (int64_t s = 0; s < unit.stretches; ++s) {
                T const* const own =
                    static_cast<T const*>(per_head) + (unit.first + s) * plan.per_head + offset;
                for (int64_t h = 0; h < group; ++h) sum[unit.task.head + h] += own[h];
            }
        }
    }
}

void run_stretch(SparseAttnParams const& p, Plan const& plan, Places const& places,
                 Unit const& unit, int64_t stretch, int64_t thread) {
    int64_t const bytes = plan.number_bytes, K = kernels(p.dtype).columns(p, p.K);
    SparseAttnTask task = unit.task;
    task.begin = std::min(task.queries, stretch * unit.length);
    task.end = std::min(task.queries, task.begin + unit.length);
    // dk of every stretch, then dv of every stretch.
    char* const dk = places.sums + (plan.cut ? unit.sums : thread * plan.sum_bytes);
    char* const dv = dk + unit.stretches * task.keys * K * bytes;
    int64_t const V = kernels(p.dtype).columns(p, p.V);
    SparseAttnSums sums{dk + stretch * task.keys * K * bytes, dv + stretch * task.keys * V * bytes,
                        nullptr, nullptr, nullptr};
    std::memset(sums.dk, 0, size_t(task.keys * K * bytes));
    std::memset(sums.dv, 0, size_t(task.keys * V * bytes));
    if (p.grad_block_bias != nullptr) {
        sums.block_bias = plan.shared_lists ? places.bias + task.kv_head * p.lists.entries * bytes
                                            : static_cast<char*>(p.grad_block_bias);
    }
    char* const per_head = places.per_head + (unit.first + stretch) * plan.per_head * bytes;
    std::memset(per_head, 0, size_t(plan.per_head * bytes));
    over_heads(p, task, [&](SparseAttnTask const& pass, int64_t first) {
        if (p.grad_sink_logits != nullptr) sums.sink_logits = per_head + first * bytes;
        if (p.grad_ramp != nullptr) sums.ramp = per_head + (plan.per_head / 2 + first) * bytes;
        kernels(p.dtype).backward(p, pass, sums, places.scratch + thread * plan.scratch_bytes);
    });
    if (!plan.cut) {
        SparseAttnSums const all{dk, dv, nullptr, nullptr, nullptr};
        kernels(p.dtype).write_key_gradients(p, task, all, 1, 0, task.keys);
    }
}

struct Stretch {
    int64_t unit, number;
};

}  // namespace

int64_t sparse_attn_fwd_workspace(SparseAttnParams const& p) {
    return threads_for(p) * round_up(kernels(p.dtype).scratch_bytes(p, false), kAlign);
}

void sparse_attn_fwd(SparseAttnParams const& p, void* workspace, void*) {
    int64_t const tokens = cpu::tokens_of_tile(p);
    std::vector<SparseAttnTask> tasks;
    for (SparseAttnTask task : sequences(p)) {
        int64_t const group = task.heads, end = task.end;
        for (int64_t kv = 0; kv < p.Hkv; ++kv) {
            task.kv_head = kv, task.head = kv * group, task.heads = group;
            over_heads(p, task, [&](SparseAttnTask pass, int64_t) {
                // The last queries see the most keys, if not all see the same.
                for (int64_t t = (end - 1) / tokens * tokens; t >= 0 && end > 0; t -= tokens) {
                    pass.begin = t, pass.end = std::min(end, t + tokens);
                    tasks.push_back(pass);
                }
            });
        }
    }
    int64_t const scratch = round_up(kernels(p.dtype).scratch_bytes(p, false), kAlign);
    // What a thread keeps from task to task begins its scratch: so far nothing.
    for (int64_t thread = 0; thread < threads_for(p); ++thread)
        std::memset(static_cast<char*>(workspace) + thread * scratch, 0, kAlign);
    cpu::run_tasks(tasks, threads_for(p), [&](SparseAttnTask const& task, int64_t thread) {
        kernels(p.dtype).forward(p, task, static_cast<char*>(workspace) + thread * scratch);
    });
}

int64_t sparse_attn_bwd_workspace(SparseAttnParams const& p) {
    return Places(p, make_plan(p), nullptr).bytes;
}

void sparse_attn_bwd(SparseAttnParams const& p, void* workspace, void*) {
    Plan const plan = make_plan(p);
    Places const places(p, plan, workspace);
    int64_t const numbers = p.lists.entries * plan.number_bytes;
    if (p.grad_block_bias != nullptr) {
        std::memset(p.grad_block_bias, 0, size_t(numbers));
        if (plan.shared_lists) std::memset(places.bias, 0, size_t(p.Hkv * numbers));
    }
    std::vector<Stretch> stretches;
    for (size_t u = 0; u < plan.units.size(); ++u)
        for (int64_t s = 0; s < plan.units[u].stretches; ++s) stretches.push_back({int64_t(u), s});
    cpu::run_tasks(stretches, plan.threads, [&](Stretch const& stretch, int64_t thread) {
        run_stretch(p, plan, places, plan.units[size_t(stretch.unit)], stretch.number, thread);
    });
    if (plan.cut) {
        std::vector<Stretch> writes;  // by first key
        for (size_t u = 0; u < plan.units.size(); ++u)
            for (int64_t k = 0; k < plan.units[u].task.keys; k += kWriteKeys)
                writes.push_back({int64_t(u), k});
        cpu::run_tasks(writes, plan.threads, [&](Stretch const& write, int64_t) {
            Unit const& unit = plan.units[size_t(write.unit)];
            char* const dk = places.sums + unit.sums;
            char* const dv = dk + unit.stretches * unit.task.keys *
                                      kernels(p.dtype).columns(p, p.K) * plan.number_bytes;
            int64_t const end = std::min(unit.task.keys, write.number + kWriteKeys);
            kernels(p.dtype).write_key_gradients(p, unit.task, {dk, dv, nullptr, nullptr, nullptr},
                                                 unit.stretches, write.number, end);
        });
    }
    bool const wide = p.acc_dtype == Dtype::f64;
    if (plan.shared_lists && p.grad_block_bias != nullptr) {
        (wide ? add_up<double> : add_up<float>)(p.grad_block_bias, places.bias, p.lists.entries,
                                                p.Hkv, p.lists.entries);
    }
    (wide ? add_up_per_head<double> : add_up_per_head<float>)(p, plan, places.per_head);
}

}  // namespace lsm
