// The chunk engine's one kernel. With a state S [rows x contraction] and tokens in processing order,
//
//     out_i = sum_{j<=i} d_ij (query_i . key_j) value_j + d_i S query_i,      S += value key^T,
//
// it is the forward (query, key, value = q, k, v) and, with the arguments permuted, each gradient:
//
//                                decay by key channel    by value channel
//     o    forward   q, k, v     on the contraction      on the rows
//     dv   reverse   k, q, dO    on the contraction      on the rows
//     dq   forward   dO, v, k    on the rows             on the contraction
//     dk   reverse   v, dO, q    on the rows             on the contraction
//
// or, with one decay per head or none, on the whole state (sweep_whole.cuh).
//
// A block owns kRows rows of the state of one value head and walks one segment of time. Each warp keeps its rows of
// the state in accumulators (fp32); their layout is that of an A operand, so the state reaches the tensor cores
// without touching shared memory. Tokens go by blocks of 16; warps share nothing but the tiles they read.
//
// Decay by channels is done in frames (sweep_frames.cuh).
#pragma once

#include "kernels/chunk/chunks.cuh"
#include "kernels/chunk/sweep_params.h"
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile/tile.cuh"

namespace lsm {

template <int Contraction, int RowsPerWarp, SweepKind Kind, DecayOn On, Tokens Have>
struct SweepConfig {
    static constexpr int kContraction = Contraction, kRowsPerWarp = RowsPerWarp;
    static constexpr SweepKind kKind = Kind;
    static constexpr DecayOn kDecayOn = On;
    static constexpr Tokens kTokens = Have;
};

// Exponents of a decay by channels, in log2 (sweep_frames.cuh).
template <int Gated, bool StateOnly>
struct Frames {
    float low[2][Gated], high[2][Gated];  // range of the cumulative gate in each block
    float sum[2][Gated];                  // its last value
    float shift[2][Gated];                // factor of the state where a block reopens its frame
    float frame[2][Gated];                // a_c before even and odd stages
    float total[StateOnly ? Gated : 4];
};
template <bool StateOnly>
struct Frames<0, StateOnly> {};

template <class Config>
struct Sweep {
    static constexpr int Contraction = Config::kContraction, RowsPerWarp = Config::kRowsPerWarp;
    static constexpr SweepKind kKind = Config::kKind;
    static constexpr bool StateOnly = kKind == SweepKind::state;
    // Outputs without their own token's term are wanted too.
    static constexpr bool kStrict =
        kKind == SweepKind::query_gradient || kKind == SweepKind::key_gradient;
    static constexpr bool kOnRows = Config::kDecayOn == DecayOn::rows;
    static constexpr bool kWhole = Config::kDecayOn == DecayOn::whole;
    // Weights of tokens; outputs then may have something added to them and be gated.
    static constexpr bool kWeighted = Config::kTokens != Tokens::plain;
    static constexpr bool kFinished =
        Config::kTokens == Tokens::weighted && kKind == SweepKind::output;
    // Sums beside the state (sweep_sums.cuh): on its rows in dq's and dk's sweeps, else on the contraction.
    static constexpr bool kNormalised = Config::kTokens == Tokens::normalised;
    static constexpr bool kSumsOnRows = kNormalised && kStrict;
    static constexpr bool kSumsOnContraction = kNormalised && !kStrict;
    static_assert(kWhole || !kWeighted);
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kRows = kWarps * RowsPerWarp;
    static constexpr int kBlock = 16, kStageTokens = 32, kStages = 2;
    static constexpr int kStagesPerChunk = kChunk / kStageTokens, kBlocksPerChunk = kChunk / kBlock;
    static constexpr int kGated = kWhole ? 0 : kOnRows ? kRows : Contraction;
    static constexpr int kRowTiles = RowsPerWarp / 16, kColumnTiles = Contraction / 8;
    // In floats; four more than a row keep the epilogue's column reads off one bank.
    static constexpr int kFactorPitch = kGated + 4;
    static constexpr int kStripPitch = RowsPerWarp * 2 + 16;
    static constexpr float kLog2e = 1.4426950408889634f;
    static constexpr int kBlocksPerMultiprocessor = Contraction <= 128 ? 2 : 1;
    // Numbers of a token, in their order.
    static constexpr int kTokenNumbers = kNormalised ? 3 : kWeighted ? 1 : 0;
    static constexpr int kWeight = 0, kReader = 1, kBelow = 2;
    static constexpr int kSumTiles = (Contraction + 127) / 128;
    // Of exponents, in log2: a product of two scaled operands stays finite.
    static constexpr float kRange = 80.f;

    using WideTile = Tile<Contraction>;
    using RowTile = Tile<kRows>;

    struct Stage {
        alignas(128) char query[StateOnly ? 16 : kStageTokens * Contraction * 2];
        alignas(128) char key[kStageTokens * Contraction * 2];
        alignas(128) char value[kStageTokens * kRows * 2];
        alignas(128) char probe[(kWhole && kStrict) || kFinished ? kStageTokens * kRows * 2 : 16];
        // As loaded: fp32, or bf16 in the first half; where the whole state decays, numbers of tokens.
        alignas(128) char gate[kWeighted ? kTokenNumbers * kStageTokens * 4
                               : kWhole  ? 16
                                         : kStageTokens * kGated * 4];
    };
    struct SharedStorage {
        Stage stage[kStages];
        // With decay on the rows: 2^e, what brings outputs out of the frame. Where outputs are finished: skip, of every row.
        alignas(16) float factors[kOnRows ? kStageTokens * kFactorPitch : kFinished ? kRows : 4];
        alignas(16) float sums[kSumsOnRows          ? kRows
                               : kSumsOnContraction ? kWarps * kSumTiles * 128
                                                    : 4];
        Frames<kGated, StateOnly> frames;
        Segment segment;
        i64 record;
        alignas(16) char strip[StateOnly ? 16 : kWarps * kBlock * kStripPitch];
    };

    static_assert(sizeof(SharedStorage) <= 163 * 1024, "what an sm_80 block can have");

    enum Mode { kKeep, kReopen, kTokenwise };

    SweepParams const& p;
    SharedStorage& s;
    Segment const& segment;  // in shared memory: a dozen registers less in the loop
    int const t0, t1;        // its tokens
    int const head, row0;    // value head, first row of the tile
    int const tid, lane, warp;
    int const origin, sign;  // token of position i is origin + sign * i
    int const stages;
    float S[kRowTiles][kColumnTiles][4];
    // Where the whole state decays: S_true = S 2^exponent, and the sum of all gates so far.
    float exponent = 0.f, gate_total = 0.f;

    LSM_DEVICE Sweep(SweepParams const& params, SharedStorage& storage, int value_head, int tile)
        : p(params),
          s(storage),
          segment(storage.segment),
          t0(static_cast<int>(storage.segment.t0)),
          t1(static_cast<int>(storage.segment.t1)),
          head(value_head),
          row0(tile * kRows),
          tid(threadIdx.x),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          origin(params.reverse ? t0 + round_up(t1 - t0) - 1 : t0),
          sign(params.reverse ? -1 : 1),
          stages(round_up(t1 - t0) / kStageTokens) {}

    // The grid of 16-token blocks is laid from the segment's first token in both directions, so that a reverse sweep
    // passes the same chunk boundaries as the forward one; positions past the end read zeros.
    LSM_DEVICE static int round_up(int n) {
        return (n + kStageTokens - 1) / kStageTokens * kStageTokens;
    }

    LSM_DEVICE int token(int position) const { return origin + sign * position; }
    LSM_DEVICE bool inside(int t) const { return t >= t0 && t < t1; }
    // A row of the token itself, or of the one after it in its sequence, which may be of the next segment.
    LSM_DEVICE bool exists(Operand const& x, int t) const {
        return inside(t) && (x.next == 0 || t + 1 < t1 || !segment.is_last);
    }
    // Walking backwards, a state reaches token t through the gate of t + 1.
    LSM_DEVICE int gate_lag() const { return p.reverse ? 1 : 0; }

    // out^T: row tile, token tile; token 8 n + 2 (lane % 4) + e % 2
    using Output = float[kRowTiles][2][4];

    // --- the walk

    LSM_DEVICE void walk_block(int stage, int b, Mode mode);
    LSM_DEVICE void run();

    // --- loading tiles

    LSM_DEVICE i64 row_offset(Operand const& x, int t) const;
    template <int Columns, class Address>
    LSM_DEVICE void load_tile(Operand const& x, int column0, int columns, int stage,
                              u32 destination, int element_bytes, int lag, Address address) const;
    LSM_DEVICE void load_number(Operand const& x, int number, int stage) const;
    LSM_DEVICE void load_stage(int stage) const;

    // --- one gate for the whole state (sweep_whole.cuh)

    // The cumulative gates of a block, as a warp holds them: lane 16 b + i has that of token i of block b.
    struct BlockGates {
        float token, row[2], column[4], total;  // of tokens lane/4 + {0,8}, 2 (lane%4) + {0,1,8,9}
        bool leaves;                            // the range in which the state's exponent may stay
    };
    LSM_DEVICE float whole_gate(int stage) const;
    LSM_DEVICE float whole_gate_of(int t) const;
    LSM_DEVICE static float cumulative(float gate, int lane);
    LSM_DEVICE BlockGates block_gates(float cumulative, int b) const;
    LSM_DEVICE void whole_block(int stage, int b, float cumulative);
    LSM_DEVICE void decay_scores(BlockGates const& gates, float (&scores)[2][4]) const;
    LSM_DEVICE static float number_of_token(Stage const& tiles, int number, int at);
    LSM_DEVICE float number_of(Stage const& tiles, int number, int b, int i) const;
    LSM_DEVICE void load_skip();
    LSM_DEVICE void weigh_output(Stage const& tiles, int b, Output& o) const;
    LSM_DEVICE void finish(int stage, int b, Output& o);
    LSM_DEVICE static void add_dots(u32 const (&probe)[4], float const (&out)[2][4],
                                    float (&dots)[4]);
    LSM_DEVICE static void scale_value(u32 (&value)[4], float const (&factor)[4]);
    LSM_DEVICE void relate(Stage const& tiles, int b, int m, float (&scores)[2][4]) const;
    LSM_DEVICE void store_part(int stage, int b, int i, int number, float x) const;
    LSM_DEVICE void store_dots(int stage, int b, int number, float (&dots)[4]) const;
    LSM_DEVICE void store_crossing_pairs(int stage, int b, float const (&scores)[2][4]) const;

    // --- sums beside the state (sweep_sums.cuh)

    // What outputs are multiplied by, of the tokens that BlockGates has rows and columns of.
    struct Readers {
        float row[2], column[4];
    };
    template <class Visit>
    LSM_DEVICE void for_sums(Visit visit);
    LSM_DEVICE void start_sums(i64 owner);
    LSM_DEVICE void end_sums(i64 owner);
    LSM_DEVICE void scale_sums(float factor);
    LSM_DEVICE void save_sums(float* sums, i64 owner, float exponent);
    LSM_DEVICE float contract_sums(float const* sums, i64 owner);
    LSM_DEVICE bool walks_sums() const;
    LSM_DEVICE void relate_sums(Stage const& tiles, int b, float (&scores)[2][4], float (&read)[4]);
    LSM_DEVICE void read_sums(Stage const& tiles, int b, int m, float (&out)[2][4]) const;
    LSM_DEVICE Readers readers_of(Stage const& tiles, int b, int number) const;
    LSM_DEVICE Readers divide(int stage, int b, BlockGates const& gates,
                              float const (&scores)[2][4], float const (&read)[4]) const;
    LSM_DEVICE void write_sums(Stage const& tiles, int b, float const (&write)[4]);

    LSM_DEVICE int part() const { return row0 / kRows * kWarps + warp; }
    LSM_DEVICE int parts() const { return (p.rows + kRows - 1) / kRows * kWarps; }

    // --- gates by channels (sweep_frames.cuh)

    LSM_DEVICE float2 gate_pair(int stage, int row, int c) const;
    LSM_DEVICE float2& pair_of(float* row, int c) const {
        return *reinterpret_cast<float2*>(row + c);
    }
    LSM_DEVICE float* factor_row(int row) const { return s.factors + row * kFactorPitch; }
    LSM_DEVICE void accumulate_gates(int stage);
    LSM_DEVICE static float opened(Mode mode, float frame, float high);
    LSM_DEVICE static float closed(Mode mode, float start, float sum) {
        return mode == kTokenwise ? 0.f : start + sum;
    }
    LSM_DEVICE float frame_before(int stage, int b, Mode mode0, int c) const;
    LSM_DEVICE Mode choose_mode(int stage, int b, Mode mode0) const;
    LSM_DEVICE static void scale_pair(char* at, float low, float high);
    LSM_DEVICE void apply_gates(int stage, Mode mode0, Mode mode1);
    template <int Columns>
    LSM_DEVICE void isolate(Operand const& x, char* tile, int column0, int columns, float scale,
                            int first_row, int stage, int i);
    LSM_DEVICE void isolate_token(int stage, int b, int i);

    // --- the state (sweep_state.cuh)

    // Accumulator element e of tile (m, n) is row state_row(m, e), contraction channel 8 n + 2 (lane % 4) + e % 2.
    LSM_DEVICE int state_row(int m, int e) const {
        return warp * RowsPerWarp + 16 * m + lane / 4 + e / 2 * 8;
    }
    LSM_DEVICE int state_column(int n) const { return 8 * n + lane % 4 * 2; }
    LSM_DEVICE void scale_state(float const* exponents);
    LSM_DEVICE void scale_state(float exponent);
    template <class Visit>
    LSM_DEVICE void for_state(StateView const& view, Visit visit);
    LSM_DEVICE i64 state_offset(i64 owner) const;
    LSM_DEVICE void start_state();
    LSM_DEVICE float gate_at(i64 offset) const;
    LSM_DEVICE float trailing_gate(int c) const;
    LSM_DEVICE void end_state();

    // --- one block of 16 tokens (sweep_block.cuh)

    // ldmatrix addresses along a row of a wide tile: four exclusive-ors, the rest immediates.
    struct WideAddress {
        u32 row, swizzle;
        LSM_DEVICE u32 operator()(int kk) const {
            return row + ((kk % 4 * 32) ^ swizzle) + kk / 4 * 128;
        }
    };
    LSM_DEVICE WideAddress rows_first(char const* tile, int b) const {
        return {smem_u32(tile) + (b * kBlock + (lane & 15)) * WideTile::kRowBytes,
                u32((lane >> 4) ^ (lane & 7)) * 16};
    }
    LSM_DEVICE WideAddress columns_first(char const* tile, int b) const {
        return {smem_u32(tile) + (b * kBlock + (lane & 7) + (lane >> 4) * 8) * WideTile::kRowBytes,
                u32(((lane >> 3) & 1) ^ (lane & 7)) * 16};
    }
    struct Alone {
        template <class Fragment>
        LSM_DEVICE void operator()(int, Fragment&) const {}
    };
    template <class Query = Alone>
    LSM_DEVICE void relate_tokens(Stage const& tiles, int b, float (&scores)[2][4],
                                  Query query_too = {}) const;
    LSM_DEVICE void read_state(Stage const& tiles, int b, Output& o) const;
    template <class Keep>
    LSM_DEVICE void pack_scores(float const (&scores)[2][4], u32 (&packed)[2][2], Keep keep) const;
    LSM_DEVICE void pack_diagonal(float const (&scores)[2][4], u32 (&packed)[2]) const;
    LSM_DEVICE static void read_values(u32 const (&value)[4], u32 const (&packed)[2][2],
                                       float (&out)[2][4]);
    LSM_DEVICE void load_value(char const* tile, int b, int m, u32 (&value)[4]) const;
    template <class Value = Alone, class Key = Alone>
    LSM_DEVICE void write_state(Stage const& tiles, int b, Value value_too = {}, Key key_too = {});
    LSM_DEVICE void block(int stage, int b, int only, Output& o);

    // --- output

    LSM_DEVICE float factor(int b, int m, int n, int e) const;
    LSM_DEVICE void store_output(Operand const& out, int stage, int b, Output const& o);

    // --- for the gate's gradient (sweep_anchors.cuh)

    LSM_DEVICE void store_strict(int stage, int b, int m, int only, float const (&o)[2][4],
                                 float const (&local)[2][4]) const;
    LSM_DEVICE void store_strict_element(i64 at, float o, float local, float f) const;
    LSM_DEVICE i64 chunk_index(int chunk) const;
    LSM_DEVICE uint4* saved_state(u32* slots, i64 index) const;
    LSM_DEVICE void save_state(uint4* to, float const* exponents, float all) const;
    LSM_DEVICE float2 contract_rows(uint4 const* from, int m) const;
    LSM_DEVICE void contract_saved_state(uint4 const* from, float* to, int stage, Mode mode) const;
    LSM_DEVICE void contract_whole(uint4 const* from, float const* sums, float* flux, i64 owner,
                                   float exponent);
    LSM_DEVICE void save_chunk_end(int stage);
    LSM_DEVICE void save_sequence_end(int stage, int b, int only) const;
    LSM_DEVICE void save_whole_end(int stage, int b, float total);
    template <class Contract>
    LSM_DEVICE void visit_anchors(int stage, int b, Contract contract) const;
    LSM_DEVICE void note_anchors(int stage, int b, Mode mode) const;
};

template <class Config>
LSM_DEVICE void Sweep<Config>::walk_block(int stage, int b, Mode mode) {
    if (mode != kKeep) scale_state(s.frames.shift[b]);
    if constexpr (kKind == SweepKind::key_gradient) note_anchors(stage, b, mode);
    bool const whole = mode != kTokenwise;
    if constexpr (kKind == SweepKind::query_gradient) {
        if (whole) save_sequence_end(stage, b, -1);
    }
    Output o = {};
    LSM_UNROLL_BY(1)
    for (int i = 0; i < (whole ? 1 : kBlock); ++i) {
        if (!whole) {
            __syncthreads();
            isolate_token(stage, b, i);
            __syncthreads();
            scale_state(s.frames.shift[b]);
            if constexpr (kKind == SweepKind::query_gradient) save_sequence_end(stage, b, i);
        }
        block(stage, b, whole ? -1 : i, o);
    }
    if constexpr (!StateOnly) store_output(p.out, stage, b, o);
}

template <class Config>
LSM_DEVICE void Sweep<Config>::run() {
    if (stages > 0) load_stage(0);
    cp_async_commit();
    start_state();
    if constexpr (kFinished) load_skip();
    float next_gate = 0.f;
    if constexpr (kWhole) next_gate = whole_gate(0);
    LSM_UNROLL_BY(1)
    for (int stage = 0; stage < stages; ++stage) {
        cp_async_wait<0>();
        __syncthreads();  // the stage has landed, and everybody is done with the other buffer
        if (stage + 1 < stages) load_stage(stage + 1);
        cp_async_commit();
        if constexpr (kWhole) {
            float const gates = cumulative(next_gate, lane);
            next_gate = whole_gate(stage + 1);
            whole_block(stage, 0, gates);
            whole_block(stage, 1, gates);
        } else {
            accumulate_gates(stage);
            __syncthreads();
            Mode const mode0 = choose_mode(stage, 0, kKeep), mode1 = choose_mode(stage, 1, mode0);
            apply_gates(stage, mode0, mode1);
            __syncthreads();
            walk_block(stage, 0, mode0);
            walk_block(stage, 1, mode1);
        }
        if constexpr (kKind == SweepKind::query_gradient) save_chunk_end(stage);
    }
    __syncthreads();
    if constexpr (!(kOnRows && kStrict)) end_state();  // taken from a sweep with registers to spare
}

template <class Config>
LSM_DEVICE i64 Sweep<Config>::row_offset(Operand const& x, int t) const {
    return segment.batch * x.rows.batch + (t + x.next) * x.rows.time +
           head / x.heads_per_group * x.rows.head;
}

// One [kStageTokens x Columns] tile; rows outside the segment and columns past `columns` become zeros.
template <class Config>
template <int Columns, class Address>
LSM_DEVICE void Sweep<Config>::load_tile(Operand const& x, int column0, int columns, int stage,
                                         u32 destination, int element_bytes, int lag,
                                         Address address) const {
    int const per_piece = 16 / element_bytes, pieces = Columns / per_piece;
    char const* const base = static_cast<char const*>(x.rows.data);
    LSM_UNROLL_BY(2)
    for (int i = tid; i < kStageTokens * pieces; i += kThreads) {
        int const row = i / pieces, column = i % pieces * per_piece;
        int const t = token(stage * kStageTokens + row) + lag;
        bool const valid = exists(x, t) && column < columns;
        i64 const offset = valid ? row_offset(x, t) + column0 + column : 0;
        cp_async16(destination + address(row, column), base + offset * element_bytes, valid);
    }
}

// One fp32 number of every token; zeros where there is none.
template <class Config>
LSM_DEVICE void Sweep<Config>::load_number(Operand const& x, int number, int stage) const {
    int const t = token(stage * kStageTokens + lane);
    bool const valid = inside(t) && (!kNormalised || x.rows.data != nullptr);
    i64 const offset = valid ? row_offset(x, t) : 0;
    cp_async4(smem_u32(s.stage[stage % kStages].gate) + (number * kStageTokens + lane) * 4,
              static_cast<float const*>(x.rows.data) + offset, valid);
}

template <class Config>
LSM_DEVICE void Sweep<Config>::load_stage(int stage) const {
    Stage& to = s.stage[stage % kStages];
    auto const wide = [](int row, int column) { return WideTile::offset(row, column); };
    auto const tall = [](int row, int column) { return RowTile::offset(row, column); };
    int const rows = p.rows - row0;
    if constexpr (!StateOnly) {
        load_tile<Contraction>(p.query, 0, p.contraction, stage, smem_u32(to.query), 2, 0, wide);
    }
    load_tile<Contraction>(p.key, 0, p.contraction, stage, smem_u32(to.key), 2, 0, wide);
    load_tile<kRows>(p.value, row0, rows, stage, smem_u32(to.value), 2, 0, tall);
    if constexpr (kWhole) {
        if constexpr (kStrict || kFinished) {
            if (kStrict || p.probe.rows.data != nullptr)
                load_tile<kRows>(p.probe, row0, rows, stage, smem_u32(to.probe), 2, 0, tall);
        }
        if constexpr (kWeighted) {  // a warp per number
            if (warp == 0) load_number(p.weight, 0, stage);
            if constexpr (kNormalised) {
                if (warp == 1) load_number(p.reader, 1, stage);
                if (warp == 2) load_number(p.below, 2, stage);
            }
        }
    } else {
        int const gate0 = kOnRows ? row0 : 0, gates = kOnRows ? rows : p.contraction;
        int const bytes = p.gate_is_fp32 ? 4 : 2;
        load_tile<kGated>(p.gate, gate0, gates, stage, smem_u32(to.gate), bytes, gate_lag(),
                          [&](int row, int column) { return u32(row * kGated + column) * bytes; });
    }
}

// For rows with decay, in the frame: what brings element e of token tile n out of it.
template <class Config>
LSM_DEVICE float Sweep<Config>::factor(int b, int m, int n, int e) const {
    return factor_row(b * kBlock + 8 * n + lane % 4 * 2 + e % 2)[state_row(m, e)];
}

// Through a strip of shared memory private to the warp, so that global memory sees whole 16-byte pieces of rows.
template <class Config>
LSM_DEVICE void Sweep<Config>::store_output(Operand const& out, int stage, int b, Output const& o) {
    if (out.rows.data == nullptr) return;
    char* const strip = s.strip + warp * kBlock * kStripPitch;
    __syncwarp();
    LSM_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e) {
                int const row = 8 * n + lane % 4 * 2 + e % 2,
                          column = 16 * m + lane / 4 + e / 2 * 8;
                float const f = kOnRows                ? factor(b, m, n, e)
                                : kWhole && !kFinished ? p.read_scale
                                                       : 1.f;
                reinterpret_cast<bf16*>(strip + row * kStripPitch)[column] = bf16(o[m][n][e] * f);
            }
        }
    }
    __syncwarp();
    constexpr int pieces = RowsPerWarp / 8;
    LSM_UNROLL
    for (int i = lane; i < kBlock * pieces; i += 32) {
        int const row = i / pieces, column = warp * RowsPerWarp + i % pieces * 8;
        int const t = token(stage * kStageTokens + b * kBlock + row);
        if (!exists(out, t) || row0 + column >= p.rows) continue;
        bf16* const to = static_cast<bf16*>(out.rows.data) + row_offset(out, t) + row0 + column;
        store_global(reinterpret_cast<uint4*>(to),
                     *reinterpret_cast<uint4 const*>(strip + row * kStripPitch + i % pieces * 16));
    }
}

}  // namespace lsm

#include "kernels/chunk/sweep_anchors.cuh"
#include "kernels/chunk/sweep_block.cuh"
#include "kernels/chunk/sweep_frames.cuh"
#include "kernels/chunk/sweep_state.cuh"
#include "kernels/chunk/sweep_sums.cuh"
#include "kernels/chunk/sweep_whole.cuh"

namespace lsm {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor)
    sweep(SweepParams const p, Segments const segments, int tiles) {
    i64 const block = blockIdx.x;
    int const tile = static_cast<int>(block % tiles),
              head = static_cast<int>(block / tiles % p.heads);
    i64 const record = block / tiles / p.heads;
    Segment const segment = segments[record];
    if (segment.unused()) return;
    if (S::StateOnly && (p.reverse ? segment.index == 0 : segment.is_last))
        return;  // nothing starts from it
    auto& shared = *reinterpret_cast<typename S::SharedStorage*>(dyn_smem());
    if (threadIdx.x == 0) {
        shared.segment = segment;
        shared.record = record;
    }
    __syncthreads();
    S(p, shared, head, tile).run();
}

template <class S>
void run_sweep(SweepParams const& p, Segments const& segments, void* stream) {
    int const tiles = (p.rows + S::kRows - 1) / S::kRows;
    i64 const blocks = segments.count * p.heads * tiles;
    if (blocks == 0) return;
    launch(sweep<S>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads),
           sizeof(typename S::SharedStorage), stream, p, segments, tiles);
}

}  // namespace lsm
