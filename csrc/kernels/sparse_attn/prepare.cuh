// What runs before and after attention: packed sequences, lists the other way round, row sums, sums over tokens.
#pragma once

#include "kernels/sparse_attn/numbers.cuh"

namespace lsm::sparse_attn {

constexpr int kPrepareThreads = 256;

// ---- Packed sequences ----

LSM_DEVICE int count_tiles(i64 n, int size) {
    return static_cast<int>((n + size - 1) / size);
}

// Exclusive prefix sums over the block; `total` of all.
LSM_DEVICE int scan_block(int value, int* warps, int& total) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int d = 1; d < 32; d *= 2) {
        int const below = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += below;
    }
    __syncthreads();  // the last round's readers
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        if (w < warp) before += warps[w];
        total += warps[w];
    }
    return before + sum - value;
}

// One block. Fills work.first.
__global__ void __launch_bounds__(kPrepareThreads) map_sequences(Work work) {
    int* const warps = reinterpret_cast<int*>(dyn_smem());
    SparseAttnParams const& p = work.p;
    int const N = static_cast<int>(p.N);
    bool bad = false;
    if (threadIdx.x == 0)
        bad = boundary(work, p.cu_seqlens_q, 0) != 0 || boundary(work, p.cu_seqlens_q, N) != p.Tq ||
              boundary(work, p.cu_seqlens_k, 0) != 0 || boundary(work, p.cu_seqlens_k, N) != p.Tk;
    for (int n = threadIdx.x; n < N; n += kPrepareThreads)
        bad |= boundary(work, p.cu_seqlens_q, n) > boundary(work, p.cu_seqlens_q, n + 1) ||
               boundary(work, p.cu_seqlens_k, n) > boundary(work, p.cu_seqlens_k, n + 1);
    bad = __syncthreads_or(bad) != 0;
    First base = {0, 0, 0, 0};
    for (int tile = 0; tile < N && !bad; tile += kPrepareThreads) {
        int const n = tile + threadIdx.x;
        i64 Tq = 0, Tk = 0;
        if (n < N) {
            Tq = boundary(work, p.cu_seqlens_q, n + 1) - boundary(work, p.cu_seqlens_q, n);
            Tk = boundary(work, p.cu_seqlens_k, n + 1) - boundary(work, p.cu_seqlens_k, n);
        }
        First at = {}, total = {};
        at.queries = base.queries + scan_block(count_tiles(Tq, work.tokens), warps, total.queries);
        at.rows = base.rows + scan_block(count_tiles(Tq, work.block_q), warps, total.rows);
        at.sections = base.sections +
                      scan_block(count_tiles(Tk, work.inverse.section_k), warps, total.sections);
        if (n < N) work.first[n] = at;
        base = {base.queries + total.queries, base.rows + total.rows,
                base.sections + total.sections, 0};
    }
    if (threadIdx.x == 0) {
        if (work.lists && base.rows > p.lists.rows) bad = true;
        work.first[N] = base;
        work.first[N + 1] = {bad ? 1 : 0, 0, 0, 0};
    }
}

// ---- Lists the other way round: a counting sort by section, rows ascending ----

// The sections that a row's list names, one after another: f(section of the batch row, tag).
template <class F>
LSM_DEVICE void for_sections(Work const& work, int batch, int list_head, int row, F f) {
    Inverse const& inverse = work.inverse;
    int const lane = threadIdx.x % 32, per = inverse.section_k / work.block_k;
    Sequence sequence = {batch, batch, 0, 0, 0, static_cast<int>(work.p.Tk), 0, 0};
    if (work.first != nullptr) {
        int const N = static_cast<int>(work.p.N);
        if (row >= work.first[N].rows) return;
        int const n = find_sequence(work.first, N, &First::rows, row);
        sequence.section0 = work.first[n].sections;
        sequence.Tk = static_cast<int>(boundary(work, work.p.cu_seqlens_k, n + 1) -
                                       boundary(work, work.p.cu_seqlens_k, n));
        row -= work.first[n].rows;
        sequence.row0 = work.first[n].rows;
    }
    int const head = static_cast<int>(list_head * (work.p.Hq / work.p.lists.heads));
    Blocks const blocks = list_blocks(work, sequence, head, row);
    int const end = (sequence.Tk + work.block_k - 1) / work.block_k;
    for (int i = lane; i < blocks.count; i += 32) {
        int const block = blocks[i];
        if (block < 0 || block >= end) continue;
        int const section = block / per;
        if (i > 0) {
            int const before = blocks[i - 1];
            if (before >= 0 && before / per == section) continue;  // that entry speaks for this one
        }
        int members = 0;
        for (int k = i; k < i + per && k < blocks.count; ++k) {
            int const member = blocks[k];
            if (member < 0 || member >= end || member / per != section) break;
            members |= 1 << member % per;
        }
        f(static_cast<int>(sequence.section0) + section, row, i * 16 + members);
    }
}

// A warp per chunk of rows: counts entries by section, or with `place` puts them where the counts, by then offsets, say.
__global__ void __launch_bounds__(32) sort_rows(Work work, bool place) {
    Inverse const& inverse = work.inverse;
    int const chunk = blockIdx.x % inverse.chunks;
    i64 const owner = blockIdx.x / inverse.chunks;  // batch row and list head
    int const heads = static_cast<int>(work.p.lists.heads);
    int const batch = static_cast<int>(owner / heads), list_head = static_cast<int>(owner % heads);
    if (work.first != nullptr && work.first[work.p.N + 1].queries != 0) return;
    int* const counts = inverse.counts + (owner * inverse.chunks + chunk) * inverse.sections;
    if (!place) {
        for (int i = threadIdx.x; i < inverse.sections; i += 32) counts[i] = 0;
        __syncwarp();
    }
    i64 const base = inverse_base(work, owner);
    int const rows = static_cast<int>(work.p.lists.rows);
    int const begin = chunk * inverse.chunk_rows;
    int const end = min(rows, begin + inverse.chunk_rows);
    for (int row = begin; row < end; ++row) {
        for_sections(work, batch, list_head, row, [&](int section, int local, int tag) {
            int const at = load_global(counts + section);
            store_global(counts + section, at + 1);
            if (place) {
                int const to =
                    load_global(inverse.begin + owner * (inverse.sections + 1) + section) + at;
                if (to >= 0 && base + to < work.p.lists.entries)
                    inverse.entries[base + to] = {local, tag};
            }
        });
        __syncwarp();
    }
}

// A block per batch row and list head: counts to offsets.
__global__ void __launch_bounds__(kPrepareThreads) scan_counts(Work work) {
    int* const warps = reinterpret_cast<int*>(dyn_smem());
    Inverse const& inverse = work.inverse;
    if (work.first != nullptr && work.first[work.p.N + 1].queries != 0) return;
    int* const counts =
        inverse.counts + static_cast<i64>(blockIdx.x) * inverse.chunks * inverse.sections;
    int* const begin = inverse.begin + static_cast<i64>(blockIdx.x) * (inverse.sections + 1);
    int before = 0;
    for (int tile = 0; tile < inverse.sections; tile += kPrepareThreads) {
        int const section = tile + threadIdx.x;
        int sum = 0;
        if (section < inverse.sections) {
            for (int chunk = 0; chunk < inverse.chunks; ++chunk) {
                int* const at = counts + static_cast<i64>(chunk) * inverse.sections + section;
                int const n = load_global(at);
                store_global(at, sum);
                sum += n;
            }
        }
        int total;
        int const to = scan_block(sum, warps, total);
        if (section < inverse.sections) store_global(begin + section, before + to);
        before += total;
    }
    if (threadIdx.x == 0) store_global(begin + inverse.sections, before);
}

// One block. Cuts sections that many rows have into pieces, so that no block has all of a sequence to go through where
// every query attends to its first keys.
__global__ void __launch_bounds__(kPrepareThreads) list_items(Work work) {
    int* const warps = reinterpret_cast<int*>(dyn_smem());
    SparseAttnParams const& p = work.p;
    int const sections = work.inverse.sections, owners = static_cast<int>(p.B * p.Hkv) * sections;
    bool const bad = work.first != nullptr && work.first[p.N + 1].queries != 0;
    int items = 0, slots = 0;
    for (int tile = 0; tile < owners; tile += kPrepareThreads) {
        int const owner = tile + threadIdx.x;
        int pieces = 0;
        if (owner < owners) {
            int const head = owner / sections * work.group, batch = head / static_cast<int>(p.Hq);
            int most = 0;
            for (int h = 0; h < (p.lists.heads == p.Hq ? work.group : 1) && !bad; ++h) {
                int const h0 = head % static_cast<int>(p.Hq) + h;
                most = max(most, section_entries(work, batch, h0, owner % sections).count);
            }
            pieces = max(1, (most + work.piece - 1) / work.piece);
        }
        int all, all_slots;
        int const at = items + scan_block(pieces, warps, all);
        int const slot = slots + scan_block(pieces > 1 ? pieces : 0, warps, all_slots);
        // Lists whose rows overlap may need more than there is room for; then a section stays whole.
        bool const fits = pieces == 1 || slot + pieces <= 2 * (work.item_count - owners);
        for (int i = 0; i < pieces && at + i < work.item_count; ++i)
            work.items[at + i] = fits     ? Item{owner, i, pieces, slot}
                                 : i == 0 ? Item{owner, 0, 1, 0}
                                          : Item{-1, 0, 1, 0};
        items += all, slots += all_slots;
    }
    for (int i = items + threadIdx.x; i < work.item_count; i += kPrepareThreads)
        work.items[i] = {-1, 0, 1, 0};
}

// ---- Rows ----

// stats of every query: delta = sum dO O - dLSE. A warp per query and head. Of a query whose numbers are not finite lse
// is NaN, and in units of log2 kOddLse.
__global__ void __launch_bounds__(kPrepareThreads) row_stats(Work work) {
    SparseAttnParams const& p = work.p;
    i64 const item = static_cast<i64>(blockIdx.x) * (kPrepareThreads / 32) + threadIdx.x / 32;
    if (item >= p.B * p.Tq * p.Hq) return;
    int const lane = threadIdx.x % 32;
    i64 const head = item % p.Hq, time = item / p.Hq % p.Tq, batch = item / p.Hq / p.Tq;
    float sum = 0.f;
    for (int c = 4 * lane; c < p.V; c += 128) {
        float4 const o = load4(p.o.data, row_offset(p.o, batch, time, head) + c, p.dtype);
        float4 const d = load4(p.grad_o.data, row_offset(p.grad_o, batch, time, head) + c, p.dtype);
        sum += o.x * d.x + o.y * d.y + o.z * d.z + o.w * d.w;
    }
    sum = warp_sum(sum);
    if (lane != 0) return;
    i64 const at = per_head(work, batch, time, head);
    float const lse = load_global(static_cast<float const*>(p.lse) + at);
    float const grad_lse =
        p.grad_lse == nullptr ? 0.f : load_global(static_cast<float const*>(p.grad_lse) + at);
    bool const blind = lse == -infinity();
    float const delta = blind ? 0.f : sum - grad_lse;
    bool const odd = !blind && !(lse * 0.f + delta * 0.f == 0.f);
    float const known = blind ? infinity() : odd ? nan_value() : lse;
    store_global(work.stats + at, {odd ? kOddLse : known * kLog2e, odd ? 0.f : delta, known, 0.f});
}

// Gradients of sink logits and of the ramp: sums over all queries of a head, a block each.
__global__ void __launch_bounds__(kPrepareThreads) sum_queries(Work work) {
    float* const sums = reinterpret_cast<float*>(dyn_smem());
    SparseAttnParams const& p = work.p;
    int const head = blockIdx.x;
    float sink = 0.f, ramp = 0.f;
    float const logit = p.grad_sink_logits == nullptr
                            ? 0.f
                            : load_global(static_cast<float const*>(p.sink_logits) + head);
    for (i64 i = threadIdx.x; i < p.B * p.Tq; i += kPrepareThreads) {
        i64 const at = per_head(work, i / p.Tq, i % p.Tq, head);
        if (p.grad_sink_logits != nullptr) {
            float4 const s = load_global(work.stats + at);
            sink -= expf(logit - s.z) * s.y;  // lse of a query that sees nothing is +inf here
        }
        if (p.grad_ramp != nullptr) ramp += load_global(work.ramp_parts + at);
    }
    auto const total = [&](float x) {
        x = warp_sum(x);
        __syncthreads();
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
        __syncthreads();
        float all = 0.f;
        for (int w = 0; w < kPrepareThreads / 32; ++w) all += sums[w];
        return all;
    };
    sink = total(sink), ramp = total(ramp);
    if (threadIdx.x != 0) return;
    if (p.grad_sink_logits != nullptr)
        store_global(static_cast<float*>(p.grad_sink_logits) + head, sink);
    if (p.grad_ramp != nullptr) store_global(static_cast<float*>(p.grad_ramp) + head, ramp);
}

// dk and dv of sections that were cut into pieces: their sums, in order. A block per tile of keys; the grid is that of the
// kernel that left them. Left to itself, ptxas spills for the sake of a block more.
__global__ void __launch_bounds__(kPrepareThreads, 4) join_pieces(Work work, int rows) {
    SparseAttnParams const& p = work.p;
    KeyTile const tile = locate_keys(work, rows, blockIdx.x);
    if (tile.place.unused || tile.place.poison || tile.pieces == 1 || tile.piece > 0) return;
    int const K = static_cast<int>(p.K), width = K + static_cast<int>(p.V);
    int const keys = min(rows, tile.place.sequence.Tk - tile.place.token);
    i64 const stride = static_cast<i64>(work.section_tiles) * rows * width;  // to the next piece
    float const* const from = work.slots + tile.slot * rows * width;
    for (int i = threadIdx.x; i < keys * (width / 4); i += kPrepareThreads) {
        int const row = i / (width / 4), c = i % (width / 4) * 4;
        float4 sum = {0.f, 0.f, 0.f, 0.f};
        for (int piece = 0; piece < tile.pieces; ++piece) {
            float4 const x = load_global(
                reinterpret_cast<float4 const*>(from + piece * stride + row * width + c));
            sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
        }
        i64 const key = tile.place.sequence.k0 + tile.place.token + row;
        Rows const& to = c < K ? p.dk : p.dv;
        store4(to.data, row_offset(to, tile.batch, key, tile.key_head) + (c < K ? c : c - K),
               p.dtype, sum);
    }
}

__global__ void __launch_bounds__(kPrepareThreads)
    sum_parts(float const* parts, int count, i64 entries, float* to) {
    i64 const i = static_cast<i64>(blockIdx.x) * kPrepareThreads + threadIdx.x;
    if (i >= entries) return;
    float sum = 0.f;
    for (int part = 0; part < count; ++part) sum += load_global(parts + part * entries + i);
    store_global(to + i, sum);
}

}  // namespace lsm::sparse_attn
