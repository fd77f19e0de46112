// The passes of polynomial attention (passes.cuh) in fp32, for any type and any number of channels and columns.
//
// A block has up to F features and 64 columns of V, a thread 8 by 4 of them: 16 threads lie along V. More features than a
// block has, or columns, are slices and tiles of the state in blocks of their own; what they have in one result is added
// up by sum_shares, in their order. Stages of 8 tokens go through shared memory.
#pragma once

#include "kernels/polynomial/passes.cuh"
#include "kernels/recurrence/common.cuh"

namespace lsm::polynomial {

using recurrence::load4;
using recurrence::scatter_sums;

constexpr int kTokens = 8;  // per stage

// F: features that a block has room for; two threads for each.
template <int F>
struct Shared {
    static constexpr int kWarps = F / 16;
    alignas(16) float write[kTokens][F], read[kTokens][F], rows[kTokens][F];
    alignas(16) float columns[kTokens][kWarps][kColumns];  // a share per warp
    float total[kTokens][kWarps];
    // Of even and odd stages: p(s), and p'(s) times what is read of the token's own value.
    float2 own[2][kTokens];
    Segment segment;  // a dozen registers less in the loop
    // Two stages of tokens as they come, each [kTokens, pitch]: value, read value, their numbers, factors of both sides.
    alignas(16) float stage[1];

    static constexpr int kRead = kColumns, kNumbers = 2 * kColumns, kFactors = kNumbers + 4;
    static constexpr int pitch(int n) { return (kFactors + 2 * n + 3) / 4 * 4; }
    static constexpr size_t bytes(int n) {
        return sizeof(Shared) + sizeof(float) * 2 * kTokens * static_cast<size_t>(pitch(n));
    }
};

template <int F, Pass pass>
struct Walk {
    static constexpr bool kToColumns = pass == Pass::o || pass == Pass::dkv;
    static constexpr bool kToRows = pass == Pass::dq || pass == Pass::dkv;
    static constexpr bool kReads = kToColumns || kToRows;
    static constexpr int kThreads = 2 * F;
    // Numbers of the next stage that a thread has on their way while it computes: all, unless channels are many.
    static constexpr int kAhead = F == 64    ? (kToRows ? 10 : 6)
                                  : F == 160 ? (kToRows ? 4 : 3)
                                             : (kToRows ? 3 : 2);
    using Storage = Shared<F>;

    PassParams const& p;
    Storage& shared;
    Segment const& segment;
    i64 record;
    int head, slice, tile, steps;
    int const tid = threadIdx.x, lane = tid % 32;
    int const row0 = tid / 16 * 8, column0 = tid % 16 * 4;  // first of this thread's
    int const own_row = row0 + tid % 16 / 2;                // whose z it has, as its neighbour
    Pair const pair;                                        // that it makes, of one of the sides
    float S[8][4], z = 0.f;

    LSM_DEVICE Walk(PassParams const& params, Storage& storage, i64 unit)
        : p(params),
          shared(storage),
          segment(storage.segment),
          record(unit / p.HV),
          head(static_cast<int>(unit % p.HV)),
          slice(static_cast<int>(blockIdx.x) / p.tiles % p.slices),
          tile(static_cast<int>(blockIdx.x) % p.tiles),
          steps(static_cast<int>(segment.t1 - segment.t0)),
          pair(p.basis, tid % F < p.width ? slice * p.width + tid % F : p.basis.pairs) {}

    LSM_DEVICE i64 token(int step) const { return p.token(segment, step); }
    LSM_DEVICE float* row_of(int stage, int n) const {
        return shared.stage + (stage % 2 * kTokens + n) * Storage::pitch(p.basis.n);
    }
    LSM_DEVICE float* factors(int stage, int n, bool reading) const {
        return row_of(stage, n) + Storage::kFactors + (reading ? p.basis.n : 0);
    }

    // --- the state

    LSM_DEVICE i64 owner(StatePair const& state) const {
        return state.owner(segment, record) * p.HV + head;
    }
    // Each four columns of S that are there: four(row, at) where they are one piece of 16 bytes, else one(number, at).
    template <class Four, class One>
    LSM_DEVICE void for_state(float* data, i64 first, Four four, One one) {
        bool const pieces = p.V % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
        int const column = tile * kColumns + column0;
        float* at = data + first + i64(slice * p.width + row0) * p.V + column;
        LSM_UNROLL
        for (int r = 0; r < 8; ++r, at += p.V) {
            if (row0 + r >= p.width || column >= p.V) continue;
            if (pieces) {
                four(S[r], reinterpret_cast<float4*>(at));
            } else {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j)
                    if (column + j < p.V) one(S[r][j], at + j);
            }
        }
    }

    LSM_DEVICE void start() {
        float const fill = segment.poison ? nan_value() : 0.f;
        LSM_UNROLL
        for (int i = 0; i < 32; ++i) S[i / 4][i % 4] = fill;
        z = fill;
        if (segment.poison) return;
        i64 const size = i64(p.slices) * p.width;
        if (p.start.S != nullptr) {
            for_state(
                p.start.S, owner(p.start) * size * p.V,
                [](float(&x)[4], float4* at) {
                    float4 const four = load_global(at);
                    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
                },
                [](float& x, float* at) { x = load_global(at); });
        }
        if (p.start.z != nullptr && own_row < p.width)
            z = load_global(p.start.z + owner(p.start) * size + slice * p.width + own_row);
    }

    LSM_DEVICE void end() {
        if (!p.ends_with(segment)) return;
        i64 const size = i64(p.slices) * p.width;
        if (p.end.S != nullptr) {
            for_state(
                p.end.S, owner(p.end) * size * p.V,
                [](float(&x)[4], float4* at) { store_global(at, float4{x[0], x[1], x[2], x[3]}); },
                [](float x, float* at) { store_global(at, x); });
        }
        if (p.end.z != nullptr && tile == 0 && tid % 2 == 0 && own_row < p.width)
            store_global(p.end.z + owner(p.end) * size + slice * p.width + own_row, z);
    }

    // --- tokens

    // The i-th number of a stage: values, of both sides only where rows are wanted, then channels.
    struct Place {
        int n, at, c;  // token of the stage, where in its row, channel or column
        bool reading, is_value;
    };
    LSM_DEVICE int values() const { return kToRows ? 2 * kColumns : kColumns; }
    LSM_DEVICE int per_token() const { return values() + 2 * p.channels; }
    LSM_DEVICE Place place(int i) const {
        Place x;
        x.n = i / per_token();
        x.c = i % per_token();
        x.is_value = x.c < values();
        if (!x.is_value) x.c -= values();
        int const columns = x.is_value ? kColumns : p.channels;
        x.reading = x.c >= columns;
        if (x.reading) x.c -= columns;
        int const first = x.is_value ? 0 : Storage::kFactors + p.basis.constants;
        x.at = first + x.c + (x.reading ? (x.is_value ? kColumns : p.basis.n) : 0);
        return x;
    }

    LSM_DEVICE float number(int stage, Place const& x) const {
        int const step = stage * kTokens + x.n;
        if (step >= steps || (!kReads && x.reading)) return 0.f;
        i64 const t = token(step);
        Side const& side = x.reading ? p.reader : p.writer;
        auto const load = [&](Rows const& rows, int own_head, int c) {
            i64 const at = segment.batch * rows.batch + t * rows.time + own_head * rows.head + c;
            return load_number(rows.data, at, p.type);
        };
        if (!x.is_value) return side.scale * load(side.raw, head / (p.HV / p.H), x.c);
        int const c = tile * kColumns + x.c;
        if (c >= p.V) return 0.f;
        return load(side.value, head, c);
    }

    // The next stage's numbers: begun before a stage is computed, put down after it.
    struct Ahead {
        float x[kAhead];
        float2 numbers;  // of one side of one token: weight, factor
    };
    LSM_DEVICE void begin_stage(int stage, Ahead& ahead) const {
        LSM_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            int const at = tid + i * kThreads;
            ahead.x[i] = at < kTokens * per_token() ? number(stage, place(at)) : 0.f;
        }
        LSM_UNROLL_BY(4)
        for (int at = tid + kAhead * kThreads; at < kTokens * per_token(); at += kThreads) {
            Place const x = place(at);
            row_of(stage, x.n)[x.at] = number(stage, x);
        }
        int const step = stage * kTokens + tid / 2;
        ahead.numbers = {0.f, 0.f};
        if (tid >= 2 * kTokens || step >= steps) return;
        Side const& side = tid % 2 == 0 ? p.writer : p.reader;
        i64 const at = p.number(segment.batch, token(step), head);
        ahead.numbers = {side.weight.at(at), side.factor.at(at)};
    }
    LSM_DEVICE void end_stage(int stage, Ahead const& ahead) const {
        LSM_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            int const at = tid + i * kThreads;
            if (at >= kTokens * per_token()) break;
            Place const x = place(at);
            row_of(stage, x.n)[x.at] = ahead.x[i];
        }
        if (tid < 2 * kTokens)
            *reinterpret_cast<float2*>(row_of(stage, tid / 2) + Storage::kNumbers + tid % 2 * 2) =
                ahead.numbers;
    }

    LSM_DEVICE void make_features(int stage) {
        bool const reading = tid >= F;
        if (reading && !kToColumns) return;
        auto& to = reading ? shared.read : shared.write;
        LSM_UNROLL
        for (int n = 0; n < kTokens; ++n) to[n][tid % F] = pair.of(factors(stage, n, reading));
    }

    // What tokens have of their own write, a warp each at a time.
    LSM_DEVICE void relate_own(int stage) {
        if (slice != 0 || !kReads) return;
        LSM_UNROLL_BY(1)
        for (int n = tid / 32; n < kTokens; n += Storage::kWarps) {
            float const* const row = row_of(stage, n);
            float const *const x = factors(stage, n, true), *const y = factors(stage, n, false);
            float s = 0.f, read = 0.f;
            for (int c = p.basis.constants + lane; c < p.basis.n; c += 32) s += x[c] * y[c];
            if constexpr (kToRows) {
                for (int c = lane; c < kColumns; c += 32) read += row[c] * row[Storage::kRead + c];
            }
            LSM_UNROLL
            for (int distance = 16; distance > 0; distance /= 2) {
                s += __shfl_xor_sync(0xffffffffu, s, distance);
                read += __shfl_xor_sync(0xffffffffu, read, distance);
            }
            float const* const numbers = row + Storage::kNumbers;
            read *= numbers[1] * numbers[3];
            if (tile == 0) read += numbers[0] * numbers[2];
            bool const taylor = p.basis.constants != 0;
            float const weight = taylor ? 1.f + s + 0.5f * s * s : s * s;
            float const slope = taylor ? 1.f + s : 2.f * s;
            if (lane == 0) shared.own[stage % 2][n] = {weight, slope * read};
        }
    }

    // --- a token

    LSM_DEVICE static void load_eight(float const* from, float (&x)[8]) {
        LSM_UNROLL
        for (int i = 0; i < 8; i += 4) {
            float four[4];
            load4(from + i, four);
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) x[i + j] = four[j];
        }
    }

    LSM_DEVICE void step(int stage, int n) {
        float const* const row = row_of(stage, n);
        float numbers[4];  // weight and factor of what is written; of what reads
        load4(row + Storage::kNumbers, numbers);
        if constexpr (kToColumns) {
            float query[8], sums[4] = {};
            load_eight(&shared.read[n][row0], query);
            LSM_UNROLL
            for (int i = 0; i < 32; ++i) sums[i % 4] += query[i / 4] * S[i / 4][i % 4];
            scatter_sums<16, 16, 4>(sums, lane);  // the upper half of the warp keeps the last two
            *reinterpret_cast<float2*>(&shared.columns[n][tid / 32][column0 + lane / 16 * 2]) =
                float2{sums[0], sums[1]};
            if constexpr (pass == Pass::o) {
                float total = tid % 2 == 0 ? shared.read[n][own_row] * z : 0.f;  // not twice
                LSM_UNROLL
                for (int distance = 16; distance > 0; distance /= 2)
                    total += __shfl_xor_sync(0xffffffffu, total, distance);
                if (lane == 0) shared.total[n][tid / 32] = total;
            }
        }
        if constexpr (kToRows) {
            float read[4], x[8];
            load4(row + Storage::kRead + column0, read);
            LSM_UNROLL
            for (int r = 0; r < 8; ++r) {
                x[r] = 0.f;
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) x[r] += S[r][j] * read[j];
            }
            scatter_sums<8, 1, 8>(x, lane);
            if constexpr (pass == Pass::dq) x[0] *= numbers[3];
            if (tile == 0) x[0] += z * numbers[2];
            if (tid % 2 == 0) shared.rows[n][own_row] = x[0];
        }
        float key[8], value[4];
        load_eight(&shared.write[n][row0], key);
        load4(row + column0, value);
        if constexpr (pass == Pass::dkv || pass == Pass::state) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) value[j] *= numbers[1];
        }
        LSM_UNROLL
        for (int i = 0; i < 32; ++i) S[i / 4][i % 4] += key[i / 4] * value[i % 4];
        z += shared.write[n][own_row] * numbers[0];
    }

    LSM_DEVICE void compute(int stage) {
        LSM_UNROLL_BY(1)
        for (int n = 0; n < kTokens; ++n) step(stage, n);
    }

    // --- results

    LSM_DEVICE void put(Result const& to, int share, i64 t, int c, int columns, float x) const {
        if (to.shares != nullptr) {
            i64 const rows = p.B * p.T * p.HV, row = p.row(segment.batch, t, head);
            return store_global(to.shares + (share * rows + row) * columns + c, x);
        }
        Rows const& rows = to.rows;
        i64 const at = segment.batch * rows.batch + t * rows.time + head * rows.head + c;
        store_number(rows.data, at, to.type, x);
    }

    LSM_DEVICE void store_columns(int stage) {
        LSM_UNROLL_BY(1)
        for (int i = tid; i < kTokens * kColumns; i += kThreads) {
            int const n = i / kColumns, c = i % kColumns, own_step = stage * kTokens + n;
            if (own_step >= steps) break;
            float sum = 0.f, total = 0.f;
            LSM_UNROLL_BY(2)
            for (int w = 0; w < Storage::kWarps; ++w) {
                sum += shared.columns[n][w][c];
                if constexpr (pass == Pass::o) total += shared.total[n][w];
            }
            i64 const t = token(own_step);
            if (slice == 0) {
                float const weight = shared.own[stage % 2][n].x;
                float const* const row = row_of(stage, n);
                sum += weight * row[Storage::kNumbers + 1] * row[c];
                total += weight * row[Storage::kNumbers];
            }
            if constexpr (pass == Pass::o) {
                bool const first = tile == 0 && c == 0;
                if (!p.divides) total = 0.f;
                if (p.totals != nullptr) {
                    i64 const rows = p.B * p.T * p.HV;
                    if (first)
                        store_global(p.totals + slice * rows + p.row(segment.batch, t, head),
                                     total);
                } else {
                    if (first)
                        store_token(p.tokens, p.number(segment.batch, t, head), p.B * p.HV * p.T,
                                    total);
                    if (p.divides) sum *= inverse_of(total, p.eps);
                }
            }
            if (tile * kColumns + c < p.V) put(p.columns, slice, t, tile * kColumns + c, p.V, sum);
        }
    }

    // Through the features of this slice that a channel is in.
    LSM_DEVICE float through(float const* x, float const* gradient, int channel) const {
        int const own = channel + p.basis.constants, first = slice * p.width;
        float sum = 0.f;
        LSM_UNROLL_BY(2)
        for (int other = 0; other < p.basis.n; ++other) {
            int const low = own < other ? own : other, high = own < other ? other : own;
            int const feature = p.basis.feature(low, high) - first;
            if (feature < 0 || feature >= p.width) continue;
            float const weight = p.basis.weight(low, high) * (own == other ? 2.f : 1.f);
            sum += weight * x[other] * gradient[feature];
        }
        return sum;
    }

    LSM_DEVICE void store_rows(int stage) {
        LSM_UNROLL_BY(1)
        for (int i = tid; i < kTokens * p.channels; i += kThreads) {
            int const n = i / p.channels, c = i % p.channels, own_step = stage * kTokens + n;
            if (own_step >= steps) break;
            float x = through(factors(stage, n, true), shared.rows[n], c);
            if (slice == 0)
                x += shared.own[stage % 2][n].y * factors(stage, n, false)[p.basis.constants + c];
            put(p.rows, tile * p.slices + slice, token(own_step), c, p.channels,
                p.reader.scale * x);
        }
    }

    LSM_DEVICE void store(int stage) {
        if constexpr (kToColumns) store_columns(stage);
        if constexpr (kToRows) store_rows(stage);
    }

    LSM_DEVICE void run() {
        start();
        int const stages = (steps + kTokens - 1) / kTokens;
        if (p.basis.constants != 0 && tid < 4 * kTokens)
            factors(tid / 2 / kTokens, tid / 2 % kTokens, tid % 2 != 0)[0] = 1.f;
        Ahead ahead;
        if (stages > 0) {
            begin_stage(0, ahead);
            end_stage(0, ahead);
        }
        LSM_UNROLL_BY(1)
        for (int stage = 0; stage < stages; ++stage) {
            __syncthreads();  // its rows are there, and the sums of the stage before
            if (stage > 0) store(stage - 1);
            make_features(stage);
            relate_own(stage);
            __syncthreads();  // its features are there, and nobody is busy with the stage before
            bool const more = stage + 1 < stages;
            if (more) begin_stage(stage + 1, ahead);
            compute(stage);
            if (more) end_stage(stage + 1, ahead);
        }
        __syncthreads();
        if (stages > 0) store(stages - 1);
        end();
    }
};

template <int F, Pass pass>
__global__ void __launch_bounds__(2 * F, F == 256   ? 1
                                         : F == 160 ? 2
                                                    : 3)
    walk(PassParams const p, Segments const segments) {
    i64 const unit = blockIdx.x / static_cast<unsigned>(p.tiles * p.slices);
    Segment const segment = segments[unit / p.HV];
    if (segment.unused()) return;
    if (pass == Pass::state && (p.is_last(segment) || segment.poison)) return;
    auto& shared = *reinterpret_cast<Shared<F>*>(dyn_smem());
    if (threadIdx.x == 0) shared.segment = segment;
    __syncthreads();
    Walk<F, pass>(p, shared, unit).run();
}

template <int F, Pass pass>
void run_walk(PassParams const& p, Segments const& segments, void* stream) {
    i64 const blocks = segments.count * p.HV * p.slices * p.tiles;
    if (blocks == 0) return;
    launch(walk<F, pass>, dim3(static_cast<unsigned>(blocks)), dim3(2 * F),
           Shared<F>::bytes(p.basis.n), stream, p, segments);
}

}  // namespace lsm::polynomial
