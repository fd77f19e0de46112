// The chunk engine on tensor cores: which sweeps make a forward and a backward, and how time is cut for them.
#include "kernels/chunk/gate_gradient.cuh"
#include "kernels/chunk/join.cuh"
#include "kernels/chunk/launch.h"
#include "kernels/recurrence/launch.h"

namespace lsm {
namespace {

// Hands out 256-byte aligned pieces of the workspace; with a null base it measures.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        char* const at = base_ + used_;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
        return reinterpret_cast<T*>(at);
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// How a call cuts time, and its scratch memory.
struct Plan {
    int64_t L;
    Segments segments;
    bool cut;  // some sequence may have several segments
    float *forward,
        *forward_sums;  // [records, HV, K, V], [records, HV, K]: what each segment starts from
    float *reverse, *reverse_sums;
    uint32_t* chunk_states;
    float* chunk_flux;
    uint32_t* split_dk;
    uint8_t* tokenwise;
    uint32_t* end_states = nullptr;
    float* end_flux = nullptr;
    uint8_t* end_tokenwise = nullptr;
    int row_tile, row_tiles;  // of the sweeps for dq and dk
    int64_t bytes;

    Plan(ChunkParams const& p, bool backward, void* workspace) {
        int64_t const tiles = (p.V + 127) / 128;
        // Blocks that the card holds at once: two per multiprocessor. A packed call has one row of T tokens.
        int64_t const chains = (p.cu_seqlens != nullptr ? 1 : p.B) * p.HV * tiles;
        L = segment_length(p.T, chains, 2 * multiprocessors(), kChunk);
        cut = L < p.T;
        Carver carve(workspace);
        Segment* const table =
            carve.take<Segment>(segments_bytes(p, L) / static_cast<int64_t>(sizeof(Segment)));
        segments = plan_segments(p, L, table);
        int64_t const owners = segments.count * p.HV;
        int64_t const states = cut ? owners * p.K * p.V : 0, sums = cut ? owners * p.K : 0;
        forward = carve.take<float>(states);
        forward_sums = carve.take<float>(sums);
        if (backward) {
            reverse = carve.take<float>(states);
            reverse_sums = carve.take<float>(sums);
            int64_t const chunks = count_chunks(p, segments) * p.HV;
            row_tile = sweep_row_tile(static_cast<int>(p.V), static_cast<int>(p.K));
            row_tiles = (static_cast<int>(p.K) + row_tile - 1) / row_tile;
            int64_t const state_words = row_tiles * row_tile * sweep_contraction_bucket(p.V) / 2;
            // dv is written last and has room for the anchors, but for short sequences.
            int64_t const anchors = chunks * state_words;
            bool const in_dv = anchors * 4 <= p.B * p.T * p.HV * p.V * 2;
            chunk_states =
                in_dv ? static_cast<uint32_t*>(p.dv.data) : carve.take<uint32_t>(anchors);
            chunk_flux = carve.take<float>(chunks * p.K);
            tokenwise = carve.take<uint8_t>(chunks * row_tiles * (kChunk / 16));
            if (p.grad_final_state != nullptr) {
                end_states = carve.take<uint32_t>(p.N * p.HV * state_words);
                end_flux = carve.take<float>(p.N * p.HV * p.K);
                end_tokenwise = carve.take<uint8_t>(p.N * p.HV * row_tiles);
            }
            split_dk = carve.take<uint32_t>(p.B * p.T * p.HV * p.K);
        }
        bytes = carve.used();
    }
};

Operand per_head(ChunkParams const& p, Rows const& rows) {
    return {rows, static_cast<int>(p.HV / p.H)};
}
Operand per_value_head(Rows const& rows) {
    return {rows, 1};
}

// The two ways a [K, V] state lies under a sweep.
StateView contraction_over_k(ChunkParams const& p, void const* state) {
    return {static_cast<float*>(const_cast<void*>(state)), static_cast<int>(p.V), 1};
}
StateView contraction_over_v(ChunkParams const& p, void const* state) {
    return {static_cast<float*>(const_cast<void*>(state)), 1, static_cast<int>(p.V)};
}

SweepParams common(ChunkParams const& p, bool reverse) {
    SweepParams s{};
    s.query_scale = s.key_scale = s.value_scale = s.out_scale = 1.f;
    s.gate = per_value_head(p.g);
    s.gate_is_fp32 = p.gate_dtype == Dtype::f32;
    s.heads = static_cast<int>(p.HV);
    s.tokens_per_row = p.T;
    s.reverse = reverse;
    return s;
}

// o: query, key, value = q, k, v, forward.  dv: k, q, dO, reverse.
SweepParams over_k(ChunkParams const& p, bool reverse) {
    SweepParams s = common(p, reverse);
    s.query = per_head(p, reverse ? p.k : p.q);
    s.key = per_head(p, reverse ? p.q : p.k);
    s.value = per_value_head(reverse ? p.grad_o : p.v);
    (reverse ? s.key_scale : s.query_scale) = static_cast<float>(p.scale);
    s.contraction = static_cast<int>(p.K), s.rows = static_cast<int>(p.V);
    return s;
}

// dq: query, key, value = dO, v, k, forward.  dk: v, dO, q, reverse.
SweepParams over_v(ChunkParams const& p, bool reverse) {
    SweepParams s = common(p, reverse);
    s.query = per_value_head(reverse ? p.v : p.grad_o);
    s.key = per_value_head(reverse ? p.grad_o : p.v);
    s.value = per_head(p, reverse ? p.q : p.k);
    (reverse ? s.value_scale : s.out_scale) = static_cast<float>(p.scale);
    s.contraction = static_cast<int>(p.V), s.rows = static_cast<int>(p.K);
    return s;
}

// Leaves in `states` what every segment starts from, walking forward or in reverse.
void join_boundaries(ChunkParams const& p, Plan const& plan, bool reverse, void* stream) {
    float* const states = reverse ? plan.reverse : plan.forward;
    float* const sums = reverse ? plan.reverse_sums : plan.forward_sums;
    SweepParams s = over_k(p, reverse);
    s.end = contraction_over_k(p, states);
    s.gate_sum = sums;
    sweep_state(s, plan.segments, stream);
    auto const* const initial =
        static_cast<float const*>(reverse ? p.grad_final_state : p.initial_state);
    run_join({states, sums, initial, static_cast<int>(p.HV), static_cast<int>(p.K),
              static_cast<int>(p.V), reverse},
             plan.segments, stream);
}

// Where a sweep's states come from: the joined boundaries, or the caller's initial (or final gradient) state.
void const* start_of(ChunkParams const& p, Plan const& plan, bool reverse) {
    if (plan.cut) return reverse ? plan.reverse : plan.forward;
    return reverse ? p.grad_final_state : p.initial_state;
}

void gate_gradient_of(ChunkParams const& p, Plan const& plan, Rows const& split_dk, void* stream) {
    GateGradientParams const gp{per_head(p, p.q),      per_head(p, p.k),
                                per_value_head(p.dg),  per_value_head(split_dk),
                                per_value_head(p.g),   plan.chunk_flux,
                                plan.tokenwise,        plan.end_flux,
                                plan.end_tokenwise,    plan.row_tile,
                                plan.row_tiles,        static_cast<int>(p.HV),
                                static_cast<int>(p.K), p.T};
    int64_t const blocks = count_chunks(p, plan.segments) * p.HV;
    if (plan.segments.count == 0) return;
    dim3 const grid(static_cast<unsigned>(blocks)),
        threads(static_cast<unsigned>((p.K / 2 + 31) / 32 * 32));
    auto const run = [&](auto kernel) {
        launch(kernel, grid, threads, 0, stream, gp, plan.segments);
    };
    p.gate_dtype == Dtype::f32 ? run(gate_gradient<float>) : run(gate_gradient<bf16>);
}

// Only bf16 goes to tensor cores: frames scale operands by powers of two far beyond fp16's range, and fp32 would lose
// 16 bits. Both keep their precision on the recurrence.
bool on_tensor_cores(ChunkParams const& p) {
    return p.dtype == Dtype::bf16;
}

}  // namespace

int64_t chunk_fwd_workspace(ChunkParams const& p) {
    return on_tensor_cores(p) ? Plan(p, false, nullptr).bytes : recurrence_fwd_workspace(p);
}

int64_t chunk_bwd_workspace(ChunkParams const& p) {
    return on_tensor_cores(p) ? Plan(p, true, nullptr).bytes : recurrence_bwd_workspace(p);
}

void chunk_fwd(ChunkParams const& p, void* workspace, void* stream) {
    if (!on_tensor_cores(p)) return recurrence_fwd(p, workspace, stream);
    Plan const plan(p, false, workspace);
    build_segments(p, plan.segments, stream);
    if (plan.cut) join_boundaries(p, plan, false, stream);
    SweepParams s = over_k(p, false);
    s.out = per_value_head(p.o);
    s.start = contraction_over_k(p, start_of(p, plan, false));
    s.start_per_record = plan.cut;
    s.end = contraction_over_k(p, p.final_state);
    sweep_output(s, plan.segments, stream);
}

void chunk_bwd(ChunkParams const& p, void* workspace, void* stream) {
    if (!on_tensor_cores(p)) return recurrence_bwd(p, workspace, stream);
    Plan const plan(p, true, workspace);
    build_segments(p, plan.segments, stream);
    if (plan.cut) {
        join_boundaries(p, plan, false, stream);
        join_boundaries(p, plan, true, stream);
    }
    Rows const split_dk{plan.split_dk, p.T * p.HV * p.K, p.HV * p.K, p.K};

    SweepParams dq = over_v(p, false);
    dq.out = per_value_head(p.dq);
    dq.strict = per_value_head(p.dg);
    dq.start = contraction_over_v(p, start_of(p, plan, false));
    dq.start_per_record = plan.cut;
    dq.chunk_states = plan.chunk_states;
    dq.end_states = plan.end_states;
    dq.end_tokenwise = plan.end_tokenwise;
    sweep_query_gradient(dq, plan.segments, stream);

    SweepParams dk = over_v(p, true);
    dk.out = per_value_head(p.dk);
    dk.strict = per_value_head(split_dk);
    dk.start = contraction_over_v(p, start_of(p, plan, true));
    dk.start_per_record = plan.cut;
    dk.chunk_states = plan.chunk_states;
    dk.chunk_flux = plan.chunk_flux;
    dk.tokenwise = plan.tokenwise;
    dk.end_states = plan.end_states;
    dk.end_flux = plan.end_flux;
    sweep_key_gradient(dk, plan.segments, stream);

    SweepParams dv = over_k(p, true);
    dv.out = per_value_head(p.dv);
    dv.start = contraction_over_k(p, start_of(p, plan, true));
    dv.start_per_record = plan.cut;
    dv.end = contraction_over_k(p, p.grad_initial_state);
    sweep_output(dv, plan.segments, stream);

    gate_gradient_of(p, plan, split_dk, stream);
}

}  // namespace lsm
