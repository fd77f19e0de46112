// Block selection on the CPU: scores by rows dealt out to threads, and the choice among them.
#include <algorithm>
#include <cmath>

#include "block_select_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::BlockTask;

constexpr int64_t kThreadGrain = int64_t(1) << 15;  // multiply-adds worth waking a thread for
constexpr int64_t kTaskScores = int64_t(1) << 15;   // of a task, at most

cpu::BlockSelectKernels const& kernels(Dtype dtype) {
    return cpu::best_block_select_kernels(dtype);
}

int64_t width(ScoreParams const& p) {
    return p.acc_dtype == Dtype::f64 ? 8 : 4;
}

int64_t rows_of(ScoreParams const& p, int64_t sequence) {
    return p.cu_rows != nullptr ? p.cu_rows[sequence + 1] - p.cu_rows[sequence] : p.rows;
}

std::vector<BlockTask> tasks_of(ScoreParams const& p) {
    std::vector<BlockTask> tasks;
    int64_t const each = std::clamp<int64_t>(kTaskScores / std::max<int64_t>(1, p.blocks), 1, 64);
    for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t h = 0; h < p.heads; ++h) {
            for (int64_t r = 0; r < rows_of(p, n); r += each)
                tasks.push_back({n, h, r, std::min(r + each, rows_of(p, n))});
        }
    }
    return tasks;
}

int64_t threads_for(ScoreParams const& p) {
    int64_t const work = p.B * p.Tq * p.Hq * p.Tk * p.K / kThreadGrain;
    return std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
}

// A thread's room: for the kernels, and for a task's scores.
int64_t scratch_bytes(ScoreParams const& p) {
    int64_t const rows = std::clamp<int64_t>(kTaskScores / std::max<int64_t>(1, p.blocks), 1, 64);
    return cpu::round_up(kernels(p.dtype).scratch_bytes(p), cpu::kAlign) +
           cpu::round_up(rows * p.blocks * width(p), cpu::kAlign);
}

// f(first, last) over [0, count), of so many multiply-adds each.
template <class F>
void deal_out(int64_t count, int64_t each, F const& f) {
    int64_t const grain = std::max<int64_t>(1, kThreadGrain / std::max<int64_t>(1, each));
    if (count <= grain) {
        f(0, count);
    } else {
        torch::stable::parallel_for(0, count, grain, f);
    }
}

char* row_scores(ScoreParams const& p, BlockRow const& row, int64_t head) {
    int64_t const at = (row.batch * p.heads + head) * p.rows + row.row;
    return static_cast<char*>(p.scores) + at * p.blocks * width(p);
}

using Blocks = std::vector<int64_t>;

// Writes a row's blocks in ascending order; `chosen` and `others` are room.
template <class T>
void choose(ScoreParams const& p, BlockChoice const& choice, BlockRow const& row, T const* scores,
            int32_t* index, Blocks& chosen, Blocks& others) {
    BlockRange const range = block_range(p, choice, row);
    chosen.clear(), others.clear();
    double total = 0, mass = 0;
    for (int64_t j = 0; j < range.limit; ++j) {
        double const share = scores[j] > 0 ? double(scores[j]) : 0;
        if (range.forced(j)) {
            chosen.push_back(j), total += share, mass += share;
        } else if (scores[j] > -INFINITY) {
            total += share;
            if (scores[j] >= T(choice.threshold)) others.push_back(j);
        }
    }
    int64_t const most = choice.top_k > 0 ? choice.top_k : range.limit;
    int64_t room = std::clamp<int64_t>(most - int64_t(chosen.size()), 0, int64_t(others.size()));
    auto const better = [&](int64_t a, int64_t b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    };
    if (choice.top_p > 0) {
        std::sort(others.begin(), others.end(), better);
        int64_t n = 0;
        for (; n < room && mass < choice.top_p * total; ++n)
            mass += scores[others[n]] > 0 ? double(scores[others[n]]) : 0;
        room = n;
    } else if (room < int64_t(others.size())) {
        std::nth_element(others.begin(), others.begin() + room, others.end(), better);
    }
    chosen.insert(chosen.end(), others.begin(), others.begin() + room);
    std::sort(chosen.begin(), chosen.end());
    int64_t const count = std::min<int64_t>(choice.capacity, int64_t(chosen.size()));
    for (int64_t i = 0; i < choice.capacity; ++i)
        index[i] = i < count ? int32_t(chosen[size_t(i)]) : -1;
}

void choose_rows(ScoreParams const& p, BlockChoice const& choice, BlockTask const& task,
                 char const* scores) {
    Blocks chosen, others;
    for (int64_t r = task.first; r < task.last; ++r) {
        BlockRow const row = block_row(p, task.sequence, r);
        int64_t const at = (row.batch * p.heads + task.head) * p.rows + row.row;
        int32_t* const index = p.index + at * choice.capacity;
        char const* const own = scores + (r - task.first) * p.blocks * width(p);
        if (width(p) == 8) {
            choose(p, choice, row, reinterpret_cast<double const*>(own), index, chosen, others);
        } else {
            choose(p, choice, row, reinterpret_cast<float const*>(own), index, chosen, others);
        }
    }
}

// What lies behind the rows of packed sequences.
template <class T>
void fill_rest(ScoreParams const& p, T* of, int64_t each, T value) {
    if (p.cu_rows == nullptr) return;
    for (int64_t h = 0; h < p.heads; ++h) {
        std::fill(of + (h * p.rows + p.cu_rows[p.N]) * each, of + (h + 1) * p.rows * each, value);
    }
}

// f(batch row, first token, tokens, row of y) of every row of y; no tokens where there is no window.
template <class F>
void for_windows(PoolParams const& p, F const& f) {
    bool const packed = p.cu_seqlens != nullptr;
    auto const pool_rows = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            int64_t n = i / p.blocks, window = i % p.blocks, begin = 0, tokens = p.T;
            if (packed) {  // rows behind the last window are the last sequence's
                n = std::upper_bound(p.cu_blocks, p.cu_blocks + p.N, i) - p.cu_blocks - 1;
                window = i - p.cu_blocks[n], begin = cpu::boundary(p, n);
                tokens = cpu::boundary(p, n + 1) - begin;
            } else if (p.lengths != nullptr) {
                tokens = p.lengths[n];
            }
            int64_t const start = window * p.stride;
            int64_t const least = p.partial ? 1 : p.length;
            int64_t const count = std::min(p.length, tokens - start);
            f(packed ? 0 : n, begin + start, count < least ? 0 : count, packed ? i : window);
        }
    };
    int64_t const rows = packed ? p.blocks : p.N * p.blocks;
    deal_out(rows, p.length * p.H * p.K, pool_rows);
}

// f(batch row, token, first, last): rows [first, last) of y are the windows that hold the token.
template <class F>
void for_tokens(PoolParams const& p, F const& f) {
    bool const packed = p.cu_seqlens != nullptr;
    int64_t const together = (p.length + p.stride - 1) / p.stride;  // windows of a token
    deal_out(p.B * p.T, together * p.H * p.K, [&](int64_t first, int64_t last) {
        int64_t n = 0;
        for (int64_t i = first; i < last; ++i) {
            int64_t const batch = i / p.T, time = i % p.T;
            int64_t begin = 0, row = 0, tokens = p.lengths != nullptr ? p.lengths[batch] : p.T;
            if (packed) {
                while (time >= cpu::boundary(p, n + 1)) ++n;
                begin = cpu::boundary(p, n), row = p.cu_blocks[n];
                tokens = cpu::boundary(p, n + 1) - begin;
            }
            WindowRange const windows = windows_of(p, time - begin, tokens);
            f(batch, time, row + windows.first, row + windows.last);
        }
    });
}

}  // namespace

void block_pool(PoolParams const& p, void*) {
    for_windows(p, [&](int64_t batch, int64_t first, int64_t count, int64_t row) {
        kernels(p.dtype).pool(p, batch, first, count, row);
    });
}

int64_t block_pool_bwd_workspace(PoolParams const& p) {
    int64_t const columns = p.pool == Pool::bounds ? 2 * p.K : p.K;
    return p.B * p.blocks * p.H * columns * (p.dtype == Dtype::f64 ? 8 : 4);
}

void block_pool_bwd(PoolParams const& p, void* workspace, void*) {
    for_windows(p, [&](int64_t batch, int64_t first, int64_t count, int64_t row) {
        kernels(p.dtype).share(p, workspace, batch, first, count, row);
    });
    for_tokens(p, [&](int64_t batch, int64_t time, int64_t first, int64_t last) {
        kernels(p.dtype).collect(p, workspace, batch, time, first, last);
    });
}

int64_t block_scores_workspace(ScoreParams const& p) {
    return threads_for(p) * scratch_bytes(p);
}

int64_t most_scores() {
    return int64_t(1) << 40;
}

void block_scores(ScoreParams const& p, void* workspace, void*) {
    int64_t const scratch = scratch_bytes(p);
    cpu::run_tasks(tasks_of(p), threads_for(p), [&](BlockTask const& task, int64_t thread) {
        BlockRow const row = block_row(p, task.sequence, task.first);
        kernels(p.dtype).scores(p, task, row_scores(p, row, task.head),
                                static_cast<char*>(workspace) + thread * scratch);
    });
    if (width(p) == 8) {
        fill_rest(p, static_cast<double*>(p.scores), p.blocks, -double(INFINITY));
    } else {
        fill_rest(p, static_cast<float*>(p.scores), p.blocks, -INFINITY);
    }
}

void select_blocks(ScoreParams const& p, BlockChoice const& choice, void* workspace, void*) {
    int64_t const scratch = scratch_bytes(p),
                  room = cpu::round_up(kernels(p.dtype).scratch_bytes(p), cpu::kAlign);
    cpu::run_tasks(tasks_of(p), threads_for(p), [&](BlockTask const& task, int64_t thread) {
        char* const own = static_cast<char*>(workspace) + thread * scratch;
        kernels(p.dtype).scores(p, task, own + room, own);
        choose_rows(p, choice, task, own + room);
    });
    fill_rest(p, p.index, choice.capacity, -1);
}

void choose_blocks(ScoreParams const& p, BlockChoice const& choice, void*) {
    int64_t const work = p.B * p.heads * p.rows * p.blocks / kThreadGrain;
    int64_t const threads = std::clamp<int64_t>(work, 1, torch::stable::get_num_threads());
    cpu::run_tasks(tasks_of(p), threads, [&](BlockTask const& task, int64_t) {
        BlockRow const row = block_row(p, task.sequence, task.first);
        choose_rows(p, choice, task, row_scores(p, row, task.head));
    });
    fill_rest(p, p.index, choice.capacity, -1);
}

}  // namespace lsm
