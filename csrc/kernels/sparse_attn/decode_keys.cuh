// Which keys a block of decode attention visits, through the mask, the lists and the page table, and where they lie.
#pragma once

#include "kernels/platform.cuh"
#include "params/sparse_attn.h"
#include "policy/attn_keys.h"

namespace lsm::decode_attn {

constexpr int kRows = 16, kWarps = 4, kThreads = kWarps * 32;

// What does not depend on the block.
struct Plan {
    i64 parts;
    int heads, queries;  // of those that share keys: the rows, one query's heads after another's
    int tiles;           // of kRows rows
    int groups;          // of query heads of a key/value head with a list of their own
    int k_columns, v_columns;  // of the tiles in shared memory
    int stages;
    bool shared_values;  // v is the first columns of k
    AttnMask mask;       // with numbers that 32 bits hold
    float* o;            // [parts, B, Tq, Hq, V]
    float* lse;          // [parts, B, Hq, Tq]

    int rows() const { return heads * queries; }
};

// One block's place, and the keys of its steps. In shared memory, two steps deep.
template <int Keys, bool kCodes>
struct Step {
    i64 k_at[Keys], v_at[Keys];  // elements from the cache's beginning, bytes of codes
    i64 k_affine_at[kCodes ? Keys : 1], v_affine_at[kCodes ? Keys : 1];
    i64 entry[Keys];  // of the list
    int key[Keys];    // -1: none
};

struct Place {
    i64 b, kv_head, t0, h0, row0;  // row0: the block's first row
    i64 keys, first_position, list_at;
    i64 first, last;  // of the visits
    AttnVisits visits;
    int rows;  // of the block
    bool listed;

    LSM_DEVICE i64 query(Plan const& plan, int row) const { return t0 + (row0 + row) / plan.heads; }
    LSM_DEVICE i64 head(Plan const& plan, int row) const { return h0 + (row0 + row) % plan.heads; }
};

LSM_DEVICE Place find_place(SparseAttnParams const& p, Plan const& plan) {
    Place place;
    i64 unit = blockIdx.x / plan.parts;
    i64 const part = blockIdx.x - unit * plan.parts;
    place.row0 = unit % plan.tiles * kRows, unit /= plan.tiles;
    i64 const t = unit % (p.Tq / plan.queries), group = unit / (p.Tq / plan.queries) % plan.groups;
    unit /= p.Tq / plan.queries * plan.groups;
    place.kv_head = unit % p.Hkv, place.b = unit / p.Hkv;
    place.t0 = t * plan.queries;
    place.h0 = place.kv_head * (p.Hq / p.Hkv) + group * plan.heads;
    int const rows = plan.heads * plan.queries - static_cast<int>(place.row0);
    place.rows = rows < kRows ? rows : kRows;
    place.keys = p.cache_seqlens == nullptr
                     ? p.Tk
                     : clamped(load_global(p.cache_seqlens + place.b), 0, p.Tk);
    place.first_position = p.mask.offset + (p.mask.align_end ? place.keys - p.Tq : 0);
    place.listed = p.lists.index != nullptr;
    if (place.listed) {
        i64 const row =
            (place.b * p.lists.heads + place.h0 * p.lists.heads / p.Hq) * p.lists.rows + place.t0;
        i64 count = p.lists.capacity;
        if (p.lists.row_ptr != nullptr) {
            place.list_at = clamped(load_global(p.lists.row_ptr + row), 0, p.lists.entries);
            i64 const end = load_global(p.lists.row_ptr + row + 1);
            count = clamped(end, place.list_at, p.lists.entries) - place.list_at;
        } else {
            place.list_at = row * p.lists.capacity;
            i64 low = 0;  // entries before low are blocks, those from count on are not
            while (low < count) {
                i64 const middle = (low + count) / 2;
                if (load_global(p.lists.index + place.list_at + middle) >= 0) {
                    low = middle + 1;
                } else {
                    count = middle;
                }
            }
        }
        place.visits = {0, 0, count * p.lists.block_k};
    } else {
        i64 left = p.mask.left;
        if (p.mask.head_left != nullptr) {
            left = 0;
            for (int h = 0; h < plan.heads; ++h) {
                i64 const own = load_global(p.mask.head_left + place.h0 + h);
                left = own < 0 || left < 0 ? -1 : own > left ? own : left;
            }
        }
        place.visits = attn_visits(p.mask, left, place.first_position + place.t0,
                                   place.first_position + place.t0 + plan.queries - 1, place.keys);
    }
    i64 const size = attn_part_keys(place.visits.count);
    place.first = part * size;
    place.last = clamped(place.first + size, 0, place.visits.count);
    return place;
}

struct Key {
    i64 k_at, v_at, entry;
    int key;
    i64 outer, inner;  // its place in the cache: sequence or page, and token
};

LSM_DEVICE i64 row_at(Rows const& rows, Place const& place, Key const& key) {
    return key.outer * rows.batch + key.inner * rows.time + place.kv_head * rows.head;
}

// The key that is visited i-th.
LSM_DEVICE Key find_key(SparseAttnParams const& p, Place const& place, i64 i) {
    i64 key = -1, entry = 0;
    if (i < place.last) {
        if (place.listed) {
            entry = place.list_at + i / p.lists.block_k;
            key = static_cast<i64>(load_global(p.lists.index + entry)) * p.lists.block_k +
                  i % p.lists.block_k;
        } else {
            key = place.visits.key(i);
        }
    }
    if (key >= place.keys) key = -1;
    i64 outer = place.b, inner = key;
    if (key >= 0 && p.block_table != nullptr) {
        inner = key % p.page_size;
        outer = load_global(p.block_table + place.b * p.max_pages + key / p.page_size);
        if (outer < 0 || outer >= p.pages) key = -1;
    }
    Key found = {0, 0, entry, key < 0 ? -1 : static_cast<int>(key), outer, inner};
    found.k_at = row_at(p.k, place, found), found.v_at = row_at(p.v, place, found);
    return found;
}

// Where the keys of a step lie.
template <int Keys, bool kCodes>
LSM_DEVICE void find_keys(SparseAttnParams const& p, Place const& place, i64 first,
                          Step<Keys, kCodes>& step) {
    for (int n = threadIdx.x; n < Keys; n += kThreads) {
        Key const key = find_key(p, place, first + n);
        step.key[n] = key.key, step.entry[n] = key.entry;
        step.k_at[n] = key.k_at, step.v_at[n] = key.v_at;
        if constexpr (kCodes) {
            step.k_affine_at[n] = row_at(p.k_affine, place, key);
            step.v_affine_at[n] = row_at(p.v_affine, place, key);
        }
    }
}

}  // namespace lsm::decode_attn
