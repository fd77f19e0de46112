// What comes before the delta rules on the CPU: tasks of some tokens of one argument each. Their lengths do not depend on
// the number of threads, nor does the order in which their sums are added up.
#include <cmath>

#include "delta_inputs_kernels.h"
#include "schedule.h"

namespace lsm {
namespace {

using cpu::ceil_div;
using cpu::DeltaInputsTask;

constexpr int64_t kGrain = int64_t(1) << 15;  // numbers worth waking a thread for
constexpr int64_t kFewest = 64;               // tokens of decays, whose sums are kept for each task

int64_t width(DeltaInput const& of) {
    return std::max<int64_t>(1, of.H * of.D);
}

int64_t chunk(DeltaInput const& of, int64_t fewest = 1) {
    return std::max(fewest, kGrain / width(of));
}

int64_t decay_tasks(DeltaInputsParams const& p) {
    return ceil_div(p.g.tokens(), chunk(p.g, kFewest));
}

template <class T>
std::vector<T> rates_of(DeltaInputsParams const& p) {
    std::vector<T> rates(p.A_log == nullptr ? 0 : size_t(p.rates()));
    for (size_t i = 0; i < rates.size(); ++i)
        rates[i] = std::exp(static_cast<T const*>(p.A_log)[i]);
    return rates;
}

template <class T>
void add_up(DeltaInputsParams const& p, T const* sums) {
    int64_t const biases = p.biases(), columns = biases + p.rates(), tasks = decay_tasks(p);
    auto const column = [&](int64_t c) {
        T sum = 0;
        for (int64_t i = 0; i < tasks; ++i) sum += sums[i * columns + c];
        return sum;
    };
    for (int64_t c = 0; p.ddt_bias != nullptr && c < biases; ++c)
        static_cast<T*>(p.ddt_bias)[c] = column(c);
    for (int64_t c = 0; p.dA_log != nullptr && c < p.rates(); ++c)
        static_cast<T*>(p.dA_log)[c] = column(biases + c);
}

template <class T>
void run_all(DeltaInputsParams const& p, bool backward, void* workspace) {
    std::vector<T> const rates = rates_of<T>(p);
    T* const sums = static_cast<T*>(workspace);
    std::vector<DeltaInputsTask> tasks;
    int64_t work = 0;
    auto const add = [&](DeltaInputsTask::Kind kind, DeltaInput const& of, int64_t fewest) {
        int64_t const tokens = of.tokens(), size = chunk(of, fewest);
        for (int64_t begin = 0; begin < tokens; begin += size) {
            DeltaInputsTask task{kind, &of, begin, std::min(begin + size, tokens)};
            if (kind == DeltaInputsTask::decay) {
                task.rates = rates.empty() ? nullptr : rates.data();
                if (backward) task.sums = sums + begin / size * (p.biases() + p.rates());
            }
            tasks.push_back(task);
        }
        work += tokens * width(of);
    };
    add(DeltaInputsTask::unit, p.q, 1), add(DeltaInputsTask::unit, p.k, 1);
    add(DeltaInputsTask::decay, p.g, kFewest), add(DeltaInputsTask::strength, p.beta, 1);
    int64_t const threads = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
    cpu::run_tasks(tasks, threads, [&](DeltaInputsTask const& task, int64_t) {
        auto const& kernels = cpu::best_delta_inputs_kernels(task.of->dtype);
        (backward ? kernels.backward : kernels.forward)(p, task);
    });
    if (backward) add_up(p, sums);
}

void run(DeltaInputsParams const& p, bool backward, void* workspace) {
    if (p.g.dtype == Dtype::f64) {
        run_all<double>(p, backward, workspace);
    } else {
        run_all<float>(p, backward, workspace);
    }
}

}  // namespace

int64_t delta_inputs_bwd_workspace(DeltaInputsParams const& p) {
    return decay_tasks(p) * (p.biases() + p.rates()) * (p.g.dtype == Dtype::f64 ? 8 : 4);
}

void delta_inputs_fwd(DeltaInputsParams const& p, void*) {
    run(p, false, nullptr);
}

void delta_inputs_bwd(DeltaInputsParams const& p, void* workspace, void*) {
    run(p, true, workspace);
}

}  // namespace lsm
