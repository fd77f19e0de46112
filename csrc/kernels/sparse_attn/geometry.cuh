// Where things lie: tiles of queries and keys in sequences, what a query sees by its position, and lists of key blocks.
#pragma once

#include "kernels/platform.cuh"
#include "params/sparse_attn.h"

namespace lsm::sparse_attn {

constexpr int kNone = 1 << 29;      // a bound that is none; positions are nearer to 0
constexpr int kFar = 1 << 30;       // where no key is
constexpr int kNoKey = -(1 << 30);  // first token of a unit that is none
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kOddLse = -1e30f;  // weights are inf beside it, but 0 where a score is -inf
constexpr float kLowest = -3e38f;  // a maximum before the first score; -inf would give inf - inf

LSM_DEVICE float nan_value() {
    return __int_as_float(0x7fc00000);
}
LSM_DEVICE float infinity() {
    return __int_as_float(0x7f800000);
}
LSM_DEVICE int floor_div(int a, int b) {
    int const q = a / b;
    return q * b > a ? q - 1 : q;
}

// ---- Masks ----

// A query sees a key at x if  x <= reach  and  (x < sinks  or  from <= x <= to and (p - x) % dilation == 0).
struct alignas(16) Row {
    int p, reach, from, to;
};

// Of the rows of a tile.
struct Bounds {
    int reach_min, reach_max, from_min, from_max, to_min, to_max;
};

enum class Kind { skip, full, partial };

// Of dk and dv.
enum class Want { both, keys, values };

// AttnMask in 32 bits.
struct Mask {
    int causal_block;  // 0: not causal
    int prefix, left, right, sinks, dilation, key_stride, key_length, offset;
    bool align_end;
    int32_t const* head_left;
    float per_dilation;  // 1 / dilation

    // To be exact, |n| / dilation must be below 2^21.
    LSM_DEVICE bool divides(int n) const {
        return __float2int_rn(static_cast<float>(n) * per_dilation) * dilation == n;
    }
    LSM_DEVICE int left_of(int head) const {
        if (head_left == nullptr) return left;
        int const n = load_global(head_left + head);
        return n < 0 || n > kNone ? kNone : n;
    }
    LSM_DEVICE int shift(int Tq, int Tk) const { return offset + (align_end ? Tk - Tq : 0); }
    // The position of key j; of a key past the end it is past all keys.
    LSM_DEVICE int key(int j) const { return j * key_stride + key_length - 1; }

    // Of a query at p; the last key is at `last`.
    LSM_DEVICE Row row(int p, int left_, int last) const {
        int reach = last;
        if (causal_block != 0) {
            int const end =
                causal_block == 1 ? p : (floor_div(p, causal_block) + 1) * causal_block - 1;
            reach = min(last, max(end, prefix - 1));
        }
        return {p, reach, p - left_, p + right};
    }
    // Of queries at [p0, p1], whose heads look between left_min and left_max back.
    LSM_DEVICE Bounds bounds(int p0, int p1, int left_min, int left_max, int last) const {
        Row const a = row(p0, left_max, last), b = row(p1, left_min, last);
        return {a.reach, b.reach, a.from, b.from, a.to, b.to};
    }
    LSM_DEVICE bool sees(Row const& row, int x) const {
        return x <= row.reach && (x < sinks || (x >= row.from && x <= row.to &&
                                                (dilation == 1 || divides(row.p - x))));
    }
    // Of keys at x0 to x1.
    LSM_DEVICE Kind kind(Bounds const& b, int x0, int x1) const {
        if (x0 > b.reach_max || (x0 >= sinks && (x1 < b.from_min || x0 > b.to_max)))
            return Kind::skip;
        bool const window = dilation == 1 && max(x0, sinks) >= b.from_max && x1 <= b.to_min;
        return x1 <= b.reach_min && (x1 < sinks || window) ? Kind::full : Kind::partial;
    }
};

// ---- Work ----

// First tile of queries, row of lists and section of keys of each sequence.
struct alignas(16) First {
    int queries, rows, sections, none;
};

// Lists the other way round: for each section of keys (section_k = max(block_k, 64)) the rows that have some of its
// blocks, ascending. An entry is (row in the sequence, place of its first block in the row's list * 16 + which blocks).
struct Inverse {
    int section_k, sections;  // sections of a batch row, an upper bound where sequences are packed
    int chunks, chunk_rows;   // how rows are cut for counting
    int* counts;    // [B * heads, chunks, sections], then where each chunk's entries begin
    int* begin;     // [B * heads, sections + 1], from the first entry of a batch row and list head
    int2* entries;  // as many as the lists have
};

// What a block of dk and dv's kernel does: a section of keys, or of a section that many rows have on their lists one of
// several pieces of those rows, whose sums go to slots `slot` on.
struct Item {
    int owner;  // (batch row * Hkv + key head) * sections + section; below 0: nothing
    int piece, pieces, slot;
};

struct Work {
    SparseAttnParams p;
    Mask mask;
    int group;             // query heads of a key head
    int list_group;        // query heads of a list head
    int block_q, block_k;  // of lists; without lists, of what stands for them
    bool lists;
    bool plain;  // scores are scale q . k and nothing more, scale > 0
    // A tile of queries is tokens x heads rows, heads outside; with `unite` tokens outside, and heads rounded up to a
    // power of two.
    int tokens, heads, token_shift, head_shift, head_tiles;
    bool unite;         // a tile has lists of its own per token (block_q == 1)
    int query_tiles;    // of a batch row
    int section_tiles;  // tiles of keys in a section
    First* first;       // [N + 2], packed only; the last one's `queries` is 1 if cu_seqlens is bad
    Inverse inverse;
    Item* items;     // null: every section is one
    int item_count;  // an upper bound
    int piece;       // entries of a list
    float* slots;    // sums of a tile of keys each, [tile's keys, K + V]
    // Backward, per [B, Hq, Tq]: lse log2 e, or inf of a query that sees nothing, or kOddLse; delta; lse; 0.
    float4* stats;
    float* bias_parts;  // [parts, entries of lists]
    float* ramp_parts;  // [B, Hq, Tq]
    float scale, softcap, ramp_length, per_softcap, per_ramp_length;
    float least_weight;  // exp(-pv_threshold): values that all weigh less are left out

    LSM_DEVICE int token_of(int m) const { return (m >> token_shift) & (tokens - 1); }
    LSM_DEVICE int head_of(int m) const {
        return token_shift == 0 ? m >> head_shift : m & ((1 << token_shift) - 1);
    }
    LSM_DEVICE bool row_exists(int m) const {
        return head_of(m) < heads && (token_shift == 0 || m >> token_shift < tokens);
    }
    LSM_DEVICE float bias(i64 entry) const {
        i64 const last = p.lists.entries - 1;  // of lists in which a row or a block comes twice
        entry = max(static_cast<i64>(0), min(entry, last));
        return load_global(static_cast<float const*>(p.lists.bias) + entry);
    }
    LSM_DEVICE int list_head(int head) const { return head / list_group; }
};

// Whether a query sees nothing, or is not finite.
LSM_DEVICE bool is_odd(float4 const& stats) {
    return !(fabsf(stats.x) < -kOddLse);
}

// ---- Sequences ----

struct Sequence {
    int batch, index;
    i64 q0, k0;  // first tokens
    int Tq, Tk;
    i64 row0, section0;
};

// A tile in its sequence. unused: nothing to do. poison: cu_seqlens is bad; NaN to tokens [token, token + size) of the
// batch row.
struct Place {
    Sequence sequence;
    int token;
    bool unused, poison;
};

LSM_DEVICE i64 boundary(Work const& work, void const* cu_seqlens, int n) {
    return work.p.cu_seqlens_is_64bit ? load_global(static_cast<int64_t const*>(cu_seqlens) + n)
                                      : load_global(static_cast<int32_t const*>(cu_seqlens) + n);
}

// The last n with first[n].*what <= index; a warp together.
LSM_DEVICE int find_sequence(First const* first, int N, int First::* what, int index) {
    int const lane = threadIdx.x % 32;
    int low = 0, high = N;
    while (high - low > 1) {
        int const step = (high - low + 31) / 32, at = low + (lane + 1) * step;
        bool const past = at >= high || first[at].*what > index;
        int const k = __ffs(__ballot_sync(0xffffffffu, past)) - 1;
        high = min(high, low + (k + 1) * step);
        low += k * step;
    }
    return low;
}

// Tile, or section, `index` of a batch row.
LSM_DEVICE Place locate(Work const& work, int First::* what, int batch, int index, int size) {
    SparseAttnParams const& p = work.p;
    if (work.first == nullptr)
        return {{batch, batch, 0, 0, static_cast<int>(p.Tq), static_cast<int>(p.Tk), 0, 0},
                index * size,
                false,
                false};
    int const N = static_cast<int>(p.N);
    if (work.first[N + 1].queries != 0) return {{}, index * size, false, true};
    if (index >= work.first[N].*what) return {{}, 0, true, false};
    int const n = find_sequence(work.first, N, what, index);
    First const first = work.first[n];
    i64 const q0 = boundary(work, p.cu_seqlens_q, n), k0 = boundary(work, p.cu_seqlens_k, n);
    int const Tq = static_cast<int>(boundary(work, p.cu_seqlens_q, n + 1) - q0);
    int const Tk = static_cast<int>(boundary(work, p.cu_seqlens_k, n + 1) - k0);
    return {{0, n, q0, k0, Tq, Tk, first.rows, first.sections},
            (index - first.*what) * size,
            false,
            false};
}

// A tile of `rows` keys for a block of dk and dv's kernel.
struct KeyTile {
    int batch, key_head, piece, pieces;
    i64 slot;
    Place place;
};

LSM_DEVICE KeyTile locate_keys(Work const& work, int rows, int tile_index) {
    int const sub = tile_index % work.section_tiles, index = tile_index / work.section_tiles;
    int const sections = work.inverse.sections;
    int const count = static_cast<int>(work.p.B * work.p.Hkv) * sections;
    Item item = {index < count ? index : -1, 0, 1, 0};
    if (work.items != nullptr)
        item = index < work.item_count ? work.items[index] : Item{-1, 0, 1, 0};
    KeyTile tile = {0, 0, item.piece, item.pieces, 0, {{}, 0, true, false}};
    if (item.owner < 0) return tile;
    int const head = item.owner / sections;
    tile.batch = head / static_cast<int>(work.p.Hkv),
    tile.key_head = head % static_cast<int>(work.p.Hkv);
    tile.slot = static_cast<i64>(item.slot) * work.section_tiles + sub;
    tile.place =
        locate(work, &First::sections, tile.batch, item.owner % sections, work.inverse.section_k);
    tile.place.token += sub * rows;
    tile.place.unused |= !tile.place.poison && tile.place.token >= tile.place.sequence.Tk;
    return tile;
}

// ---- Lists ----

// Blocks of keys, or of queries: what a list says, or without one [0, first) and [second, ...).
struct Blocks {
    int32_t const* index;
    i64 entry;  // of the lists
    int count, first, skipped;

    LSM_DEVICE int operator[](int i) const {
        return index != nullptr ? load_global(index + i) : i < first ? i : i + skipped;
    }
};

LSM_DEVICE i64 clamp_entry(Work const& work, i64 entry) {
    return max(static_cast<i64>(0), min(entry, static_cast<i64>(work.p.lists.entries)));
}

// Of list row `row` of a sequence, as `head` reads it.
LSM_DEVICE Blocks list_blocks(Work const& work, Sequence const& sequence, int head, i64 row) {
    BlockLists const& lists = work.p.lists;
    i64 const r =
        (sequence.batch * lists.heads + work.list_head(head)) * lists.rows + sequence.row0 + row;
    if (sequence.row0 + row >= lists.rows) return {lists.index, 0, 0, 0, 0};
    if (lists.row_ptr == nullptr)
        return {lists.index + r * lists.capacity, r * lists.capacity,
                static_cast<int>(lists.capacity), 0, 0};
    // Lists are not checked on a GPU; what they say must not lead out of the tensors.
    i64 const begin = clamp_entry(work, load_global(lists.row_ptr + r));
    i64 const end = max(begin, clamp_entry(work, load_global(lists.row_ptr + r + 1)));
    return {lists.index + begin, begin, static_cast<int>(end - begin), 0, 0};
}

// The first of a batch row and list head's entries in Inverse::entries.
LSM_DEVICE i64 inverse_base(Work const& work, i64 owner) {
    BlockLists const& lists = work.p.lists;
    return lists.row_ptr == nullptr
               ? owner * lists.rows * lists.capacity
               : clamp_entry(work, load_global(lists.row_ptr + owner * lists.rows));
}

// Where the rows that have a section on their lists begin, and how many they are.
struct Entries {
    int2 const* at;
    int count;
};

LSM_DEVICE Entries section_entries(Work const& work, i64 batch, int head, i64 section) {
    Inverse const& inverse = work.inverse;
    i64 const owner = batch * work.p.lists.heads + work.list_head(head);
    int const* const begin = inverse.begin + owner * (inverse.sections + 1) + section;
    // Rows that overlap have more entries than there are.
    i64 const base = inverse_base(work, owner), room = work.p.lists.entries - base;
    i64 const from = max(static_cast<i64>(0), min(static_cast<i64>(load_global(begin)), room));
    i64 const end = max(from, min(static_cast<i64>(load_global(begin + 1)), room));
    return {inverse.entries + base + from, static_cast<int>(end - from)};
}

// Without lists: the blocks of keys that some row within the bounds may see.
LSM_DEVICE Blocks visible_keys(Work const& work, Sequence const& sequence, Bounds const& b) {
    Mask const& mask = work.mask;
    int const last = mask.key_length - 1;  // of key 0
    int const seen = min(b.reach_max, b.to_max);
    int const end = seen < last ? 0 : min((seen - last) / mask.key_stride + 1, sequence.Tk);
    int const begin = b.from_min <= last ? 0 : (b.from_min - last) / mask.key_stride;
    int const sunk = min(mask.sinks - 1, b.reach_max);
    int const sinks = sunk < last ? 0 : min((sunk - last) / mask.key_stride + 1, sequence.Tk);
    int const first = (sinks + work.block_k - 1) / work.block_k;
    int const second = max(first, begin / work.block_k);
    int const past = (end + work.block_k - 1) / work.block_k;
    return {nullptr, 0, first + max(0, past - second), first, second - first};
}

// Without lists: the blocks of queries that may see keys at x0 to x1.
LSM_DEVICE Blocks visible_queries(Work const& work, Sequence const& sequence, int left, int x0,
                                  int x1) {
    Mask const& mask = work.mask;
    int const shift = mask.shift(sequence.Tq, sequence.Tk);
    int begin = -kNone, end = sequence.Tq;
    if (mask.causal_block != 0 && x0 >= mask.prefix)
        begin = floor_div(x0, mask.causal_block) * mask.causal_block - shift;
    if (x0 >= mask.sinks) {
        begin = max(begin, x0 - mask.right - shift);
        end = min(end, x1 + left - shift + 1);
    }
    int const second = max(begin, 0) / work.block_q;
    int const past = end <= 0 ? 0 : (end + work.block_q - 1) / work.block_q;
    return {nullptr, 0, max(0, past - second), 0, second};
}

}  // namespace lsm::sparse_attn
