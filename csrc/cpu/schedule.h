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

// run(task, thread) for every task. A thread begins with its share of the list, which from call to call is the same and
// likely in its cache, and goes on with what others have left; which thread runs which task has no influence on the
// result.
template <class Task, class Run>
void run_tasks(std::vector<Task> const& tasks, int64_t threads, Run run) {
    threads = std::min<int64_t>(threads, int64_t(tasks.size()));
    if (threads <= 1) {
        for (Task const& task : tasks) run(task, 0);
        return;
    }
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares(static_cast<size_t>(threads));
    int64_t const count = int64_t(tasks.size());
    for (int64_t i = 0; i < threads; ++i) {
        shares[size_t(i)].next = i * count / threads;
        shares[size_t(i)].end = (i + 1) * count / threads;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
        for (int64_t k = 0; k < threads; ++k) {
            Share& share = shares[size_t((thread + k) % threads)];
            for (int64_t i = share.next++; i < share.end; i = share.next++)
                run(tasks[size_t(i)], thread);
        }
    });
}

}  // namespace lsm::cpu
