// dk and dv on tensor cores: the same the other way round. A warp has 16 keys of a tile and goes with the others through
// the queries that have them on their lists, head by head, so a group's query heads are added up in registers.
#pragma once

#include "kernels/sparse_attn/tensor_rows.cuh"

namespace lsm::sparse_attn {

// Of rows and columns as RowsConfig.
template <class T_, int D_, int N_, Want Wants_, int DV_ = D_>
struct KeysConfig {
    using T = T_;
    static constexpr int D = D_, DV = DV_, N = N_, Split = D > 256 ? 2 : 1;
    static constexpr Want Wants = Wants_;
    static constexpr int Warps = 4, kThreads = 32 * Warps, kRows = 16 * Warps / Split;
};

template <class Config>
struct KeysKernel {
    using T = typename Config::T;
    static constexpr int D = Config::D, DV = Config::DV, N = Config::N, kRows = Config::kRows;
    static constexpr int kThreads = Config::kThreads, Split = Config::Split;
    static constexpr int KSums = columns_each(D, Split), VSums = columns_each(DV, Split);
    static constexpr bool kKeys = Config::Wants != Want::values,
                          kValues = Config::Wants != Want::keys;

    using Keys = Matrix<kRows, D>;
    using Values = Matrix<kRows, DV>;
    using Queries = Matrix<N, D>;
    using Grads = Matrix<N, DV>;

    struct Stage {
        alignas(1024) char q[Queries::kBytes];
        alignas(1024) char grad_o[Grads::kBytes];
        float4 stats[N];
        Row rows[N];
        float bias[kThreads / 32][N];  // of each warp's block, in units of log2
    };
    // What the loop over queries does not touch lies in shared memory: it has no registers to spare.
    struct SharedStorage {
        alignas(1024) char keys[Keys::kBytes];  // in the end dk
        alignas(1024) char values[Values::kBytes];
        Stage stage[2];
        Plan plan;
        KeyTile tile;
        int head, left;  // whose queries it is, and how far they look back
        Head bent;
        Blocks blocks;        // of queries; with lists, how many
        int2 const* entries;  // and where
        i64 first_row;        // of the sequence's lists for this head
    };

    Work const& work;
    SparseAttnParams const& p;
    SharedStorage& s;
    Mask const& mask;
    Steps const steps;
    float dk[1][kKeys ? KSums / 8 : 1][4];
    float dv[1][kValues ? VSums / 8 : 1][4];

    LSM_DEVICE explicit KeysKernel(Work const& work_)
        : work(work_),
          p(work_.p),
          s(*reinterpret_cast<SharedStorage*>(dyn_smem())),
          mask(work_.mask),
          steps(work_.block_q, N) {
        KeyTile const tile = locate_keys(work, kRows);
        if (threadIdx.x == 0) s.tile = tile;
        __syncthreads();
    }

    LSM_DEVICE static int lane() { return threadIdx.x % 32; }
    LSM_DEVICE static int warp() { return threadIdx.x / 32; }
    LSM_DEVICE static int strip() { return warp() / Split; }
    LSM_DEVICE static int part() { return warp() % Split; }  // of the strip's columns
    LSM_DEVICE int width_k() const { return static_cast<int>(p.K); }
    LSM_DEVICE int width_v() const { return static_cast<int>(p.V); }
    // Of this warp: which of a section's blocks it is in, where its first key is.
    LSM_DEVICE int member() const {
        int first = 16 * strip();  // in its section
        if constexpr (kRows < 64) first += s.tile.place.token & (work.inverse.section_k - 1);
        return work.lists ? first / work.block_k : 0;
    }
    LSM_DEVICE int position() const { return mask.key(s.tile.place.token + 16 * strip()); }
    LSM_DEVICE T* row_of(Rows const& x, int r) const {
        int const key = s.tile.place.token + r;
        return key < s.tile.place.sequence.Tk
                   ? element<T>(x, s.tile.batch, s.tile.place.sequence.k0 + key, s.tile.key_head)
                   : nullptr;
    }

    LSM_DEVICE void poison() {
        u32 const nans = pack_as<T>(nan_value(), nan_value());
        for (i64 key = s.tile.place.token + warp();
             key < min(p.Tk, static_cast<i64>(s.tile.place.token + kRows)); key += Config::Warps) {
            if constexpr (kKeys)
                for (int c = 2 * lane(); c < width_k(); c += 64)
                    store_global(reinterpret_cast<u32*>(
                                     element<T>(p.dk, s.tile.batch, key, s.tile.key_head) + c),
                                 nans);
            if constexpr (kValues)
                for (int c = 2 * lane(); c < width_v(); c += 64)
                    store_global(reinterpret_cast<u32*>(
                                     element<T>(p.dv, s.tile.batch, key, s.tile.key_head) + c),
                                 nans);
        }
    }

    LSM_DEVICE int shift() const {
        return mask.shift(s.tile.place.sequence.Tq, s.tile.place.sequence.Tk);
    }
    LSM_DEVICE int last() const { return mask.key(s.tile.place.sequence.Tk - 1); }

    LSM_DEVICE void load(int step) {
        Sequence const& sequence = s.tile.place.sequence;
        Stage& to = s.stage[step % 2];
        auto const token = [&](int column) {
            int const t = steps.token(s.plan, step, column);
            return t < 0 || t >= sequence.Tq ? -1 : t;
        };
        auto const at = [&](Rows const& x) {
            T const* const base = element<T>(x, s.tile.batch, sequence.q0, s.head);
            return [&, base](int column) -> T const* {
                int const t = token(column);
                return t < 0 ? nullptr : base + t * x.time;
            };
        };
        load_tile_rows<T, D, N, kThreads>(p.q, to.q, width_k(), at(p.q));
        load_tile_rows<T, DV, N, kThreads>(p.grad_o, to.grad_o, width_v(), at(p.grad_o));
        if (threadIdx.x < N) {
            int const t = token(threadIdx.x);
            to.rows[threadIdx.x] =
                t < 0 ? Row{0, -kFar, 0, 0} : mask.row(t + shift(), s.left, last());
            if (t < 0) {
                to.stats[threadIdx.x] = {-kOddLse / 2, 0.f, 0.f, 0.f};  // weighs nothing
            } else {
                cp_async16(smem_u32(&to.stats[threadIdx.x]),
                           work.stats + per_head(work, s.tile.batch, sequence.q0 + t, s.head),
                           true);
            }
        }
        if (!work.plain) load_bias(step);
        cp_async_commit();
    }

    LSM_DEVICE void load_bias(int step) {
        static_assert(N <= 32);
        if (lane() >= N) return;
        Unit const unit = steps.unit(s.plan, step, lane());
        float bias = 0.f;
        if (p.lists.bias != nullptr && unit.first >= 0 && has(unit.tag)) {
            i64 const row = s.first_row + (unit.first >> (31 - __clz(work.block_q)));
            i64 const entry = p.lists.row_ptr == nullptr ? row * p.lists.capacity
                                                         : load_global(p.lists.row_ptr + row);
            bias = work.bias(entry + unit.tag / 16 + __popc(unit.tag & ((1 << member()) - 1)));
        }
        s.stage[step % 2].bias[warp()][lane()] = bias * kLog2e;
    }

    LSM_DEVICE bool has(int tag) const { return (tag >> member() & 1) != 0; }

    LSM_DEVICE bool skips(int step) const {
        int const x0 = position(), x1 = x0 + 15 * mask.key_stride;
        for (int c = 0; c < steps.each; ++c) {
            Unit const unit = s.plan.at(step * steps.each + c);
            if (unit.first < 0 || !has(unit.tag)) continue;
            int const p0 = unit.first + shift();
            int const p1 = min(unit.first + steps.size(), s.tile.place.sequence.Tq) - 1 + shift();
            if (mask.kind(mask.bounds(p0, p1, s.left, s.left, last()), x0, x1) != Kind::skip)
                return false;
        }
        return true;
    }

    template <bool kBent, bool kPlain>
    LSM_DEVICE void weigh(int step, Accumulators<N>& x, Accumulators<N>& grad) {
        Stage const& tiles = s.stage[step % 2];
        float const by = work.scale * kLog2e;
        LSM_UNROLL
        for (int n = 0; n < N / 8; ++n) {
            LSM_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const column = 8 * n + lane() % 4 * 2 + i;
                float2 stats = *reinterpret_cast<float2 const*>(&tiles.stats[column]);
                if constexpr (!kPlain) stats.x -= tiles.bias[warp()][column];
                Row row = {0, 0, 0, 0};
                bool real = true;
                if constexpr (kBent) {
                    row = tiles.rows[column];
                    real = has(steps.unit(s.plan, step, column).tag);
                }
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    float& e = x[n][2 * half_ + i];
                    float value = e * by, slope = 1.f;
                    if constexpr (kBent) {
                        int const x = position() + (lane() / 4 + 8 * half_) * mask.key_stride;
                        if constexpr (!kPlain) {
                            Score const bend = score<true>(work, s.bent, e, row.p - x, 0.f);
                            value = bend.s * kLog2e, slope = bend.slope;
                        }
                        value = real && mask.sees(row, x) ? value : -infinity();
                    }
                    e = exp2_approx(value - stats.x);
                    if constexpr (kKeys) {
                        float& d = grad[n][2 * half_ + i];
                        d = e * (d - stats.y) * slope;
                    }
                }
            }
        }
    }

    template <bool kBent>
    LSM_DEVICE void attend(int step) {
        if (s.tile.place.token + 16 * strip() >= s.tile.place.sequence.Tk || (kBent && skips(step)))
            return;
        Stage const& tiles = s.stage[step % 2];
        Accumulators<N> x[1], grad[1];
        relate<T, Keys, Queries>(rows_of<Keys>(s.keys, 16 * strip()), columns_of<Queries>(tiles.q),
                                 width_k(), x);
        if constexpr (kKeys)
            relate<T, Values, Grads>(rows_of<Values>(s.values, 16 * strip()),
                                     columns_of<Grads>(tiles.grad_o), width_v(), grad);
        if constexpr (kBent) {
            work.plain ? weigh<true, true>(step, x[0], grad[0])
                       : weigh<true, false>(step, x[0], grad[0]);
        } else {
            weigh<false, true>(step, x[0], grad[0]);
        }
        Operands<N> weights[1];
        if constexpr (kValues) {
            pack_weights<T, N>(x[0], weights[0]);
            gather<T, Grads, VSums, N>(
                weights, rows_of<Grads>(tiles.grad_o, 0) + Grads::offset(0, part() * VSums),
                width_v() - part() * VSums, dv);
        }
        if constexpr (kKeys) {
            pack_weights<T, N>(grad[0], weights[0]);
            gather<T, Queries, KSums, N>(
                weights, rows_of<Queries>(tiles.q, 0) + Queries::offset(0, part() * KSums),
                width_k() - part() * KSums, dk);
        }
    }

    // A query with odd stats may hold inf or NaN, which keys that it does not see would take 0 times. Its rows become
    // zeros: keys that it sees still get NaN, as its weights are inf.
    LSM_DEVICE void clear(int step) {
        Stage& tiles = s.stage[step % 2];
        LSM_UNROLL_BY(1)
        for (int i = threadIdx.x; i < N * (D / 8); i += kThreads) {
            int const row = i / (D / 8);
            if (!is_odd(tiles.stats[row])) continue;
            int const c = i % (D / 8) * 8;
            *reinterpret_cast<uint4*>(tiles.q + Queries::offset(row, c)) = {0, 0, 0, 0};
            if (c < DV)
                *reinterpret_cast<uint4*>(tiles.grad_o + Grads::offset(row, c)) = {0, 0, 0, 0};
        }
        __syncthreads();
    }
    LSM_DEVICE void advance(int step, int count) {
        cp_async_wait<0>();
        bool const odd = threadIdx.x < N && is_odd(s.stage[step % 2].stats[threadIdx.x]);
        if (__syncthreads_or(odd) != 0) clear(step);
        if (step + 1 < count) load(step + 1);
    }

    // By one warp.
    LSM_DEVICE void start_plan() {
        Sequence const& sequence = s.tile.place.sequence;
        Inverse const& inverse = work.inverse;
        if (lane() != 0) return;
        s.left = mask.left_of(s.head);
        s.bent = Head::of(work, s.head);
        s.plan.next = 0;
        if (work.lists) {
            // Of several pieces this block's.
            Entries const those =
                section_entries(work, s.tile.batch, s.head,
                                sequence.section0 + s.tile.place.token / inverse.section_k);
            i64 const count = those.count, piece = s.tile.piece, pieces = s.tile.pieces;
            i64 const begin = count * piece / pieces;
            s.first_row =
                (static_cast<i64>(s.tile.batch) * p.lists.heads + work.list_head(s.head)) *
                    p.lists.rows +
                sequence.row0;
            s.entries = those.at + begin;
            s.blocks.count = static_cast<int>(count * (piece + 1) / pieces - begin);
        } else {
            s.blocks =
                visible_queries(work, sequence, s.left, mask.key(s.tile.place.token), last_key());
        }
    }
    LSM_DEVICE int last_key() const {
        return mask.key(min(s.tile.place.token + kRows, s.tile.place.sequence.Tk) - 1);
    }

    LSM_DEVICE void plan_queries() {
        int const subs = work.block_q / steps.size(), per = work.inverse.section_k / work.block_k;
        int const everything = work.lists ? (1 << per) - 1 : 1, Tq = s.tile.place.sequence.Tq;
        fill_plan(s.plan, s.blocks.count * subs, [&](int i, Unit& unit) {
            int2 const entry =
                work.lists ? load_global(s.entries + i / subs) : int2{s.blocks[i / subs], 1};
            unit = {entry.x * work.block_q + i % subs * steps.size(), entry.y};
            if (unit.first >= Tq) return Kind::skip;
            int const p0 = unit.first + shift(),
                      p1 = min(unit.first + steps.size(), Tq) - 1 + shift();
            Kind const kind = mask.kind(mask.bounds(p0, p1, s.left, s.left, last()),
                                        mask.key(s.tile.place.token), last_key());
            bool const whole = work.plain && (unit.tag & 15) == everything;
            return kind == Kind::full && !whole ? Kind::partial : kind;
        });
    }

    LSM_DEVICE void run() {
        if (s.tile.place.unused) return;
        if (s.tile.place.poison) return poison();
        load_tile_rows<T, D, kRows, kThreads>(p.k, s.keys, width_k(),
                                              [&](int r) { return row_of(p.k, r); });
        load_tile_rows<T, DV, kRows, kThreads>(p.v, s.values, width_v(),
                                               [&](int r) { return row_of(p.v, r); });
        cp_async_commit();
        if constexpr (kKeys) {
            LSM_UNROLL
            for (int i = 0; i < KSums / 2; ++i) dk[0][i / 4][i % 4] = 0.f;
        }
        if constexpr (kValues) {
            LSM_UNROLL
            for (int i = 0; i < VSums / 2; ++i) dv[0][i / 4][i % 4] = 0.f;
        }
        LSM_UNROLL_BY(1)
        for (int h = 0; h < work.group; ++h) {
            __syncthreads();  // the last head is done with
            if (threadIdx.x == 0) s.head = s.tile.key_head * work.group + h;
            if (warp() == 0) start_plan();
            LSM_UNROLL_BY(1)
            do {
                __syncthreads();  // the last part is done with
                if (warp() == 0) plan_queries();
                __syncthreads();
                go_through(*this, s.plan, steps.each);
            } while (s.plan.more);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (s.tile.pieces > 1) return leave();
        if constexpr (kKeys)
            store_tile_rows<T, Keys>(
                s.keys, 16 * strip(), width_k(), dk[0], work.scale, work.scale,
                [&](int r) { return row_of(p.dk, r); }, part() * KSums);
        if constexpr (kValues)
            store_tile_rows<T, Values>(
                s.values, 16 * strip(), width_v(), dv[0], 1.f, 1.f,
                [&](int r) { return row_of(p.dv, r); }, part() * VSums);
    }

    // One of several pieces: its sums in fp32.
    LSM_DEVICE void leave() {
        int const width = width_k() + width_v();
        float* const to =
            work.slots +
            (s.tile.slot + static_cast<i64>(s.tile.piece) * work.section_tiles) * kRows * width;
        auto const store = [&]<int Count>(float const(&x)[Count][4], int first, int columns,
                                          float by) {
            LSM_UNROLL
            for (int n = 0; n < Count; ++n) {
                int const c = 8 * (part() * Count + n) + lane() % 4 * 2;
                if (c >= columns) continue;
                LSM_UNROLL
                for (int half_ = 0; half_ < 2; ++half_) {
                    float* const row = to + (16 * strip() + lane() / 4 + 8 * half_) * width + first;
                    store_global(reinterpret_cast<float2*>(row + c),
                                 {x[n][2 * half_] * by, x[n][2 * half_ + 1] * by});
                }
            }
        };
        if constexpr (kKeys) store(dk[0], 0, width_k(), work.scale);
        if constexpr (kValues) store(dv[0], width_k(), width_v(), 1.f);
    }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) tensor_keys(Work work) {
    KeysKernel<Config>(work).run();
}

}  // namespace lsm::sparse_attn
