// What dq's and dk's sweeps leave for the gate's gradient (gate_gradient.cuh): outputs without a token's own term, and
// the flux <S, dS> through the end of every chunk. Chunks are counted from the segment's first token.
#pragma once

#include "kernels/chunk/sweep.cuh"

namespace lsm {

template <class Config>
LSM_DEVICE void Sweep<Config>::store_strict(int stage, int b, int m, int only,
                                            float const (&o)[2][4],
                                            float const (&local)[2][4]) const {
    LSM_UNROLL
    for (int n = 0; n < 2; ++n) {
        LSM_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
            int const i = 8 * n + lane % 4 * 2 + odd,
                      t = token(stage * kStageTokens + b * kBlock + i);
            if (!inside(t) || (only >= 0 && i != only)) continue;
            i64 const at = row_offset(p.strict, t) + row0;
            LSM_UNROLL
            for (int e = odd; e < 4; e += 2) {
                int const row = state_row(m, e);
                if (row0 + row < p.rows)
                    store_strict_element(at + row, o[n][e], local[n][e], factor(b, m, n, e));
            }
        }
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::store_strict_element(i64 at, float o, float local, float f) const {
    void* const data = p.strict.rows.data;
    if constexpr (kKind == SweepKind::key_gradient) {
        store_global(static_cast<u32*>(data) + at, pack_bf16(o * f, local * f));
    } else if (p.gate_is_fp32) {
        store_global(static_cast<float*>(data) + at, (o + local) * f);
    } else {
        store_global(static_cast<bf16*>(data) + at, bf16((o + local) * f));
    }
}

template <class Config>
LSM_DEVICE i64 Sweep<Config>::chunk_index(int chunk) const {
    return first_chunk(segment, s.record, p.tokens_per_row) + chunk;
}

// A slot for one state, bf16 in the order of the fragments.
template <class Config>
LSM_DEVICE uint4* Sweep<Config>::saved_state(u32* slots, i64 index) const {
    i64 const tile = (index * p.heads + head) * ((p.rows + kRows - 1) / kRows) + row0 / kRows;
    return reinterpret_cast<uint4*>(slots) +
           ((tile * kWarps + warp) * kRowTiles * kColumnTiles / 2) * 32 + lane;
}

// S times 2^exponents of its rows, or of all of it.
template <class Config>
LSM_DEVICE void Sweep<Config>::save_state(uint4* to, float const* exponents, float all) const {
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        float const upper = exp2_approx(kWhole ? all : exponents[state_row(m, 0)]);
        float const lower = exp2_approx(kWhole ? all : exponents[state_row(m, 2)]);
        LSM_UNROLL
        for (int n = 0; n < kColumnTiles; n += 2) {
            float const(&a)[4] = S[m][n];
            float const(&b)[4] = S[m][n + 1];
            store_global(
                to + (m * kColumnTiles + n) / 2 * 32,
                uint4{pack_bf16(a[0] * upper, a[1] * upper), pack_bf16(a[2] * lower, a[3] * lower),
                      pack_bf16(b[0] * upper, b[1] * upper),
                      pack_bf16(b[2] * lower, b[3] * lower)});
        }
    }
}

// This lane's share of sum_v S_cv dS_cv of a saved state and this sweep's: rows c of row tile m, upper and lower.
template <class Config>
LSM_DEVICE float2 Sweep<Config>::contract_rows(uint4 const* from, int m) const {
    float2 sum = {0.f, 0.f};
    LSM_UNROLL
    for (int n = 0; n < kColumnTiles; n += 2) {
        uint4 const saved = load_global(from + (m * kColumnTiles + n) / 2 * 32);
        u32 const words[4] = {saved.x, saved.y, saved.z, saved.w};
        LSM_UNROLL
        for (int w = 0; w < 4; ++w) {
            float2 const x = unpack(words[w]);
            float const(&y)[4] = S[m][n + w / 2];
            (w % 2 == 0 ? sum.x : sum.y) += x.x * y[w % 2 * 2] + x.y * y[w % 2 * 2 + 1];
        }
    }
    return sum;
}

// The flux of every gated row, as the sweep's state enters block 0 of a stage.
template <class Config>
LSM_DEVICE void Sweep<Config>::contract_saved_state(uint4 const* from, float* to, int stage,
                                                    Mode mode) const {
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        float2 const sum = contract_rows(from, m);
        LSM_UNROLL
        for (int h = 0; h < 2; ++h) {
            float flux = h == 0 ? sum.x : sum.y;
            flux += __shfl_xor_sync(0xffffffffu, flux, 1);
            flux += __shfl_xor_sync(0xffffffffu, flux, 2);
            int const row = state_row(m, 2 * h);
            if (lane % 4 == 0 && row0 + row < p.rows) {
                float decay = factor_row(0)[row];
                if (mode == kTokenwise) {
                    float2 const gate = gate_pair(stage, 0, row & ~1);
                    decay = exp2_approx(row % 2 == 0 ? gate.x : gate.y);
                }
                store_global(to + row0 + row, flux * decay);
            }
        }
    }
}

// The same for a decay of the whole state and of sums beside it: this warp's share of one number.
template <class Config>
LSM_DEVICE void Sweep<Config>::contract_whole(uint4 const* from, float const* sums, float* to,
                                              i64 owner, float by) {
    float flux = 0.f;
    if constexpr (kSumsOnRows) flux = contract_sums(sums, owner);
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        float2 const sum = contract_rows(from, m);
        flux += sum.x + sum.y;
    }
    LSM_UNROLL
    for (int d = 1; d < 32; d *= 2) flux += __shfl_xor_sync(0xffffffffu, flux, d);
    if (lane == 0) store_global(to + owner * parts() + part(), flux * exp2_approx(by));
}

// dq's sweep, after a stage: the state at a chunk's end.
template <class Config>
LSM_DEVICE void Sweep<Config>::save_chunk_end(int stage) {
    if (stage + 1 != stages && (stage + 1) % kStagesPerChunk != 0) return;
    i64 const chunk = chunk_index(stage / kStagesPerChunk);
    uint4* const to = saved_state(p.chunk_states, chunk);
    if constexpr (kWhole) {
        save_state(to, nullptr, exponent);
        if constexpr (kSumsOnRows) save_sums(p.chunk_sums, chunk, exponent);
    } else {
        save_state(to, s.frames.frame[(stage + 1) % 2], 0.f);
    }
}

// dq's sweep, before a block (token `only` of it): where it is the last of a sequence whose final state has a gradient,
// what of the state is left at the end. Frames are true to the end: no gate follows.
template <class Config>
LSM_DEVICE void Sweep<Config>::save_sequence_end(int stage, int b, int only) const {
    int const last = t1 - 1 - t0, at = stage * kStageTokens + b * kBlock;
    bool const ends = only < 0 ? at == last / kBlock * kBlock : at + only == last;
    if (!ends || p.end_states == nullptr || !segment.is_last || segment.sequence < 0) return;
    save_state(saved_state(p.end_states, segment.sequence), s.frames.frame[(stage + 1) % 2], 0.f);
    if (tid == 0) {
        i64 const owner = static_cast<i64>(segment.sequence) * p.heads + head;
        store_global(p.end_tokenwise + owner * ((p.rows + kRows - 1) / kRows) + row0 / kRows,
                     static_cast<uint8_t>(only >= 0));
    }
}

template <class Config>
LSM_DEVICE void Sweep<Config>::save_whole_end(int stage, int b, float total) {
    bool const ends = stage * kStageTokens + b * kBlock == (t1 - 1 - t0) / kBlock * kBlock;
    if (!ends || p.end_states == nullptr || !segment.is_last || segment.sequence < 0) return;
    save_state(saved_state(p.end_states, segment.sequence), nullptr, exponent + total);
    if constexpr (kSumsOnRows) save_sums(p.end_sums, segment.sequence, exponent + total);
}

// dk's sweep, before a block: contract(saved state, saved sums, where fluxes go, owner) at the end of a chunk and of the
// sequence.
template <class Config>
template <class Contract>
LSM_DEVICE void Sweep<Config>::visit_anchors(int stage, int b, Contract contract) const {
    int const stages_left = stages - stage;  // counted from the segment's first token
    if (b != 0) return;
    if (stage == 0 || stages_left % kStagesPerChunk == 0) {
        i64 const chunk = chunk_index((stages_left - 1) / kStagesPerChunk);
        contract(saved_state(p.chunk_states, chunk), p.chunk_sums, p.chunk_flux,
                 chunk * p.heads + head);
    }
    if (stage == 0 && p.end_states != nullptr && segment.is_last && segment.sequence >= 0) {
        i64 const owner = static_cast<i64>(segment.sequence) * p.heads + head;
        contract(saved_state(p.end_states, segment.sequence), p.end_sums, p.end_flux, owner);
    }
}

// dk's sweep, before a block: its mode, and its anchors.
template <class Config>
LSM_DEVICE void Sweep<Config>::note_anchors(int stage, int b, Mode mode) const {
    visit_anchors(stage, b, [&](uint4 const* saved, float const*, float* flux, i64 owner) {
        contract_saved_state(saved, flux + owner * p.rows, stage, mode);
    });
    if (tid == 0) {
        int const block = (stages - stage - 1) * 2 + 1 - b;  // of the segment, in the order of time
        i64 const at = (chunk_index(0) * kBlocksPerChunk + block) * p.heads + head;
        store_global(p.tokenwise + at * ((p.rows + kRows - 1) / kRows) + row0 / kRows,
                     static_cast<uint8_t>(mode == kTokenwise));
    }
}

}  // namespace lsm
