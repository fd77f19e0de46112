// The delta engine on tensor cores: what it takes, its scratch memory and its launches.
#include "kernels/delta/tensor.h"

#include "kernels/carver.h"
#include "kernels/delta/prepare_channels.cuh"
#include "kernels/delta/recur.cuh"
#include "kernels/delta/tensor_backward.h"
#include "kernels/dispatch.h"

namespace lsm {
namespace delta {
namespace {

bool channels(DeltaParams const& p) {
    return p.decay == Decay::key;
}

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
        if (channels(p)) {
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
    dim3 per_chain() const { return dim3(static_cast<unsigned>(chains)); }
};

template <int K, RecurKind Kind, bool Channels>
void run_chain(Plan const& plan, void* stream) {
    using Kernel = Recur<K, Kind, Channels>;
    launch(recur<K, Kind, Channels>, plan.per_chain(), dim3(Kernel::kThreads),
           sizeof(typename Kernel::SharedStorage), stream, plan.work);
}

// What does not need the state, then the chain of states.
template <RecurKind Kind>
void run_forward(Plan const& plan, void* stream) {
    DeltaParams const& p = plan.work.p;
    bool const backward = Kind == RecurKind::states;
    dispatch(Buckets<64, 128>{}, p.K, [&](auto K) {
        if (channels(p)) {
            using Kernel = PrepareChannels<K>;
            launch(prepare_channels<K>, plan.per_chunk(), dim3(Kernel::kThreads),
                   sizeof(typename Kernel::SharedStorage), stream, plan.work, backward);
            run_chain<K, Kind, true>(plan, stream);
        } else {
            launch(prepare<K>, plan.per_chunk(), dim3(Prepare<K>::kThreads), Prepare<K>::bytes(p),
                   stream, plan.work, backward);
            run_chain<K, Kind, false>(plan, stream);
        }
    });
}

}  // namespace
}  // namespace delta

using namespace delta;

bool tensor_cores_take(DeltaParams const& p) {
    return p.dtype == Dtype::bf16 && !p.beta_per_channel && p.transition != Transition::dplr &&
           (p.decay != Decay::key || p.transition == Transition::householder) && p.K <= 128 &&
           p.n <= kC;
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
    run_forward<RecurKind::output>(plan, stream);
}

void tensor_bwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan const plan(p, true, workspace);
    if (plan.chains == 0) return;
    build_segments(p, plan.work.segments, stream);
    run_forward<RecurKind::states>(plan, stream);
    run_reverse(plan.work, plan.chains, stream);
    run_gradients(plan.work, plan.slots * p.HV, stream);
}

}  // namespace lsm
