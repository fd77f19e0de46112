// Attention in products of pairs: rows of bf16 as they want them, and blocks of keys and values that are kept so.
#pragma once

#include "arena.h"
#include "pairs.h"
#include "sparse_attn_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Whether all products of a call can be of pairs; the backward contracts over values' columns too.
template <class T>
bool takes_pairs(SparseAttnParams const& p, bool backward) {
    return kPairProducts && std::is_same_v<T, float> && p.dtype == Dtype::bf16 &&
           p.K % kPairDepth == 0 && p.V % (backward ? kPairDepth : kLanes<T>) == 0 &&
           has_pair_products();
}

// multiply_pairs for numbers of any type: pairs of bf16 lie in room for a number each.
template <class T>
void multiply_by_pairs(T* C, int64_t c_row, void const* A, int64_t a_bytes, T const* B,
                       int64_t b_row, int64_t rows, int64_t vectors, int64_t depth, bool add) {
    if constexpr (kPairProducts && std::is_same_v<T, float>)
        multiply_pairs(C, c_row, A, a_bytes, reinterpret_cast<Pair const*>(B), b_row, rows, vectors,
                       depth, add);
}

inline int64_t pair_depth(int64_t count) {
    return (count + kPairDepth - 1) / kPairDepth * kPairDepth;
}

// Rows of bf16 two by two, their numbers side by side: [pair_depth(count) / 2][columns], zeros behind the last row.
template <class T, class Row>
void pair_rows(T* to, int64_t columns, int64_t count, Row const& row) {
    for (int64_t i = 0; i < pair_depth(count); i += 2, to += columns) {
        auto const numbers = [&](int64_t of, int64_t c) {
            if (of >= count) return Bits{};
            return spread_halves(reinterpret_cast<Bf16 const*>(row(of)) + c);
        };
        for (int64_t c = 0; c < columns; c += kLanes<float>) {
            Bits const both = numbers(i, c) | numbers(i + 1, c) << 16;
            std::memcpy(to + c, &both, sizeof(both));
        }
    }
}

// Whether rows of bf16 are, whole vectors in room for numbers.
template <class T>
bool all_finite_pairs(T const* x, int64_t count) {
    Bits infinite{};
    for (int64_t i = 0; i < count; i += kLanes<T>) {
        Bits const pairs = load_bytes<Bits>(x + i);
        infinite |= Bits((pairs & 0x7f80) == 0x7f80) | Bits((pairs & 0x7f800000) == 0x7f800000);
    }
    for (int i = 0; i < kLanes<float>; ++i)
        if (infinite[i] != 0) return false;
    return true;
}

// Keys and values of blocks as the forward's products of pairs want them, packed once for all tiles that a thread goes
// through: blocks of one key/value head, the first ones asked for that have room. Kept from task to task, in scratch that
// begins with zeros before a thread's first.
template <class T>
class PackedBlocks {
  public:
    void take(Arena<T>& arena, SparseAttnParams const& p, int64_t K, int64_t V) {
        int64_t const keys = p.lists.block_k;
        auto const bytes = [&](int64_t count) { return panels(count, int64_t(sizeof(T))); };
        blocks_ = panels(p.Tk, keys);
        size_ = (keys * K + pair_depth(keys) * V) / 2;
        room_ = min_of(blocks_, kBytes / (size_ * int64_t(sizeof(T))));
        kept_ = reinterpret_cast<Kept*>(arena.take(bytes(sizeof(Kept))));
        slots_ = reinterpret_cast<int32_t*>(arena.take(bytes(blocks_ * int64_t(sizeof(int32_t)))));
        packs_ = arena.take((room_ + 1) * size_);
    }

    struct Pack {
        T* at;
        bool filled;
    };
    // Of a block of the task's head, or, with -1, one that is not kept.
    Pack of(SparseAttnTask const& task, int64_t block) {
        if (!kept_->any || kept_->batch != task.batch || kept_->kv_head != task.kv_head ||
            kept_->first_k != task.first_k) {
            *kept_ = {true, 0, task.batch, task.kv_head, task.first_k};
            std::fill(slots_, slots_ + blocks_, int32_t(-1));
        }
        int64_t slot = block < 0 ? -1 : slots_[block];
        bool const filled = slot >= 0;
        if (!filled && block >= 0 && kept_->count < room_) slot = slots_[block] = kept_->count++;
        return {packs_ + (slot < 0 ? room_ : slot) * size_, filled};
    }

  private:
    static constexpr int64_t kBytes = int64_t(1) << 20;  // half of a second-level cache
    struct Kept {
        bool any;
        int32_t count;
        int64_t batch, kv_head, first_k;
    };
    Kept* kept_;
    int32_t* slots_;  // of every block; -1: not kept
    T* packs_;        // the last one is for those that are not
    int64_t blocks_, room_, size_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
