// The delta engine on tensor cores: what it takes, its scratch memory and its launches.
#include "kernels/delta/tensor.h"

#include <algorithm>

#include "kernels/carver.h"
#include "kernels/delta/prepare_channels.cuh"
#include "kernels/delta/tensor_kernels.h"

namespace lsm {
namespace delta {
namespace {

int bucket(int64_t K) {
    return K <= 64 ? 64 : K <= 128 ? 128 : 256;
}

constexpr int64_t kLeastChunks = 8;    // of a piece
constexpr int64_t kWindowChunks = 32;  // likewise, of a window
constexpr int64_t kMostPieces = 16;    // they are joined one after another

struct Plan {
    DeltaWork work{};
    int64_t slots, records;  // of a window
    int64_t bytes;

    Plan(DeltaParams const& p, bool backward, void* workspace) {
        work.p = p;
        work.tokens = static_cast<int>(kC / p.n);
        work.v_tiles = work.tiles = static_cast<int>(ceil_div(p.V, kV));
        cut_time(backward);
        int64_t const L = work.cuts.L;
        Carver carve(workspace);
        Segment* const table =
            carve.take<Segment>(segments_bytes(p, L) / static_cast<int64_t>(sizeof(Segment)));
        work.segments = plan_segments(p, L, table);
        work.segments.on_grid = true;
        bool const packed = p.cu_seqlens != nullptr;
        work.slots_per_piece = ceil_div(L, work.tokens);
        records = packed ? work.segments.count : p.B * work.cuts.pieces;
        slots = packed ? work.cuts.X / work.tokens + records : records * work.slots_per_piece;
        carve_chunks(carve, backward, slots * p.HV);
        carve_cuts(carve, backward);
        bytes = carve.used();
    }

    dim3 per_chunk() const { return dim3(static_cast<unsigned>(slots * work.p.HV)); }
    int64_t chains(int64_t tiles) const { return records * work.p.HV * tiles; }

  private:
    // Pieces side by side if chains are fewer than multiprocessors: walks that leave transitions
    // have about twice the blocks, and everything is walked twice, so that fewer than three pieces
    // gain nothing. Transitions of more than 128 channels are not joined (join.cuh).
    void cut_time(bool backward) {
        DeltaParams const& p = work.p;
        Cuts& cuts = work.cuts;
        cuts.B = p.B, cuts.HV = p.HV, cuts.K = p.K, cuts.V = p.V;
        int64_t const T = std::max<int64_t>(p.T, 1), tokens = work.tokens,
                      least = kLeastChunks * tokens;
        int64_t X = T;
        if (backward) {
            Carver one(nullptr);
            carve_chunks(one, true, p.HV);
            X = window_of(T, kWindowChunks * tokens, one.used() * p.B * ceil_div(T, tokens));
        }
        int64_t const chains = std::max<int64_t>(p.B * p.HV * work.v_tiles, 1);
        int64_t const most = std::min(multiprocessors() / chains, kMostPieces),
                      L = ceil_div(ceil_div(X, std::max<int64_t>(most, 1)), least) * least;
        bool const side_by_side = ceil_div(X, L) >= 3 && p.K <= 128;
        if (side_by_side || X < T) {
            cuts.L = side_by_side ? L : ceil_div(X, least) * least;
            cuts.pieces = static_cast<int>(ceil_div(X, cuts.L));
            cuts.X = cuts.L * cuts.pieces;
        } else {
            cuts.L = cuts.X = T;
        }
        cuts.windows = static_cast<int>(ceil_div(T, cuts.X));
    }

    void carve_chunks(Carver& carve, bool backward, int64_t count) {
        DeltaParams const& p = work.p;
        int64_t const K = bucket(p.K), V = int64_t(work.v_tiles) * kV;
        Scratch& s = work.scratch;
        s.coefficients = carve.take<float>(count * 4 * kC);
        s.z = carve.take<bf16>(count * kC * K);
        s.z_rest = carve.take<bf16>(count * kC * K);
        s.r = carve.take<bf16>(count * kC * kC);
        if (form_of(p) == Form::sources) {
            s.z_values = carve.take<bf16>(count * kC * K);
            s.r_values = carve.take<bf16>(count * kC * kC);
            s.solve_values = carve.take<bf16>(count * 2 * kC * kC);
        }
        if (form_of(p) != Form::whole) {
            s.erase = carve.take<bf16>(count * kC * K);
            s.query = carve.take<bf16>(count * kC * K);
            s.decay = carve.take<float>(count * K);
        }
        if (backward) {
            s.solve = carve.take<bf16>(count * 2 * kC * kC);
            s.state = carve.take<bf16>(count * V * K);
            s.dstate = carve.take<bf16>(count * V * K);
            s.residual = carve.take<bf16>(count * kC * V);
            s.de = carve.take<bf16>(count * kC * V);
        }
    }

    void carve_cuts(Carver& carve, bool backward) {
        Cuts& cuts = work.cuts;
        int64_t const heads = cuts.B * cuts.HV, state = heads * cuts.K * cuts.V;
        if (cuts.pieces > 1) {
            cuts.states = carve.take<float>(cuts.pieces * state);
            cuts.transfers = carve.take<float>(cuts.pieces * heads * cuts.K * cuts.K);
            if (backward) cuts.grads = carve.take<float>(cuts.pieces * state);
        }
        if (cuts.windows > 1) {
            cuts.carried = carve.take<float>(cuts.windows * state);
            cuts.grad_carried = carve.take<float>(2 * state);
        }
    }
};

// What does not need the state.
void run_prepare(Plan const& plan, bool backward, void* stream) {
    DeltaParams const& p = plan.work.p;
    dispatch_form(p, [&](auto form) {
        dispatch_width<form>(p.K, [&](auto K) {
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

// The states, or their gradients, that the window's pieces start from; and forwards, where the next
// window does.
void run_cuts(Plan& plan, bool reverse, void* stream) {
    DeltaWork& work = plan.work;
    bool const side_by_side = work.cuts.pieces > 1;
    int64_t const transitions = side_by_side && !reverse ? ceil_div(work.p.K, kV) : 0;
    work.transfer = true;
    work.tiles = work.v_tiles + static_cast<int>(transitions);
    int64_t const blocks = plan.chains(work.tiles);
    reverse ? run_reverse(work, blocks, stream) : run_recur(work, true, blocks, stream);
    if (side_by_side) run_join(work, reverse, plan.records * work.p.HV, stream);
    work.transfer = false;
    work.tiles = work.v_tiles;
}

}  // namespace
}  // namespace delta

using namespace delta;

bool tensor_cores_take(DeltaParams const& p) {
    bool const decay =
        p.transition == Transition::householder ||
        (p.transition == Transition::comba ? p.decay != Decay::key : p.decay != Decay::scalar);
    return p.dtype == Dtype::bf16 && !p.beta_per_channel && decay && p.K <= widest(form_of(p)) &&
           p.n <= kC;
}

int64_t tensor_fwd_workspace(DeltaParams const& p) {
    return Plan(p, false, nullptr).bytes;
}

int64_t tensor_bwd_workspace(DeltaParams const& p) {
    return Plan(p, true, nullptr).bytes;
}

void tensor_fwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan plan(p, false, workspace);
    if (plan.records * p.HV == 0) return;
    build_segments(p, plan.work.segments, stream);
    run_prepare(plan, false, stream);
    if (plan.work.cuts.pieces > 1) run_cuts(plan, false, stream);
    run_recur(plan.work, false, plan.chains(plan.work.v_tiles), stream);
}

// Windows from the last to the first, each with scratch memory to itself; before that, all but the
// last in order for the states they begin with.
void tensor_bwd(DeltaParams const& p, void* workspace, void* stream) {
    Plan plan(p, true, workspace);
    if (plan.records * p.HV == 0) return;
    DeltaWork const& work = plan.work;
    int& window = plan.work.cuts.window;
    int const last = work.cuts.windows - 1;
    bool const side_by_side = work.cuts.pieces > 1;
    build_segments(p, work.segments, stream);
    for (window = 0; window < last; ++window) {
        run_prepare(plan, false, stream);
        run_cuts(plan, false, stream);
    }
    for (window = last; window >= 0; --window) {
        run_prepare(plan, true, stream);
        if (side_by_side) run_cuts(plan, false, stream);
        run_recur(work, true, plan.chains(work.v_tiles), stream);
        if (side_by_side) run_cuts(plan, true, stream);
        run_reverse(work, plan.chains(work.v_tiles), stream);
        run_gradients(work, plan.slots * p.HV, stream);
    }
}

}  // namespace lsm
