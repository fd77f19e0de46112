// The sparse attention engine on CUDA: what a call becomes, its scratch memory and its launches.
#include "kernels/sparse_attn/launch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "kernels/architecture.h"
#include "kernels/carver.h"
#include "kernels/fill.cuh"
#include "kernels/sparse_attn/prepare.cuh"

namespace lsm {
namespace sparse_attn {
namespace {

int64_t ceil_div(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

int log2_of(int64_t n) {
    return std::bit_width(static_cast<uint64_t>(n)) - 1;
}

Mask read_mask(SparseAttnParams const& p) {
    AttnMask const& m = p.mask;
    int64_t const far =
        std::max((p.Tk + 128) * m.key_stride + m.key_length, p.Tq + p.Tk + std::abs(m.offset));
    if (far >= kNone)
        throw std::runtime_error(
            "lsm::block_sparse_attn: positions must be below 2^29 on a GPU, got " +
            std::to_string(far));
    if (m.dilation > 1 && far / m.dilation >= 1 << 20)
        throw std::runtime_error(
            "lsm::block_sparse_attn: a dilation on a GPU must leave fewer than 2^20 tokens");
    auto const bound = [](int64_t n) {
        return static_cast<int>(n < 0 ? kNone : std::min<int64_t>(n, kNone));
    };
    return {m.causal ? bound(m.causal_block) : 0,
            bound(m.prefix),
            bound(m.left),
            bound(m.right),
            bound(m.sinks),
            bound(m.dilation),
            static_cast<int>(m.key_stride),
            static_cast<int>(m.key_length),
            static_cast<int>(m.offset),
            m.align_end,
            m.head_left,
            1.f / static_cast<float>(m.dilation)};
}

// Rows of a tile of queries and keys of a tile of keys.
struct Tiles {
    int rows, keys;
};
constexpr Tiles kExactTiles = {16, 16};

bool half_precision(SparseAttnParams const& p) {
    return p.dtype == Dtype::bf16 || p.dtype == Dtype::f16;
}

// Biases of blocks are one per token and block in a union of lists, which its tags do not tell apart.
bool on_tensor_cores(SparseAttnParams const& p) {
    bool const unite = p.lists.index != nullptr && p.lists.block_q == 1;
    return half_precision(p) && !(unite && p.lists.bias != nullptr);
}

struct Layout {
    Work work{};
    int bias_parts = 0;
    int64_t bytes;

    Layout(SparseAttnParams const& p, bool backward, Tiles tiles, void* workspace) {
        Carver carve(workspace);
        work.p = p;
        work.mask = read_mask(p);
        work.group = static_cast<int>(p.Hq / p.Hkv);
        work.list_group = static_cast<int>(p.Hq / std::max<int64_t>(p.lists.heads, 1));
        work.lists = p.lists.index != nullptr;
        work.block_q = work.lists ? static_cast<int>(p.lists.block_q) : 64;
        work.block_k = work.lists ? static_cast<int>(p.lists.block_k) : 64;
        work.scale = static_cast<float>(p.scale), work.softcap = static_cast<float>(p.softcap);
        work.ramp_length = static_cast<float>(p.ramp_length);
        // Below 1, so that the largest score's own block counts whatever is rounded.
        if (p.pv_threshold > 0)
            work.least_weight = static_cast<float>(std::min(0.999, std::exp(-p.pv_threshold)));
        work.per_softcap = p.softcap > 0 ? static_cast<float>(1 / p.softcap) : 0.f;
        work.per_ramp_length = p.ramp_length > 0 ? static_cast<float>(1 / p.ramp_length) : 0.f;
        work.plain = p.scale > 0 && p.softcap == 0 && p.lists.bias == nullptr &&
                     p.alibi_slopes == nullptr && p.ramp == nullptr;
        shape_tiles(tiles);
        bool const packed = p.cu_seqlens_q != nullptr;
        int const more = packed ? static_cast<int>(p.N) : 0;
        work.query_tiles = static_cast<int>(ceil_div(p.Tq, work.tokens)) + more;
        work.inverse.section_k = std::max(work.block_k, 64);
        work.inverse.sections = static_cast<int>(ceil_div(p.Tk, work.inverse.section_k)) + more;
        if (packed) work.first = carve.take<First>(p.N + 2);
        work.section_tiles = work.inverse.section_k / tiles.keys;
        if (backward) carve_backward(carve);
        bytes = carve.used();
    }

    int64_t owners() const { return work.p.B * work.p.lists.heads; }

  private:
    void shape_tiles(Tiles tiles) {
        SparseAttnParams const& p = work.p;
        bool const alone = work.lists && p.lists.heads == p.Hq;  // every head has its own lists
        int64_t const room = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(p.Tq, 1)));
        work.unite = work.lists && work.block_q == 1 && tiles.rows > kExactTiles.rows;
        if (work.unite) {
            work.heads = alone ? 1 : std::min(work.group, tiles.rows);
            int const width = std::bit_ceil(static_cast<unsigned>(work.heads));
            work.tokens = std::min(32, tiles.rows / width);
            work.token_shift = log2_of(width);
        } else {
            work.tokens =
                static_cast<int>(std::min<int64_t>(work.lists ? work.block_q : room, tiles.rows));
            work.heads = alone ? 1 : std::min(work.group, tiles.rows / work.tokens);
        }
        work.head_shift = log2_of(work.tokens);
        work.head_tiles = static_cast<int>(ceil_div(work.group, work.heads));
    }

    void carve_backward(Carver& carve) {
        SparseAttnParams const& p = work.p;
        work.stats = carve.take<float4>(p.B * p.Hq * p.Tq);
        if (p.grad_ramp != nullptr) work.ramp_parts = carve.take<float>(p.B * p.Hq * p.Tq);
        if (!work.lists) return;
        Inverse& inverse = work.inverse;
        inverse.chunk_rows = static_cast<int>(std::max<int64_t>(64, ceil_div(p.lists.rows, 128)));
        inverse.chunks = static_cast<int>(ceil_div(p.lists.rows, inverse.chunk_rows));
        inverse.counts = carve.take<int>(owners() * inverse.chunks * inverse.sections);
        inverse.begin = carve.take<int>(owners() * (inverse.sections + 1));
        inverse.entries = carve.take<int2>(p.lists.entries);
        if (on_tensor_cores(p)) carve_items(carve);
        if (p.grad_block_bias == nullptr) return;
        int64_t const sharing = p.lists.heads == p.Hq    ? 1
                                : p.lists.heads == p.Hkv ? work.head_tiles
                                                         : p.Hkv * work.head_tiles;
        bias_parts = static_cast<int>(sharing * (work.block_q / work.tokens));
        work.bias_parts = carve.take<float>(bias_parts * p.lists.entries);
    }

    // Lists of the mean length are a piece, as are 1024 tokens, or fewer if there are few multiprocessors to fill: so
    // pieces are at most half as many as sections.
    void carve_items(Carver& carve) {
        SparseAttnParams const& p = work.p;
        int64_t const tiles = p.B * p.Hkv * work.inverse.sections;
        int64_t const mean =
            ceil_div(p.lists.entries, std::max<int64_t>(1, owners() * work.inverse.sections));
        int64_t const tokens = std::min<int64_t>(1024, 128 * multiprocessors());
        work.piece = static_cast<int>(std::max(ceil_div(tokens, work.block_q), 2 * mean));
        int64_t const shared = p.lists.heads == 1 ? p.Hkv : 1;
        int64_t const pieces = ceil_div(p.lists.entries * shared, work.piece);
        work.item_count = static_cast<int>(tiles + pieces);
        work.items = carve.take<Item>(work.item_count);
        work.slots = carve.take<float>(2 * pieces * work.inverse.section_k * (p.K + p.V));
    }
};

Layout plan_forward(SparseAttnParams const& p, void* workspace) {
    Tiles const tiles = {std::max(p.K, p.V) > 256 ? 64 : 128, 64};
    return Layout(p, false, on_tensor_cores(p) ? tiles : kExactTiles, workspace);
}
Layout plan_backward(SparseAttnParams const& p, void* workspace) {
    int64_t const columns = std::max(p.K, p.V);
    Tiles const tiles = columns > 256   ? Tiles{32, 32}
                        : columns > 128 ? Tiles{64, 64}
                                        : Tiles{128, 64};
    return Layout(p, true, on_tensor_cores(p) ? tiles : kExactTiles, workspace);
}

// Where there are such kernels: always on the emulator.
bool on_warpgroups([[maybe_unused]] Work const& work, [[maybe_unused]] bool backward,
                   [[maybe_unused]] void* stream) {
#if LSM_SM90A || !defined(__CUDACC__)
    SparseAttnParams const& p = work.p;
    if (architecture() != 90 || !on_tensor_cores(p) || work.unite || std::max(p.K, p.V) > 128 ||
        work.least_weight > 0)
        return false;
    auto const run = p.dtype == Dtype::bf16 ? (backward ? backward_bf16_sm90 : forward_bf16_sm90)
                                            : (backward ? backward_f16_sm90 : forward_f16_sm90);
    return run(work, stream);
#else
    return false;
#endif
}

dim3 blocks_for(int64_t items, int64_t each) {
    return dim3(static_cast<unsigned>(ceil_div(items, each)));
}

constexpr int kSmallSmem = 32 * sizeof(int);

void map(Work const& work, void* stream) {
    if (work.first != nullptr)
        launch(map_sequences, dim3(1), dim3(kPrepareThreads), kSmallSmem, stream, work);
}

void invert_lists(Layout const& layout, void* stream) {
    Inverse const& inverse = layout.work.inverse;
    int64_t const owners = layout.owners();
    if (!layout.work.lists || owners == 0) return;
    dim3 const chunks(static_cast<unsigned>(owners * inverse.chunks));
    if (chunks.x > 0 && inverse.sections > 0)
        launch(sort_rows, chunks, dim3(32), 0, stream, layout.work, false);
    launch(scan_counts, dim3(static_cast<unsigned>(owners)), dim3(kPrepareThreads), kSmallSmem,
           stream, layout.work);
    if (chunks.x > 0 && inverse.sections > 0)
        launch(sort_rows, chunks, dim3(32), 0, stream, layout.work, true);
}

// Of queries, keys, values and biases; sink logits and ramps are still to be summed over queries.
void differentiate(SparseAttnParams const& p, Layout const& layout, void* stream) {
    Work const& work = layout.work;
    map(work, stream);
    invert_lists(layout, stream);
    if (int64_t const rows = p.B * p.Tq * p.Hq; rows > 0)
        launch(row_stats, blocks_for(rows, kPrepareThreads / 32), dim3(kPrepareThreads), 0, stream,
               work);
    int64_t const entries = p.lists.entries, parts = layout.bias_parts * entries;
    fill(work.bias_parts, static_cast<i64>(parts), 0.f, stream);
    auto const run = !on_tensor_cores(p)      ? exact_backward
                     : p.dtype == Dtype::bf16 ? backward_bf16
                                              : backward_f16;
    if (work.items != nullptr)
        launch(list_items, dim3(1), dim3(kPrepareThreads), kSmallSmem, stream, work);
    if (!on_warpgroups(work, true, stream)) run(work, stream);
    if (dim3 const grid = key_grid(work); work.items != nullptr && grid.x > 0)
        launch(join_pieces, grid, dim3(kPrepareThreads), 0, stream, work,
               work.inverse.section_k / work.section_tiles);
    if (parts > 0)
        launch(sum_parts, blocks_for(entries, kPrepareThreads), dim3(kPrepareThreads), 0, stream,
               static_cast<float const*>(work.bias_parts), layout.bias_parts,
               static_cast<i64>(entries), static_cast<float*>(p.grad_block_bias));
}

}  // namespace
}  // namespace sparse_attn

using namespace sparse_attn;

int64_t sparse_attn_fwd_workspace(SparseAttnParams const& p) {
    return plan_forward(p, nullptr).bytes;
}

int64_t sparse_attn_bwd_workspace(SparseAttnParams const& p) {
    return plan_backward(p, nullptr).bytes;
}

void sparse_attn_fwd(SparseAttnParams const& p, void* workspace, void* stream) {
    if (p.B * p.Tq * p.Hq == 0) return;
    Work const work = plan_forward(p, workspace).work;
    map(work, stream);
    if (on_warpgroups(work, false, stream)) return;
    auto const run = !on_tensor_cores(p)      ? exact_forward
                     : p.dtype == Dtype::bf16 ? forward_bf16
                                              : forward_f16;
    run(work, stream);
}

void sparse_attn_bwd(SparseAttnParams const& p, void* workspace, void* stream) {
    if (p.Hq == 0) return;
    Layout const layout = plan_backward(p, workspace);
    if (p.B > 0) differentiate(p, layout, stream);
    if (p.grad_sink_logits != nullptr || p.grad_ramp != nullptr)
        launch(sum_queries, dim3(static_cast<unsigned>(p.Hq)), dim3(kPrepareThreads), kSmallSmem,
               stream, layout.work);
}

}  // namespace lsm
