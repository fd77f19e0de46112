// The short convolution on the CPU: which kernels, which tiles, which threads. A task is a tile of channels of a run of
// segments; which thread does it, and how many there are, has no influence on the result.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "conv_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::ConvKernels;
using cpu::ConvSegment;

constexpr int64_t kThreadGrain = int64_t(1) << 15;  // elements worth waking a thread for

ConvKernels const& kernels(Dtype dtype) {
    return cpu::best_conv_kernels(dtype);
}

std::vector<ConvSegment> segments_of(ConvParams const& p) {
    std::vector<ConvSegment> segments;
    int64_t const most = cpu::conv_segment_tokens(p);
    auto const add = [&](int64_t batch, int64_t index, int64_t begin, int64_t end) {
        int64_t t = begin;
        do {  // an empty sequence has states too
            int64_t const next = std::min(t + most, end);
            segments.push_back({batch, index, begin, end, t, next});
            t = next;
        } while (t < end);
    };
    if (p.cu_seqlens != nullptr) {
        for (int64_t n = 0; n < p.N; ++n) add(0, n, cpu::boundary(p, n), cpu::boundary(p, n + 1));
        return segments;
    }
    for (int64_t b = 0; b < p.B; ++b) {
        int64_t begin = 0;
        int32_t const* const index = p.seq_idx != nullptr ? p.seq_idx + b * p.T : nullptr;
        for (int64_t t = 1; index != nullptr && t < p.T; ++t) {
            if (index[t] == index[t - 1]) continue;
            add(b, b, begin, t);
            begin = t;
        }
        add(b, b, begin, p.T);
    }
    return segments;
}

// Segments [first, last), about as many tokens as one may have, of a tile of channels.
struct ConvTask {
    int64_t first, last, record, channel;
};

struct Plan {
    explicit Plan(ConvParams const& p) : segments(segments_of(p)) {
        int64_t const count = int64_t(segments.size()), tile = cpu::conv_tile_channels(p);
        for (int64_t first = 0, last = 0; first < count; first = last, ++records) {
            int64_t tokens = 0;
            while (last < count && (last == first || tokens + length(last) <= most(p)))
                tokens += length(last++);
            for (int64_t channel = 0; channel < p.D; channel += tile)
                tasks.push_back({first, last, records, channel});
        }
    }

    static int64_t most(ConvParams const& p) { return cpu::conv_segment_tokens(p); }
    int64_t length(int64_t i) const { return segments[size_t(i)].t1 - segments[size_t(i)].t0; }

    std::vector<ConvSegment> segments;
    std::vector<ConvTask> tasks;
    int64_t records = 0;
};

int64_t threads_for(ConvParams const& p) {
    int64_t const worth = p.B * p.T * p.D / kThreadGrain;
    return std::clamp<int64_t>(worth, 1, torch::stable::get_num_threads());
}

int64_t scratch_bytes(ConvParams const& p) {
    return cpu::round_up(kernels(p.dtype).scratch_bytes(p), cpu::kAlign);
}

int64_t record_bytes(ConvParams const& p) {
    return p.dweight == nullptr ? 0 : (p.W + 1) * p.D * (p.dtype == Dtype::f64 ? 8 : 4);
}

}  // namespace

int64_t conv_fwd_workspace(ConvParams const& p) {
    return threads_for(p) * scratch_bytes(p);
}

int64_t conv_bwd_workspace(ConvParams const& p) {
    return threads_for(p) * scratch_bytes(p) + Plan(p).records * record_bytes(p);
}

void conv_fwd(ConvParams const& p, void* workspace, void*) {
    Plan const plan(p);
    int64_t const scratch = scratch_bytes(p), threads = threads_for(p);
    std::vector<int64_t> tiles(size_t(threads), -1);  // whose weights each thread's scratch has
    cpu::run_tasks(plan.tasks, threads, [&](ConvTask const& task, int64_t thread) {
        bool const ready = std::exchange(tiles[size_t(thread)], task.channel) == task.channel;
        kernels(p.dtype).forward(p, plan.segments.data() + task.first, task.last - task.first,
                                 task.channel, ready,
                                 static_cast<char*>(workspace) + thread * scratch);
    });
}

void conv_bwd(ConvParams const& p, void* workspace, void*) {
    Plan const plan(p);
    int64_t const scratch = scratch_bytes(p), record = record_bytes(p);
    char* const records = static_cast<char*>(workspace) + threads_for(p) * scratch;
    cpu::run_tasks(plan.tasks, threads_for(p), [&](ConvTask const& task, int64_t thread) {
        kernels(p.dtype).backward(p, plan.segments.data() + task.first, task.last - task.first,
                                  task.channel, records + task.record * record,
                                  static_cast<char*>(workspace) + thread * scratch);
    });
    if (p.dweight != nullptr) kernels(p.dtype).add(p, records, plan.records);
}

void conv_step(ConvStepParams const& p, void*) {
    auto const rows = [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) kernels(p.dtype).step(p, b);
    };
    int64_t const grain =
        std::max<int64_t>(1, p.B * kThreadGrain / std::max<int64_t>(1, p.B * p.T * p.D));
    if (p.B <= grain) {
        rows(0, p.B);
    } else {
        torch::stable::parallel_for(0, p.B, grain, rows);
    }
}

}  // namespace lsm
