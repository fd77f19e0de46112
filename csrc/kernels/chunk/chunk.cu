// The chunk engine on tensor cores: which sweeps make a forward and a backward, and how time is cut for them.
#include "kernels/carver.h"
#include "kernels/chunk/divisor_gradient.cuh"
#include "kernels/chunk/finish_gradient.cuh"
#include "kernels/chunk/first_token.cuh"
#include "kernels/chunk/gate_gradient.cuh"
#include "kernels/chunk/head_gate_gradient.cuh"
#include "kernels/chunk/input_gates.cuh"
#include "kernels/chunk/join.cuh"
#include "kernels/chunk/launch.h"
#include "kernels/polynomial/launch.h"
#include "kernels/recurrence/launch.h"
#include "policy/gate.h"

namespace lsm {
namespace {

// How a call cuts time, and its scratch memory. Channels: of the gates; rows and contraction: of the two sweeps that
// the gate's gradient needs, dq and dk, or o and dv where values decay.
struct Plan {
    bool has_dg;
    int64_t channels, rows, contraction;
    int64_t L;
    Segments segments;
    bool cut;  // some sequence may have several segments
    float *forward,
        *forward_sums;  // [records, HV, K, V], [records, HV, channels]: what each segment starts from
    float *reverse, *reverse_sums;
    uint32_t* chunk_states;
    float* chunk_flux;
    Rows dots, split;  // of the reading and the writing sweep; channels: dots are in dg
    Rows ungated;      // gradients of outputs before z gated them
    uint8_t* tokenwise;
    uint32_t* end_states = nullptr;
    float* end_flux = nullptr;
    uint8_t* end_tokenwise = nullptr;
    // Of sums that outputs are divided by: what each segment starts from, anchors, and what divisor_gradient leaves.
    float *forward_n = nullptr, *reverse_n = nullptr, *chunk_n = nullptr, *end_n = nullptr;
    Rows reader, below;
    int row_tile, row_tiles, parts;
    int64_t bytes;

    Plan(ChunkParams const& p, bool backward, void* workspace)
        : has_dg(backward && p.dg.data != nullptr),
          channels(p.decay == Decay::none ? 1 : gates_per_token(p.decay, p.K, p.V)),
          rows(p.decay == Decay::value ? p.V : p.K),
          contraction(p.decay == Decay::value ? p.K : p.V) {
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
        int64_t const states = cut ? owners * p.K * p.V : 0, sums = cut ? owners * channels : 0;
        forward = carve.take<float>(states);
        forward_sums = carve.take<float>(sums);
        if (backward) {
            reverse = carve.take<float>(states);
            reverse_sums = carve.take<float>(sums);
        }
        row_tile = sweep_row_tile(static_cast<int>(contraction), static_cast<int>(rows));
        row_tiles = (static_cast<int>(rows) + row_tile - 1) / row_tile;
        parts = row_tiles * kSweepWarps;
        if (has_dg) carve_gate_gradient(p, carve);
        if (p.normaliser.on) carve_sums(p, carve, backward);
        if (backward && p.finish.z.data != nullptr)
            ungated = {carve.take<uint16_t>(p.B * p.T * p.HV * p.V), p.T * p.HV * p.V, p.HV * p.V,
                       p.V};
        bytes = carve.used();
    }

  private:
    static bool has_end_gradient(ChunkParams const& p) {
        return p.grad_final_state != nullptr || p.normaliser.grad_n != nullptr;
    }
    void carve_sums(ChunkParams const& p, Carver& carve, bool backward) {
        int64_t const boundaries = cut ? segments.count * p.HV * p.K : 0;
        forward_n = carve.take<float>(boundaries);
        if (!backward) return;
        reverse_n = carve.take<float>(boundaries);
        chunk_n = carve.take<float>(count_chunks(p, segments) * p.HV * p.K);
        if (has_end_gradient(p)) end_n = carve.take<float>(p.N * p.HV * p.K);
        auto const per_token = [&](float* data) { return Rows{data, p.HV * p.T, 1, p.T}; };
        reader = per_token(carve.take<float>(p.B * p.HV * p.T));
        below = per_token(carve.take<float>(p.B * p.HV * p.T));
    }
    void carve_gate_gradient(ChunkParams const& p, Carver& carve) {
        bool const scalar = p.decay == Decay::scalar;
        int64_t const width = scalar ? parts : rows, tokens = p.B * p.T * p.HV;
        int64_t const chunks = count_chunks(p, segments) * p.HV;
        int64_t const state_words =
            row_tiles * row_tile * sweep_contraction_bucket(contraction) / 2;
        // What is written last has room for the anchors, but for short sequences.
        Rows const& last = p.decay == Decay::value ? p.dk : p.dv;
        int64_t const room = tokens * (p.decay == Decay::value ? p.K : p.V) * 2;
        int64_t const anchors = chunks * state_words;
        chunk_states =
            anchors * 4 <= room ? static_cast<uint32_t*>(last.data) : carve.take<uint32_t>(anchors);
        chunk_flux = carve.take<float>(chunks * width);
        if (has_end_gradient(p)) {
            end_states = carve.take<uint32_t>(p.N * p.HV * state_words);
            end_flux = carve.take<float>(p.N * p.HV * width);
        }
        auto const per_token = [&](void* data, int64_t columns) {
            return Rows{data, p.T * p.HV * columns, p.HV * columns, columns};
        };
        if (scalar) {
            dots = per_token(carve.take<float>(tokens * parts * 2), parts);
            bool const weighted = p.w.data != nullptr || p.normaliser.on;
            split = per_token(carve.take<float>(tokens * parts * (weighted ? 2 : 1)), parts);
        } else {
            tokenwise = carve.take<uint8_t>(chunks * row_tiles * (kChunk / 16));
            if (has_end_gradient(p)) end_tokenwise = carve.take<uint8_t>(p.N * p.HV * row_tiles);
            dots = p.dg;
            split = per_token(carve.take<uint32_t>(tokens * rows), rows);
        }
    }
};

Operand per_head(ChunkParams const& p, Rows const& rows) {
    return {rows, static_cast<int>(p.HV / p.H)};
}
Operand per_value_head(Rows const& rows) {
    return {rows, 1};
}
// What reads the state, o's side: beside the token that wrote last. Where a token reads before it writes, that is the one
// before it, and the walk is the same.
Operand reading(ChunkParams const& p, Operand x) {
    x.next = p.exclusive ? 1 : 0;
    return x;
}
Operand q_of(ChunkParams const& p) {
    return reading(p, per_head(p, p.q));
}
Operand grad_o_of(ChunkParams const& p) {
    return reading(p, per_value_head(p.grad_o));
}

// The two ways a [K, V] state lies under a sweep.
StateView contraction_over_k(ChunkParams const& p, void const* state) {
    return {static_cast<float*>(const_cast<void*>(state)), static_cast<int>(p.V), 1};
}
StateView contraction_over_v(ChunkParams const& p, void const* state) {
    return {static_cast<float*>(const_cast<void*>(state)), 1, static_cast<int>(p.V)};
}

// A row of Normaliser::tokens, [B, T, HV].
Rows tokens_row(ChunkParams const& p, int row) {
    int64_t const size = p.B * p.HV * p.T;
    return {static_cast<float*>(p.normaliser.tokens) + row * size, p.HV * p.T, 1, p.T};
}

SweepParams common(ChunkParams const& p, bool reverse) {
    SweepParams s{};
    s.read_scale = s.write_scale = 1.f;
    s.gate = per_value_head(p.g);
    s.weight = per_value_head(p.normaliser.on ? tokens_row(p, 1) : p.w);
    s.eps = static_cast<float>(p.normaliser.eps);
    s.gate_is_fp32 = p.gate_dtype == Dtype::f32;
    s.heads = static_cast<int>(p.HV);
    s.tokens_per_row = p.T;
    s.reverse = reverse;
    return s;
}

// o: query, key, value = q, k, v, forward.  dv: k, q, dO, reverse.
SweepParams over_k(ChunkParams const& p, bool reverse) {
    SweepParams s = common(p, reverse);
    Operand const k = per_head(p, p.k), v = per_value_head(p.v);
    s.query = reverse ? k : q_of(p);
    s.key = reverse ? q_of(p) : k;
    s.value = reverse ? grad_o_of(p) : v;
    (reverse ? s.write_scale : s.read_scale) = static_cast<float>(p.scale);
    s.contraction = static_cast<int>(p.K), s.rows = static_cast<int>(p.V);
    return s;
}

// dq: query, key, value = dO, v, k, forward.  dk: v, dO, q, reverse.
SweepParams over_v(ChunkParams const& p, bool reverse) {
    SweepParams s = common(p, reverse);
    Operand const k = per_head(p, p.k), v = per_value_head(p.v);
    s.query = reverse ? v : grad_o_of(p);
    s.key = reverse ? grad_o_of(p) : v;
    s.value = reverse ? q_of(p) : k;
    s.probe = reverse ? k : q_of(p);
    (reverse ? s.write_scale : s.read_scale) = static_cast<float>(p.scale);
    s.contraction = static_cast<int>(p.V), s.rows = static_cast<int>(p.K);
    return s;
}

bool whole(ChunkParams const& p) {
    return p.decay == Decay::none || p.decay == Decay::scalar;
}

void sweep_all(ChunkParams const& p, SweepKind kind, SweepParams const& s, Segments const& segments,
               void* stream) {
    (p.normaliser.on                 ? sweep_normalised
     : s.weight.rows.data != nullptr ? sweep_weighted
                                     : sweep_whole)(kind, s, segments, stream);
}

void sweep_over_k(ChunkParams const& p, SweepKind kind, SweepParams const& s,
                  Segments const& segments, void* stream) {
    if (whole(p)) return sweep_all(p, kind, s, segments, stream);
    (p.decay == Decay::key ? sweep_contraction : sweep_rows)(kind, s, segments, stream);
}

void sweep_over_v(ChunkParams const& p, SweepKind kind, SweepParams const& s,
                  Segments const& segments, void* stream) {
    if (whole(p)) return sweep_all(p, kind, s, segments, stream);
    (p.decay == Decay::value ? sweep_contraction : sweep_rows)(kind, s, segments, stream);
}

// What stands beside gradients of divided outputs.
void divide_gradients(Plan const& plan, SweepParams& s) {
    s.reader = per_value_head(plan.reader), s.below = per_value_head(plan.below);
}

// Leaves in `states` what every segment starts from, walking forward or in reverse. A state without readers may lie
// either way: as its gates are on the contraction.
void join_boundaries(ChunkParams const& p, Plan const& plan, bool reverse, void* stream) {
    float* const states = reverse ? plan.reverse : plan.forward;
    float* const sums = reverse ? plan.reverse_sums : plan.forward_sums;
    bool const values = p.decay == Decay::value;
    SweepParams s = values ? over_v(p, reverse) : over_k(p, reverse);
    s.end = values ? contraction_over_v(p, states) : contraction_over_k(p, states);
    s.gate_sum = sums;
    if (reverse) s.weight = {};  // of what is read, and nothing is
    float* const n = reverse ? plan.reverse_n : plan.forward_n;
    s.sums_end = n;
    if (reverse) divide_gradients(plan, s);
    if (whole(p)) {
        sweep_all(p, SweepKind::state, s, plan.segments, stream);
    } else {
        sweep_contraction(SweepKind::state, s, plan.segments, stream);
    }
    auto const join = [&](float* of, void const* initial, int64_t columns) {
        run_join({of, sums, static_cast<float const*>(initial), static_cast<int>(p.HV),
                  static_cast<int>(p.K), static_cast<int>(columns), static_cast<int>(plan.channels),
                  p.decay, reverse},
                 plan.segments, stream);
    };
    join(states, reverse ? p.grad_final_state : p.initial_state, p.V);
    if (p.normaliser.on) join(n, reverse ? p.normaliser.grad_n : p.normaliser.n0, 1);
}

// Where a sweep's states come from: the joined boundaries, or the caller's initial (or final gradient) state.
void const* start_of(ChunkParams const& p, Plan const& plan, bool reverse) {
    if (plan.cut) return reverse ? plan.reverse : plan.forward;
    return reverse ? p.grad_final_state : p.initial_state;
}

float const* sums_start_of(ChunkParams const& p, Plan const& plan, bool reverse) {
    if (plan.cut) return reverse ? plan.reverse_n : plan.forward_n;
    return static_cast<float const*>(reverse ? p.normaliser.grad_n : p.normaliser.n0);
}

// The sweep gets what the gate's gradient wants of it, and becomes of that kind.
SweepKind with_anchors(Plan const& plan, bool reverse, SweepParams& s) {
    s.strict = per_value_head(reverse ? plan.split : plan.dots);
    s.chunk_states = plan.chunk_states;
    s.chunk_flux = plan.chunk_flux;
    s.tokenwise = plan.tokenwise;
    s.end_states = plan.end_states;
    s.end_flux = plan.end_flux;
    s.end_tokenwise = plan.end_tokenwise;
    s.chunk_sums = plan.chunk_n;
    s.end_sums = plan.end_n;
    return reverse ? SweepKind::key_gradient : SweepKind::query_gradient;
}

void gate_gradient_of(ChunkParams const& p, Plan const& plan, void* stream) {
    int64_t const blocks = count_chunks(p, plan.segments) * p.HV;
    if (plan.segments.count == 0) return;
    dim3 const grid(static_cast<unsigned>(blocks));
    bool const wide = p.gate_dtype == Dtype::f32;
    if (p.decay == Decay::scalar) {
        HeadGateParams const hp{per_value_head(plan.dots),
                                per_value_head(plan.split),
                                per_value_head(p.g),
                                per_value_head(p.dg),
                                per_value_head(p.normaliser.on ? p.normaliser.dweight : p.dw),
                                plan.chunk_flux,
                                plan.end_flux,
                                p.initial_state == nullptr && p.normaliser.n0 == nullptr,
                                plan.parts,
                                static_cast<int>(p.HV),
                                p.T};
        launch(wide ? head_gate_gradient<float> : head_gate_gradient<bf16>, grid, dim3(128),
               sizeof(HeadGateStorage), stream, hp, plan.segments);
        return;
    }
    bool const values = p.decay == Decay::value;
    GateGradientParams const gp{values ? grad_o_of(p) : q_of(p),
                                values ? per_value_head(p.v) : per_head(p, p.k),
                                per_value_head(p.dg),
                                per_value_head(plan.split),
                                per_value_head(p.g),
                                plan.chunk_flux,
                                plan.tokenwise,
                                plan.end_flux,
                                plan.end_tokenwise,
                                plan.row_tile,
                                plan.row_tiles,
                                static_cast<int>(p.HV),
                                static_cast<int>(plan.channels),
                                p.T};
    dim3 const threads(static_cast<unsigned>((plan.channels / 2 + 31) / 32 * 32));
    launch(wide ? gate_gradient<float> : gate_gradient<bf16>, grid, threads, 0, stream, gp,
           plan.segments);
}

FirstTokenParams first_token_of(ChunkParams const& p) {
    return {per_head(p, p.q),
            per_value_head(p.grad_o),
            per_value_head(p.o),
            per_value_head(p.dq),
            static_cast<float const*>(p.initial_state),
            static_cast<float*>(p.grad_initial_state),
            static_cast<int>(p.HV),
            static_cast<int>(p.K),
            static_cast<int>(p.V),
            static_cast<float>(p.scale)};
}

// D beside the outputs, or beside the gradients of the values it multiplies.
void add_skip(ChunkParams const& p, SweepParams& s) {
    s.skip = per_value_head(p.finish.skip);
    s.skip_is_fp32 = p.finish.skip.dtype == Dtype::f32;
    s.skip_by_row = p.finish.skip_channels;
}

// Every token's decay and weight, and what divides it at least; in forwards.
void run_input_gates(ChunkParams const& p, Segments const& segments, void* stream) {
    Normaliser const& own = p.normaliser;
    int64_t const blocks = segments.count * p.HV;
    if (!own.on || blocks == 0) return;
    InputGateParams const ip{own.i,
                             own.f,
                             own.dtype == Dtype::f32,
                             own.exponential,
                             tokens_row(p, 0),
                             tokens_row(p, 1),
                             tokens_row(p, 3),
                             static_cast<float const*>(own.m0),
                             static_cast<float*>(own.m),
                             static_cast<int>(p.HV)};
    launch(input_gates, dim3(static_cast<unsigned>(blocks)), dim3(kInputGateThreads),
           sizeof(InputGateStorage), stream, ip, segments);
}

void run_divisor_gradient(ChunkParams const& p, Plan const& plan, void* stream) {
    int64_t const pieces = (p.B * p.T + kDivisorTokens - 1) / kDivisorTokens;
    if (!p.normaliser.on || pieces == 0) return;
    int const columns = static_cast<int>(p.V / 8);
    int lanes = 1;
    while (lanes < columns) lanes *= 2;
    DivisorGradientParams const dp{p.grad_o,
                                   p.o,
                                   p.normaliser.divides ? tokens_row(p, 2) : Rows{},
                                   tokens_row(p, 3),
                                   plan.reader,
                                   plan.below,
                                   static_cast<float>(p.normaliser.eps),
                                   static_cast<int>(p.HV),
                                   columns,
                                   lanes,
                                   p.B * p.T,
                                   p.T};
    launch(divisor_gradient, dim3(static_cast<unsigned>(pieces * p.HV)), dim3(kDivisorThreads), 0,
           stream, dp);
}

// Only bf16 goes to tensor cores: frames scale operands by powers of two far beyond fp16's range, and fp32 would lose
// 16 bits. Both keep their precision on the recurrence. It also serves what sweeps do not: decays on either side, and gates
// that are not log decays.
bool on_tensor_cores(ChunkParams const& p) {
    return p.dtype == Dtype::bf16 && p.decay != Decay::both && p.gate == kGate<LogGate>;
}

}  // namespace

int64_t finish_gradient_pieces(ChunkParams const& p) {
    return (p.B * p.T + kFinishTokens - 1) / kFinishTokens;
}

int64_t chunk_fwd_workspace(ChunkParams const& p) {
    if (p.features != Features::none) return polynomial_fwd_workspace(p);
    return on_tensor_cores(p) ? Plan(p, false, nullptr).bytes : recurrence_fwd_workspace(p);
}

int64_t chunk_bwd_workspace(ChunkParams const& p) {
    if (p.features != Features::none) return polynomial_bwd_workspace(p);
    return on_tensor_cores(p) ? Plan(p, true, nullptr).bytes : recurrence_bwd_workspace(p);
}

void chunk_fwd(ChunkParams const& p, void* workspace, void* stream) {
    if (p.features != Features::none) return polynomial_fwd(p, workspace, stream);
    if (!on_tensor_cores(p)) return recurrence_fwd(p, workspace, stream);
    Plan const plan(p, false, workspace);
    build_segments(p, plan.segments, stream);
    run_input_gates(p, plan.segments, stream);
    if (plan.cut) join_boundaries(p, plan, false, stream);
    SweepParams s = over_k(p, false);
    s.out = reading(p, per_value_head(p.o));
    s.start = contraction_over_k(p, start_of(p, plan, false));
    s.start_per_record = plan.cut;
    s.end = contraction_over_k(p, p.final_state);
    add_skip(p, s);
    s.probe = per_value_head(p.finish.z), s.ungated = per_value_head(p.finish.ungated);
    if (p.normaliser.on) {
        s.reader = per_value_head(tokens_row(p, 3));
        if (p.normaliser.divides) s.size = per_value_head(tokens_row(p, 2));
        s.sums_start = sums_start_of(p, plan, false);
        s.sums_end = static_cast<float*>(p.normaliser.n);
    }
    sweep_over_k(p, SweepKind::output, s, plan.segments, stream);
    if (p.exclusive) run_first_token(first_token_of(p), plan.segments, false, stream);
}

void chunk_bwd(ChunkParams const& given, void* workspace, void* stream) {
    if (given.features != Features::none) return polynomial_bwd(given, workspace, stream);
    if (!on_tensor_cores(given)) return recurrence_bwd(given, workspace, stream);
    Plan const plan(given, true, workspace);
    ChunkParams p = given;
    p.grad_o = run_finish_gradient(p, plan.ungated, stream);
    run_divisor_gradient(p, plan, stream);
    build_segments(p, plan.segments, stream);
    if (plan.cut) {
        join_boundaries(p, plan, false, stream);
        join_boundaries(p, plan, true, stream);
    }
    bool const values = p.decay == Decay::value;
    auto const start = [&](SweepParams& s, bool over_keys, bool reverse) {
        void const* const states = start_of(p, plan, reverse);
        s.start = over_keys ? contraction_over_k(p, states) : contraction_over_v(p, states);
        s.start_per_record = plan.cut;
        if (!p.normaliser.on) return;
        s.sums_start = sums_start_of(p, plan, reverse);
        divide_gradients(plan, s);
        if (over_keys) s.below = {};  // beside channels of v alone
    };

    SweepParams dq = over_v(p, false), dk = over_v(p, true), dv = over_k(p, true);
    dq.out = reading(p, per_value_head(p.dq));
    dk.out = per_value_head(p.dk), dv.out = per_value_head(p.dv);
    add_skip(p, dv);
    start(dq, false, false), start(dk, false, true), start(dv, true, true);
    if (values) {
        dk.end = contraction_over_v(p, p.grad_initial_state);
    } else {
        dv.end = contraction_over_k(p, p.grad_initial_state);
    }
    dk.sums_end = static_cast<float*>(p.normaliser.grad_n0);
    SweepKind dq_kind = SweepKind::output, dk_kind = dq_kind, dv_kind = dq_kind;

    // The anchors of the gate's gradient lie in the output of the sweep that has none and comes last.
    if (plan.has_dg && values) {
        SweepParams o = over_k(p, false);  // again, without its own token's term
        start(o, true, false);
        SweepKind const o_kind = with_anchors(plan, false, o);
        sweep_over_k(p, o_kind, o, plan.segments, stream);
        dv_kind = with_anchors(plan, true, dv);
    } else if (plan.has_dg) {
        dq_kind = with_anchors(plan, false, dq);
        dk_kind = with_anchors(plan, true, dk);
    }
    if (values) sweep_over_k(p, dv_kind, dv, plan.segments, stream);
    sweep_over_v(p, dq_kind, dq, plan.segments, stream);
    sweep_over_v(p, dk_kind, dk, plan.segments, stream);
    if (!values) sweep_over_k(p, dv_kind, dv, plan.segments, stream);
    if (p.exclusive) run_first_token(first_token_of(p), plan.segments, true, stream);
    if (plan.has_dg) gate_gradient_of(p, plan, stream);
}

}  // namespace lsm
