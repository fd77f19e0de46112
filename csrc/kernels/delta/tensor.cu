// The delta engine on tensor cores: what it takes, its scratch memory and its launches.
#include "kernels/delta/tensor.h"

#include "kernels/carver.h"
#include "kernels/delta/prepare_channels.cuh"
#include "kernels/delta/tensor_kernels.h"
#include "kernels/dispatch.h"

namespace lsm {
namespace delta {
namespace {

int bucket(int64_t K) {
    return K <= 64 ? 64 : 128;
}

struct Plan {
    DeltaWork work;
    int64_t slots, chains;
    int64_t bytes;

    Plan(DeltaParams const& p, bool backward, void* workspace) {
        Carver carve(workspace);
        int64_t const L = p.T > 1 ? p.T : 1;  // one record per sequence
        Segment* const table =
            carve.take<Segment>(segments_bytes(p, L) / static_cast<int64_t>(sizeof(Segment)));
        work.p = p;
        work.segments = plan_segments(p, L, table);
        work.tokens = static_cast<int>(kC / p.n);
        work.v_tiles = static_cast<int>((p.V + kV - 1) / kV);
        slots = p.B * p.T / work.tokens + work.segments.count;
        chains = work.segments.count * p.HV * work.v_tiles;
        int64_t const pieces = slots * p.HV, K = bucket(p.K), V = int64_t(work.v_tiles) * kV;
        Scratch& s = work.scratch;
        s.coefficients = carve.take<float>(pieces * 4 * kC);
        s.z = carve.take<bf16>(pieces * kC * K);
        s.z_rest = carve.take<bf16>(pieces * kC * K);
        s.r = carve.take<bf16>(pieces * kC * kC);
        if (form_of(p) == Form::sources) {
            s.z_values = carve.take<bf16>(pieces * kC * K);
            s.r_values = carve.take<bf16>(pieces * kC * kC);
            s.solve_values = carve.take<bf16>(pieces * 2 * kC * kC);
        }
        if (form_of(p) != Form::whole) {
            s.erase = carve.take<bf16>(pieces * kC * K);
            s.query = carve.take<bf16>(pieces * kC * K);
            s.decay = carve.take<float>(pieces * K);
        }
        if (backward) {
            s.solve = carve.take<bf16>(pieces * 2 * kC * kC);
            s.state = carve.take<bf16>(pieces * V * K);
            s.dstate = carve.take<bf16>(pieces * V * K);
            s.residual = carve.take<bf16>(pieces * kC * V);
            s.de = carve.take<bf16>(pieces * kC * V);
        }
        bytes = carve.used();
    }

    dim3 per_chunk() const { return dim3(static_cast<unsigned>(slots * work.p.HV)); }
};

// What does not need the state.
void run_prepare(Plan const& plan, bool backward, void* stream) {
    DeltaParams const& p = plan.work.p;
    dispatch(Buckets<64, 128>{}, p.K, [&](auto K) {
        dispatch_form(p, [&](auto form) {
            if constexpr (form == Form::whole) {
                launch(prepare<K>, plan.per_chunk(), dim3(Prepare<K>::kThreads),
                       Prepare<K>::bytes(p), stream, plan.work, backward);
            } else {
                constexpr bool kSources = form == Form::sources;
                using Kernel = PrepareChannels<K, kSources>;
                launch(prepare_channels<K, kSources>, plan.per_chunk(), dim3(Kernel::kThreads),
                       sizeof(typename Kernel::SharedStorage), stream, plan.work, backward);
            }
        });
    });
}

}  // namespace
}  // namespace delta

using namespace delta;

bool tensor_cores_take(DeltaParams const& p) {
    bool const decay =
        p.transition == Transition::householder ||
        (p.transition == Transition::comba ? p.decay != Decay::key : p.decay != Decay::scalar);
    return p.dtype == Dtype::bf16 && !p.beta_per_channel && decay && p.K <= 128 && p.n <= kC;
}

int64_t tensor_fwd_workspace(DeltaParams const& p) {
    return Plan(p, false, nullptr).bytes;
}

int64_t tensor_bwd_workspace(DeltaParams const& p) {
    return Plan(p, true, nullptr).bytes;
}

void tensor_fwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan const plan(p, false, workspace);
    if (plan.chains == 0) return;
    build_segments(p, plan.work.segments, stream);
    run_prepare(plan, false, stream);
    run_recur(plan.work, false, plan.chains, stream);
}

void tensor_bwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.chains == 0) return;
    build_segments(p, plan.work.segments, stream);
    run_prepare(plan, true, stream);
    run_recur(plan.work, true, plan.chains, stream);
    run_reverse(plan.work, plan.chains, stream);
    run_gradients(plan.work, plan.slots * p.HV, stream);
}

}  // namespace lsm
