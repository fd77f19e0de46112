// The passes of polynomial attention (passes.cuh) on tensor cores, for bf16 and up to 16 channels.
//
// A block has 64 columns of V of one value head, a warp 16 of them, and tokens go by blocks of 16. Features are products of
// fragments of q or of k with one channel of each token: what a lane needs of them it makes in registers, and they are an
// operand of the state's products as they are.
//
//     pieces   a feature                                     in outputs   in gradients
//      0..15   x_i x_j, i = piece, j of i's half of them     c2           2 c2
//     16..23   x_i x_j, i = piece - 16, j of the upper half  2 c2         2 c2, of both channels
//     24, 25   x_j                                           c1           c1
//
// p(s) being c0 + c1 s + c2 s^2. A piece is 8 features, which products of two channels of one half are in both orders, and
// those of a lower and an upper channel in one. The scale of q is not in features but a factor of sums: what is read takes
// its power, and states take it where they enter and leave.
//
// Columns (o, dv) want the state with its features along a fragment's row, rows (dq, dk) with V there, each what their
// product sums over: accumulators then are operands, rounded. So dv and dk are a pass each. Of a row's gradient
// R = read S^T, [tokens, features], is in accumulators, and its way through the features is elementwise; warps have their
// columns' share of it, which the block adds up.
//
// Between tokens of a block of 16, and for a token's own write: the polynomial, and its slope, of scores in fp32.
#pragma once

#include "kernels/polynomial/tensor_state.cuh"

namespace lsm::polynomial {

template <Pass pass>
struct Tensor : TensorState<pass> {
    using Base = TensorState<pass>;
    using Base::Base;
    using Base::kQuadratic, Base::factor_of, Base::half_of;
    using Base::kToRows, Base::kHasSums, Base::kWarps, Base::kThreads, Base::kTokens;
    using Base::p, Base::shared, Base::segment, Base::head, Base::tile, Base::steps;
    using Base::S, Base::constant, Base::Z, Base::linear, Base::count;
    using Base::taylor, Base::has_sums, Base::scale, Base::square;
    using Base::tid, Base::lane, Base::warp, Base::row, Base::pair;
    using typename Base::Stage, typename Base::Storage;
    using ValueTile = Tile<kColumns>;
    static constexpr bool kToColumns = pass == Pass::o || pass == Pass::dv;
    static constexpr bool kReads = kToRows || kToColumns;
    static constexpr int kBlock = 16;

    // --- tokens

    LSM_DEVICE Numbers const& numbers_of(int which) const {
        Side const& side = which / 2 == 0 ? p.writer : p.reader;
        return which % 2 == 0 ? side.weight : side.factor;
    }
    LSM_DEVICE void fill_numbers() {
        Numbers const& of = numbers_of(tid % 4);
        if (of.data == nullptr || (!kHasSums && tid % 2 == 0))
            for (Stage& to : shared.stage) to.numbers[tid / 4][tid % 4] = of.otherwise;
    }

    LSM_DEVICE void load_channels(Side const& side, int stage, char* to, int i) const {
        int const n = i / 2, step = stage * kTokens + n, c = i % 2 * 8;
        bool const valid = step < steps && c < p.channels;
        i64 const at = segment.batch * side.raw.batch + p.token(segment, step) * side.raw.time +
                       head / (p.HV / p.H) * side.raw.head + c;
        cp_async16(smem_u32(to) + ChannelTile::offset(n, i % 2),
                   static_cast<bf16 const*>(side.raw.data) + (valid ? at : 0), valid);
    }
    LSM_DEVICE void load_values(Side const& side, int stage, char* to) const {
        LSM_UNROLL
        for (int i = tid; i < kTokens * kColumns / 8; i += kThreads) {
            int const n = i / (kColumns / 8), c = i % (kColumns / 8) * 8,
                      step = stage * kTokens + n;
            bool const valid = step < steps && tile * kColumns + c < p.V;
            i64 const at = segment.batch * side.value.batch +
                           p.token(segment, step) * side.value.time + head * side.value.head +
                           tile * kColumns + c;
            cp_async16(smem_u32(to) + ValueTile::offset(n, c),
                       static_cast<bf16 const*>(side.value.data) + (valid ? at : 0), valid);
        }
    }
    LSM_DEVICE void load_stage(int stage) {
        Stage& to = shared.stage[stage % 2];
        constexpr int kEach = 2 * kTokens;
        static_assert(2 * kEach == kThreads && 4 * kTokens == kThreads);
        if (tid < kEach) load_channels(p.writer, stage, to.writer, tid);
        if (kReads && tid >= kEach) load_channels(p.reader, stage, to.reader, tid - kEach);
        load_values(p.writer, stage, to.value);
        if constexpr (kToRows) load_values(p.reader, stage, to.read);
        Numbers const& of = numbers_of(tid % 4);
        int const step = stage * kTokens + tid / 4;
        bool const valid = step < steps;
        i64 const at = valid ? p.number(segment.batch, p.token(segment, step), head) : 0;
        bool const wanted = kHasSums || tid % 2 != 0;  // weights are of sums
        if (wanted && of.data != nullptr)
            cp_async4(smem_u32(&to.numbers[tid / 4][tid % 4]), of.data + at, valid);
    }

    // --- a block of 16 tokens

    struct Reader {
        u32 own[4];          // rows tokens: [which 8 of them + 2 x half of the channels]
        u32 channels[2][8];  // all, of the tokens row and row + 8
    };
    struct Writer {
        u32 own[4];                  // rows channels: [2 x half of them + which 8 of the tokens]
        u32 value[4];                // rows columns: [which 8 of them + 2 x which 8 of the tokens]
        float weight[4], factor[4];  // of the tokens pair, pair + 1, pair + 8, pair + 9
    };

    LSM_DEVICE static u32 times(u32 a, u32 b) {
        __nv_bfloat162 const c = __hmul2(reinterpret_cast<__nv_bfloat162 const&>(a),
                                         reinterpret_cast<__nv_bfloat162 const&>(b));
        return reinterpret_cast<u32 const&>(c);
    }
    // Channel i of the reader's tokens, twice, and as it is.
    LSM_DEVICE static u32 twice(u32 const (&channels)[8], int i) {
        u32 const x = channels[i / 2];
        return i % 2 == 0 ? (x & 0xffffu) | x << 16 : x >> 16 | (x & 0xffff0000u);
    }
    LSM_DEVICE static float channel(u32 const (&channels)[8], int i) {
        float2 const x = unpack(channels[i / 2]);
        return i % 2 == 0 ? x.x : x.y;
    }

    LSM_DEVICE void load_reader(Stage const& from, int b, Reader& x) const {
        int const first = b * kBlock;
        ldmatrix_x4(x.own, smem_u32(from.reader) + ChannelTile::rows_first(first, lane));
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            u32 const at = ChannelTile::offset(first + row + i / 2 * 8, i % 2);
            uint4 const piece = load_shared(reinterpret_cast<uint4 const*>(from.reader + at));
            u32* const to = x.channels[i / 2] + i % 2 * 4;
            to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
        }
    }
    LSM_DEVICE void load_writer(Stage const& from, int b, Writer& x) const {
        int const first = b * kBlock;
        ldmatrix_x4_trans(x.own, smem_u32(from.writer) + ChannelTile::rows_first(first, lane));
        ldmatrix_x4_trans(x.value,
                          smem_u32(from.value) + ValueTile::columns_first(first, 16 * warp, lane));
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            float2 const numbers = load_shared(
                reinterpret_cast<float2 const*>(from.numbers[first + pair + i / 2 * 8 + i % 2]));
            x.weight[i] = numbers.x, x.factor[i] = numbers.y;
        }
    }

    // reader . writer: rows tokens that read, columns those that write.
    LSM_DEVICE void relate(Stage const& from, int b, Reader const& x, float (&scores)[2][4]) const {
        u32 writer[4];
        ldmatrix_x4(writer, smem_u32(from.writer) + ChannelTile::columns_first(b * kBlock, lane));
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) mma(scores[n], x.own, writer[2 * n], writer[2 * n + 1]);
    }
    // of(x, i, e): what becomes of a score that is there, i and e as in Writer's numbers and of accumulators. As left
    // operand.
    template <class Of>
    LSM_DEVICE void weigh(float const (&scores)[2][4], u32 (&packed)[4], Of of) const {
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            LSM_UNROLL
            for (int half = 0; half < 2; ++half) {
                float w[2];
                LSM_UNROLL
                for (int j = 0; j < 2; ++j)
                    w[j] = 8 * n + pair + j <= row + 8 * half
                               ? of(scale * scores[n][2 * half + j], 2 * n + j, 2 * half + j, n)
                               : 0.f;
                packed[2 * n + half] = pack_bf16(w[0], w[1]);
            }
        }
    }

    LSM_DEVICE static float over_quad(float x) {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }

    // The reader's channels by the sums of pairs.
    LSM_DEVICE void read_sums(Reader const& x, float (&to)[2][4]) const {
        LSM_UNROLL
        for (int n = 0; n < 2; ++n)
            mma(to[n], x.own, pack_bf16(Z[0][2 * n], Z[0][2 * n + 1]),
                pack_bf16(Z[1][2 * n], Z[1][2 * n + 1]));
    }

    LSM_DEVICE void read_columns(Reader const& x, float (&o)[2][4]) const {
        float own[2][4] = {}, cross[2][4] = {}, plain[2][4] = {};
        auto const add = [&](float(&to)[2][4], u32 const(&features)[4], int step) {
            float const(&left)[4] = S[step][0], (&right)[4] = S[step][1];
            LSM_UNROLL
            for (int n = 0; n < 2; ++n)
                mma(to[n], features, pack_bf16(left[2 * n], left[2 * n + 1]),
                    pack_bf16(right[2 * n], right[2 * n + 1]));
        };
        LSM_UNROLL
        for (int step = 0; step < kQuadratic / 2; ++step) {
            int const half = half_of(2 * step), i = factor_of(2 * step);
            u32 features[4];
            LSM_UNROLL
            for (int r = 0; r < 4; ++r)
                features[r] = times(x.own[2 * half + r % 2], twice(x.channels[r % 2], i + r / 2));
            add(step < 8 ? own : cross, features, step);
        }
        if (taylor) add(plain, x.own, kQuadratic / 2);
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const n = i / 4, e = i % 4;
            o[n][e] =
                constant[n][e] + scale * plain[n][e] + square * (0.5f * own[n][e] + cross[n][e]);
        }
    }

    LSM_DEVICE void to_columns(int stage, int b, Writer& writer) {
        Stage const& from = shared.stage[stage % 2];
        Reader x;
        load_reader(from, b, x);
        float scores[2][4] = {}, o[2][4], total[2] = {};
        read_columns(x, o);
        relate(from, b, x, scores);
        load_writer(from, b, writer);
        u32 weights[4];
        weigh(scores, weights, [&](float s, int i, int e, int) {
            float const weight = taylor ? 1.f + s + 0.5f * s * s : s * s;
            if constexpr (pass == Pass::o) total[e / 2] += weight;
            return pass == Pass::o ? weight : weight * writer.factor[i];
        });
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) mma(o[n], weights, writer.value[n], writer.value[2 + n]);
        if constexpr (pass == Pass::o) divide(stage, b, x, total, o);
        store_columns(stage, b, o);
    }

    LSM_DEVICE void divide(int stage, int b, Reader const& x, float (&total)[2], float (&o)[2][4]) {
        if (p.divides) {
            float pairs[2][4] = {};
            read_sums(x, pairs);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) {
                int const n = i / 4, e = i % 4;
                float2 const own = unpack(x.own[2 * n + e / 2]);
                total[e / 2] += (e % 2 == 0 ? own.x : own.y) *
                                (scale * linear[n][e] + 0.5f * square * pairs[n][e]);
            }
        }
        LSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            float const sum = p.divides ? over_quad(total[half]) + count : 0.f;
            int const step = stage * kTokens + b * kBlock + row + 8 * half;
            if (tile == 0 && warp == 0 && pair == 0 && step < steps)
                store_token(p.tokens, p.number(segment.batch, p.token(segment, step), head),
                            p.B * p.HV * p.T, sum);
            if (!p.divides) continue;
            float const inverse = inverse_of(sum, p.eps);
            LSM_UNROLL
            for (int i = 0; i < 4; ++i) o[i / 2][2 * half + i % 2] *= inverse;
        }
    }

    // Lanes change halves with their neighbours, so that each has four columns in a row: whole sectors.
    LSM_DEVICE void store_columns(int stage, int b, float const (&o)[2][4]) const {
        bool const odd = lane % 2 != 0;
        int const column = tile * kColumns + 16 * warp + (odd ? 8 : 0) + lane % 4 / 2 * 4;
        LSM_UNROLL
        for (int half = 0; half < 2; ++half) {
            u32 const low = pack_bf16(o[0][2 * half], o[0][2 * half + 1]),
                      high = pack_bf16(o[1][2 * half], o[1][2 * half + 1]);
            u32 const other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
            int const step = stage * kTokens + b * kBlock + row + 8 * half;
            if (step >= steps || column >= p.V) continue;
            Rows const& to = p.columns.rows;
            i64 const at = segment.batch * to.batch + p.token(segment, step) * to.time +
                           head * to.head + column;
            store_global(reinterpret_cast<uint2*>(static_cast<bf16*>(to.data) + at),
                         odd ? uint2{other, high} : uint2{low, other});
        }
    }

    // What the state has for the gradients of the reader's channels, of this warp's columns: by c1, and by 2 c2.
    LSM_DEVICE void read_rows(Reader const& x, u32 const (&read)[4], float (&plain)[2][4],
                              float (&squares)[2][4]) const {
        auto const product = [&](int piece, float(&to)[4]) {
            int const step = piece / 2, e = piece % 2 * 2;
            mma(to, read, pack_bf16(S[step][0][e], S[step][0][e + 1]),
                pack_bf16(S[step][1][e], S[step][1][e + 1]));
        };
        auto const add = [&](int piece, float const(&R)[4]) {
            LSM_UNROLL
            for (int e = 0; e < 4; ++e)
                squares[half_of(piece)][e] += channel(x.channels[e / 2], factor_of(piece)) * R[e];
        };
        float lower[2][8];  // of channels below 8, from those above
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            float R[4] = {};
            product(16 + i, R);
            add(16 + i, R);
            LSM_UNROLL
            for (int r = 0; r < 2; ++r) {
                float2 const upper = unpack(x.own[2 + r]);
                lower[r][i] = upper.x * R[2 * r] + upper.y * R[2 * r + 1];
            }
        }
        LSM_UNROLL
        for (int r = 0; r < 2; ++r) {
            recurrence::scatter_sums<2, 1, 8>(lower[r], lane);
            squares[0][2 * r] += lower[r][0];
            squares[0][2 * r + 1] += lower[r][1];
        }
        LSM_UNROLL
        for (int piece = 0; piece < 16; ++piece) {
            float R[4] = {};
            product(piece, R);
            add(piece, R);
        }
        LSM_UNROLL
        for (int half = 0; half < 2; ++half)
            if (taylor) product(kQuadratic + half, plain[half]);
    }

    LSM_DEVICE void to_rows(int stage, int b, Writer& writer) {
        Stage const& from = shared.stage[stage % 2];
        Reader x;
        load_reader(from, b, x);
        int const first = b * kBlock;
        u32 read[4], value[4], slopes[4];
        ldmatrix_x4(read, smem_u32(from.read) + ValueTile::rows_first(first, 16 * warp, lane));
        float plain[2][4] = {}, squares[2][4] = {}, rows[2][4];
        read_rows(x, read, plain, squares);
        float weight[2], factor[2];  // of the reader's tokens row, row + 8
        LSM_UNROLL
        for (int r = 0; r < 2; ++r) {
            float2 const own =
                load_shared(reinterpret_cast<float2 const*>(from.numbers[first + row + 8 * r] + 2));
            weight[r] = own.x, factor[r] = own.y;
        }
        LSM_UNROLL
        for (int i = 0; i < 8; ++i) {
            int const n = i / 4, e = i % 4;
            rows[n][e] = factor[e / 2] * (scale * plain[n][e] + square * squares[n][e]);
        }
        if (has_sums) {
            float pairs[2][4] = {};
            read_sums(x, pairs);
            LSM_UNROLL
            for (int i = 0; i < 8; ++i) {
                int const n = i / 4, e = i % 4;
                rows[n][e] += weight[e / 2] * (scale * linear[n][e] + square * pairs[n][e]);
            }
        }
        float scores[2][4] = {}, values[2][4] = {};
        relate(from, b, x, scores);
        ldmatrix_x4(value, smem_u32(from.value) + ValueTile::columns_first(first, 16 * warp, lane));
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) mma(values[n], read, value[2 * n], value[2 * n + 1]);
        load_writer(from, b, writer);
        weigh(scores, slopes, [&](float s, int i, int e, int n) {
            float all = values[n][e] * factor[e / 2] * writer.factor[i];
            if (has_sums) all += weight[e / 2] * writer.weight[i];
            return scale * (taylor ? 1.f + s : 2.f * s) * all;
        });
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) mma(rows[n], slopes, writer.own[2 * n], writer.own[2 * n + 1]);
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            int const n = i / 2, r = i % 2, t = first + row + 8 * r;
            store_shared(reinterpret_cast<float2*>(
                             &shared.rows[stage % 2][warp][t][Storage::at(t, 8 * n + pair)]),
                         float2{rows[n][2 * r], rows[n][2 * r + 1]});
        }
    }

    // Four channels of a token, of all warps.
    LSM_DEVICE void store_rows(int stage) const {
        int const n = tid / 4, c = tid % 4 * 4, step = stage * kTokens + n;
        float sum[4] = {};
        LSM_UNROLL
        for (int w = 0; w < kWarps; ++w) {
            float4 const x = load_shared(
                reinterpret_cast<float4 const*>(&shared.rows[stage % 2][w][n][Storage::at(n, c)]));
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
        if (step >= steps || c >= p.channels) return;
        i64 const t = p.token(segment, step);
        if (p.rows.shares != nullptr) {
            i64 const all = p.B * p.T * p.HV;
            float* const to =
                p.rows.shares + (tile * all + p.row(segment.batch, t, head)) * p.channels + c;
            return recurrence::store4_global(to, sum);
        }
        Rows const& to = p.rows.rows;
        i64 const at = segment.batch * to.batch + t * to.time + head * to.head + c;
        if (p.rows.type == Dtype::bf16) {
            recurrence::store4_global(static_cast<bf16*>(to.data) + at, sum);
        } else {
            recurrence::store4_global(static_cast<float*>(to.data) + at, sum);
        }
    }

    // Numbers of two tokens each, as the left operand whose rows are all the same.
    LSM_DEVICE static void same_rows(float const (&x)[4], u32 (&to)[4]) {
        to[0] = to[1] = pack_bf16(x[0], x[1]);
        to[2] = to[3] = pack_bf16(x[2], x[3]);
    }

    LSM_DEVICE void write_sums(int stage, int b, Writer const& x) {
        float sum = 0.f;
        LSM_UNROLL
        for (int i = 0; i < 4; ++i) {
            int const step = stage * kTokens + b * kBlock + pair + i / 2 * 8 + i % 2;
            if (taylor && step < steps) sum += x.weight[i];
        }
        count += over_quad(sum);
        u32 weights[4];
        same_rows(x.weight, weights);
        u32 const weighed[4] = {times(x.own[0], weights[0]), times(x.own[2], weights[0]),
                                times(x.own[1], weights[2]), times(x.own[3], weights[2])};
        LSM_UNROLL
        for (int n = 0; n < 2; ++n) {
            mma(Z[n], weighed, x.own[2 * n], x.own[2 * n + 1]);
            if (taylor) mma(linear[n], weights, x.own[2 * n], x.own[2 * n + 1]);
        }
    }

    LSM_DEVICE void write(Writer const& x) {
        u32 value[4];
        LSM_UNROLL
        for (int r = 0; r < 4; ++r) {
            value[r] = x.value[r];
            if (p.writer.factor.data == nullptr) continue;
            float2 const two = unpack(value[r]);
            value[r] = pack_bf16(two.x * x.factor[r / 2 * 2], two.y * x.factor[r / 2 * 2 + 1]);
        }
        auto const add = [&](int step, u32 const(&features)[2][2]) {  // [piece][8 of the tokens]
            u32 const left[4] = {features[0][0], features[1][0], features[0][1], features[1][1]};
            LSM_UNROLL
            for (int n = 0; n < 2; ++n) {
                if constexpr (kToRows) {
                    mma(S[step][n], left, value[n], value[2 + n]);
                } else {
                    mma(S[step][n], value, features[n][0], features[n][1]);
                }
            }
        };
        LSM_UNROLL
        for (int i = 0; i < kTensorChannels; i += 2) {
            u32 by[2][2];  // channels i and i + 1 of the writer's tokens
            LSM_UNROLL
            for (int r = 0; r < 4; ++r)
                by[r / 2][r % 2] = __shfl_sync(0xffffffffu, x.own[i / 8 * 2 + r % 2],
                                               (i % 8 + r / 2) * 4 + lane % 4);
            LSM_UNROLL
            for (int piece = i; piece < kQuadratic; piece += 16) {
                int const half = half_of(piece);
                u32 features[2][2];
                LSM_UNROLL
                for (int r = 0; r < 4; ++r)
                    features[r / 2][r % 2] = times(x.own[2 * half + r % 2], by[r / 2][r % 2]);
                add(piece / 2, features);
            }
        }
        if (taylor) {
            u32 const plain[2][2] = {{x.own[0], x.own[1]}, {x.own[2], x.own[3]}};
            add(kQuadratic / 2, plain);
        }
        if constexpr (!kToRows) {
            u32 ones[4];
            same_rows({1.f, 1.f, 1.f, 1.f}, ones);
            LSM_UNROLL
            for (int n = 0; n < 2; ++n)
                if (taylor) mma(constant[n], ones, value[n], value[2 + n]);
        }
    }

    LSM_DEVICE void block(int stage, int b) {
        Writer writer;
        if constexpr (!kReads) load_writer(shared.stage[stage % 2], b, writer);
        if constexpr (kToColumns) to_columns(stage, b, writer);
        if constexpr (kToRows) to_rows(stage, b, writer);
        write(writer);
        if (has_sums) write_sums(stage, b, writer);
    }

    LSM_DEVICE void run() {
        int const stages = (steps + kTokens - 1) / kTokens;
        fill_numbers();
        Base::fill_entries();
        if (stages > 0) load_stage(0);
        cp_async_commit();
        __syncthreads();
        Base::start();
        LSM_UNROLL_BY(1)
        for (int stage = 0; stage < stages; ++stage) {
            cp_async_wait<0>();
            __syncthreads();  // the stage has landed, and everybody is done with the one before
            if (stage + 1 < stages) load_stage(stage + 1);
            cp_async_commit();
            if constexpr (kToRows) {
                if (stage > 0) store_rows(stage - 1);
            }
            LSM_UNROLL_BY(1)
            for (int b = 0; b < kTokens / kBlock; ++b) block(stage, b);
        }
        cp_async_wait<0>();
        if constexpr (kToRows) {
            __syncthreads();
            if (stages > 0) store_rows(stages - 1);
        }
        Base::end();
    }
};

template <Pass pass>
__global__ void __launch_bounds__(Tensor<pass>::kThreads, kTensorBlocks)
    tensor(PassParams const p, Segments const segments) {
    i64 const unit = blockIdx.x / static_cast<unsigned>(p.tiles);
    Segment const segment = segments[unit / p.HV];
    if (segment.unused()) return;
    if (pass == Pass::state && (p.is_last(segment) || segment.poison)) return;
    auto& shared = *reinterpret_cast<TensorShared<pass>*>(dyn_smem());
    if (threadIdx.x == 0) shared.segment = segment;
    __syncthreads();
    Tensor<pass>(p, shared, unit, static_cast<int>(blockIdx.x) % p.tiles).run();
}

}  // namespace lsm::polynomial
