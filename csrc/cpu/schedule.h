// What the schedulers of the engines share: sizes, sequence boundaries, tasks dealt out to threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace lsm::cpu {

inline constexpr int64_t kAlign = 256;  // of workspaces, in bytes

inline int64_t round_up(int64_t x, int64_t unit) {
    return (x + unit - 1) / unit * unit;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Where sequence i begins among packed tokens; i = N: where the last one ends.
template <class Params>
int64_t boundary(Params const& p, int64_t i) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(p.cu_seqlens)[i]
                                 : static_cast<int32_t const*>(p.cu_seqlens)[i];
}

// run(task, thread) for every task. Tasks are fetched one by one: which thread runs which has no
// influence on the result.
template <class Task, class Run>
void run_tasks(std::vector<Task> const& tasks, int64_t threads, Run run) {
    std::atomic<size_t> next{0};
    auto const worker = [&](int64_t thread, int64_t) {
        for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i], thread);
    };
    threads = std::min<int64_t>(threads, int64_t(tasks.size()));
    if (threads <= 1) {
        worker(0, 1);
    } else {
        torch::stable::parallel_for(0, threads, 1, worker);
    }
}

}  // namespace lsm::cpu
