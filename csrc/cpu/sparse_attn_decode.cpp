// Decode attention on the CPU: which keys a group of queries visits, in parts dealt out to threads and merged in their
// order. A part's size follows from its sequence alone, so neither threads nor the batch have a say in the result.
#include <cmath>

#include "schedule.h"
#include "sparse_attn_decode_kernels.h"

namespace lsm {
namespace {

using cpu::DecodeTask;

constexpr int64_t kThreadGrain = int64_t(1) << 15;  // elements worth waking a thread for

cpu::SparseAttnDecodeKernels const& kernels(Dtype dtype) {
    return cpu::best_sparse_attn_decode_kernels(dtype);
}

int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// One entry for each part; a part's number is its place among those of its queries.
std::vector<DecodeTask> tasks_of(SparseAttnParams const& p) {
    std::vector<DecodeTask> tasks;
    int64_t const G = p.Hq / p.Hkv;
    bool const listed = p.lists.index != nullptr;
    int64_t const heads = listed && p.lists.heads == p.Hq ? 1 : G, queries = listed ? 1 : p.Tq;
    for (int64_t b = 0; b < p.B; ++b) {
        int64_t const keys = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.Tk;
        int64_t const first = p.mask.offset + (p.mask.align_end ? keys - p.Tq : 0);
        for (int64_t h0 = 0; h0 < p.Hq; h0 += heads) {
            int64_t left = p.mask.head_left != nullptr ? 0 : p.mask.left;
            for (int64_t h = h0; p.mask.head_left != nullptr && h < h0 + heads && left >= 0; ++h) {
                int64_t const own = p.mask.head_left[h];
                left = own < 0 ? -1 : std::max(left, own);
            }
            for (int64_t t0 = 0; t0 < p.Tq; t0 += queries) {
                DecodeTask task;
                task.batch = b, task.kv_head = h0 / G, task.keys = keys;
                task.t0 = t0, task.t1 = t0 + queries, task.h0 = h0, task.h1 = h0 + heads;
                if (listed) {
                    int64_t const row =
                        (b * p.lists.heads + h0 * p.lists.heads / p.Hq) * p.lists.rows + t0;
                    int64_t count = 0;
                    if (p.lists.row_ptr != nullptr) {
                        task.list_at = p.lists.row_ptr[row];
                        count = p.lists.row_ptr[row + 1] - task.list_at;
                    } else {
                        task.list_at = row * p.lists.capacity;
                        while (count < p.lists.capacity && p.lists.index[task.list_at + count] >= 0)
                            ++count;
                    }
                    task.list = p.lists.index + task.list_at;
                    task.visits = {0, 0, count * p.lists.block_k};
                } else {
                    task.visits = attn_visits(p.mask, left, first + t0, first + task.t1 - 1, keys);
                }
                int64_t const size = attn_part_keys(task.visits.count);
                int64_t const parts = std::max<int64_t>(1, attn_parts(task.visits.count));
                for (task.part = 0; task.part < parts; ++task.part) {
                    task.first = task.part * size;
                    task.last = std::min(task.first + size, task.visits.count);
                    tasks.push_back(task);
                }
            }
        }
    }
    return tasks;
}

int64_t parts_of(std::vector<DecodeTask> const& tasks) {
    int64_t parts = 1;
    for (auto const& task : tasks) parts = std::max(parts, task.part + 1);
    return parts;
}

int64_t threads_for(SparseAttnParams const& p, std::vector<DecodeTask> const& tasks) {
    int64_t work = 0;
    for (auto const& task : tasks)
        work += (task.last - task.first) * (p.K + p.V) *
                (1 + (task.t1 - task.t0) * (task.h1 - task.h0) / 8);
    return std::clamp<int64_t>(work / kThreadGrain, 1, torch::stable::get_num_threads());
}

// Where the workspace's pieces are, and its size.
struct Layout {
    Layout(SparseAttnParams const& p, std::vector<DecodeTask> const& tasks)
        : parts(parts_of(tasks)),
          threads(threads_for(p, tasks)),
          rows(p.B * p.Tq * p.Hq),
          scratch_bytes(cpu::round_up(kernels(p.dtype).scratch_bytes(p), cpu::kAlign)) {
        int64_t const width = bytes_of(p.acc_dtype);
        o = 0, lse = cpu::round_up(parts * rows * p.V * width, cpu::kAlign);
        scratch = lse + cpu::round_up(parts * rows * width, cpu::kAlign);
        size = scratch + threads * scratch_bytes;
    }
    int64_t parts, threads, rows, scratch_bytes, o, lse, scratch, size;
};

// run(first, last) over the rows of a merge.
template <class Run>
void over_rows(MergeParams const& p, Run const& run) {
    int64_t const rows = p.B * p.T * p.H;
    if (rows == 0) return;
    int64_t const grain = std::max<int64_t>(1, kThreadGrain / std::max<int64_t>(1, p.parts * p.V));
    if (rows <= grain) {
        run(0, rows);
    } else {
        torch::stable::parallel_for(0, rows, grain, run);
    }
}

}  // namespace

int64_t sparse_attn_decode_workspace(SparseAttnParams const& p) {
    return Layout(p, tasks_of(p)).size;
}

void sparse_attn_decode(SparseAttnParams const& p, void* workspace, void* stream) {
    std::vector<DecodeTask> const tasks = tasks_of(p);
    Layout const at(p, tasks);
    char* const base = static_cast<char*>(workspace);
    int64_t const width = bytes_of(p.acc_dtype);
    // A part that nobody has writes -inf where its lse would be.
    for (int64_t i = 0; i < at.parts * at.rows; ++i) {
        if (width == 8) {
            reinterpret_cast<double*>(base + at.lse)[i] = -INFINITY;
        } else {
            reinterpret_cast<float*>(base + at.lse)[i] = -INFINITY;
        }
    }
    cpu::run_tasks(tasks, at.threads, [&](DecodeTask const& task, int64_t thread) {
        kernels(p.dtype).decode(p, task, base + at.o + task.part * at.rows * p.V * width,
                                base + at.lse + task.part * at.rows * width,
                                base + at.scratch + thread * at.scratch_bytes);
    });
    MergeParams merge{};
    merge.dtype = p.dtype, merge.part_dtype = merge.acc_dtype = p.acc_dtype;
    merge.parts = at.parts, merge.B = p.B, merge.T = p.Tq, merge.H = p.Hq, merge.V = p.V;
    merge.o_parts = base + at.o, merge.lse_parts = base + at.lse;
    merge.sink_logits = p.sink_logits;
    merge.o = p.o, merge.lse = p.lse;
    merge_attn_states(merge, stream);
}

void merge_attn_states(MergeParams const& p, void*) {
    over_rows(p, [&](int64_t first, int64_t last) { kernels(p.dtype).merge(p, first, last); });
}

void merge_attn_states_bwd(MergeParams const& p, void*) {
    over_rows(p, [&](int64_t first, int64_t last) { kernels(p.dtype).merge_bwd(p, first, last); });
}

}  // namespace lsm
