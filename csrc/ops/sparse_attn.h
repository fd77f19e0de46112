// What the sparse attention operators are called with, and its checks: shapes, masks, lists of blocks, caches.
#pragma once

#include "params/sparse_attn.h"

#include <string>
#include <vector>

#include "ops/layout.h"

namespace lsm {
namespace {

using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

constexpr int64_t kMaxK = 576, kMaxV = 512;  // on a GPU: latent heads

// What the three attention operators share, as they were called.
struct Arguments {
    OptionalTensor const &block_index, &block_ptr, &block_bias, &head_left, &sink_logits,
        &alibi_slopes, &ramp;
    Floats const& scores;
    Ints const &mask, &blocks;
};

// The tensors a call reads, in the layout the kernels want, kept alive beside the params that point into them.
struct Inputs {
    Tensor q, k, v;
    std::vector<Tensor> others;
    SparseAttnParams p{};

    void const* keep(OptionalTensor const& t) {
        if (!t) return nullptr;
        others.push_back(as_contiguous(*t));
        return others.back().const_data_ptr();
    }
    template <class T>
    T const* keep(OptionalTensor const& t) {
        return static_cast<T const*>(keep(t));
    }
};

// ---- Checks of shapes ----

inline void check_tensor(Checks const& c, OptionalTensor const& t, char const* arg,
                         char const* dims, std::initializer_list<int64_t> shape, ScalarType type,
                         Tensor const& q) {
    if (!t) return;
    c.shape(*t, arg, dims, shape);
    c.dtype(*t, arg, type);
    c.device(*t, arg, q, "q");
}

// Queries against keys and values, or the pages of a cache; in codes of so many bits, or 0.
inline void check_attention(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                            bool paged, int64_t code_bits = 0) {
    char const* const k_dims = paged ? "[pages, page_size, Hkv, K]" : "[B, Tk, Hkv, K]";
    char const* const v_dims = paged ? "[pages, page_size, Hkv, V]" : "[B, Tk, Hkv, V]";
    c.rank(q, "q", "[B, Tq, Hq, K]", 4);
    check_floating(c, q);
    c.rank(k, "k", k_dims, 4);
    c.rank(v, "v", v_dims, 4);
    if (code_bits == 0)
        c.require(k.size(3) == q.size(3), "k must have K = ", q.size(3),
                  " like q, got K = ", k.size(3));
    c.require(paged || k.size(0) == q.size(0), "k must have B = ", q.size(0),
              " rows like q, got B = ", k.size(0));
    c.require(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
              "v must have shape ", v_dims, " with all but V like k = ", show(k.sizes()), ", got ",
              show(v.sizes()));
    int64_t const Hq = q.size(2), Hkv = k.size(2), K = q.size(3);
    int64_t const V = v.size(3) * (code_bits == 4 ? 2 : 1);
    c.require(Hkv > 0 && Hq > 0 && Hq % Hkv == 0, "q must have a multiple of the Hkv = ", Hkv,
              " heads of k and v, got Hq = ", Hq);
    c.require(K > 0 && V > 0, "K and V must be at least 1, got K = ", K, ", V = ", V);
    auto const stored = code_bits == 0 ? q.scalar_type() : ScalarType::Byte;
    c.dtype(k, "k", stored, code_bits == 0 ? " like q" : "");
    c.dtype(v, "v", stored, code_bits == 0 ? " like q" : "");
    c.device(k, "k", q, "q");
    c.device(v, "v", q, "q");
    if (!kTensorCores) return;
    c.require(K <= kMaxK, "K = ", K, " is beyond the CUDA kernels (supported: K <= ", kMaxK,
              "); it runs on CPU tensors, or split the heads");
    c.require(V <= kMaxV, "V = ", V, " is beyond the CUDA kernels (supported: V <= ", kMaxV,
              "); it runs on CPU tensors, or split the heads");
}

// mask: causal, align_end, offset, key_stride, key_length, causal_block, prefix, left, right, sinks, dilation.
inline AttnMask read_mask(Checks const& c, Ints const& mask) {
    c.require(mask.size() == 11, "mask must have 11 numbers, got ", mask.size());
    AttnMask m;
    m.causal = mask[0] != 0, m.align_end = mask[1] != 0, m.offset = mask[2];
    m.key_stride = mask[3], m.key_length = mask[4], m.causal_block = mask[5], m.prefix = mask[6];
    m.left = mask[7], m.right = mask[8], m.sinks = mask[9], m.dilation = mask[10];
    c.require(m.key_stride >= 1 && m.key_length >= 1,
              "key_stride and key_length must be at least 1, got ", m.key_stride, " and ",
              m.key_length);
    c.require(m.causal_block >= 1 && m.dilation >= 1,
              "causal_block and dilation must be at least 1, got ", m.causal_block, " and ",
              m.dilation);
    c.require(m.prefix >= 0 && m.sinks >= 0, "prefix and sinks must not be negative, got ",
              m.prefix, " and ", m.sinks);
    return m;
}

inline bool is_block(int64_t n) {
    return n >= 16 && n <= 128 && (n & (n - 1)) == 0;
}

// blocks: heads of the lists, block_q, block_k.
inline BlockLists read_lists(Checks const& c, Arguments const& a, Tensor const& q, int64_t Hkv,
                             bool packed, Inputs& in) {
    c.require(a.blocks.size() == 3, "blocks must have 3 numbers, got ", a.blocks.size());
    BlockLists lists;
    int64_t const B = q.size(0), Tq = q.size(1), Hq = q.size(2);
    if (!a.block_index) {
        c.require(!a.block_ptr && !a.block_bias, "block_ptr and block_bias come with block_index");
        return lists;
    }
    Tensor const& index = *a.block_index;
    lists.heads = a.blocks[0], lists.block_q = a.blocks[1], lists.block_k = a.blocks[2];
    c.require(lists.block_q == 1 || is_block(lists.block_q),
              "block_q must be 1, 16, 32, 64 or 128, got ", lists.block_q);
    c.require(is_block(lists.block_k), "block_k must be 16, 32, 64 or 128, got ", lists.block_k);
    c.require(lists.heads == 1 || lists.heads == Hkv || lists.heads == Hq,
              "lists must be for 1 head, for the Hkv = ", Hkv, " heads of k or for the Hq = ", Hq,
              " heads of q, got ", lists.heads);
    c.dtype(index, "block_index", ScalarType::Int);
    c.device(index, "block_index", q, "q");
    if (a.block_ptr) {
        c.rank(index, "block_index", "[entries], with block_ptr", 1);
        c.rank(*a.block_ptr, "block_ptr", "[B * heads * rows + 1]", 1);
        c.dtype(*a.block_ptr, "block_ptr", ScalarType::Long);
        c.device(*a.block_ptr, "block_ptr", q, "q");
        int64_t const all = a.block_ptr->size(0) - 1, each = B * lists.heads;
        c.require(all >= 0 && (each > 0 ? all % each == 0 : all == 0),
                  "block_ptr must have B * heads * rows + 1 numbers, a multiple of ", each,
                  " and one more, got ", all + 1);
        lists.rows = each > 0 ? all / each : 0;
    } else {
        c.rank(index, "block_index", "[B, heads, rows, capacity]", 4);
        lists.rows = index.size(2), lists.capacity = index.size(3);
        c.require(index.size(0) == B && index.size(1) == lists.heads,
                  "block_index must have shape [B, heads, rows, capacity] with B = ", B,
                  " and heads = ", lists.heads, ", got ", show(index.sizes()));
    }
    int64_t const rows = (Tq + lists.block_q - 1) / lists.block_q;
    c.require(packed || B == 0 || lists.rows == rows, "lists must have ceil(Tq / block_q) = ", rows,
              " rows, got ", lists.rows);
    if (a.block_bias) {
        c.require(show(a.block_bias->sizes()) == show(index.sizes()),
                  "block_bias must have the shape of block_index, ", show(index.sizes()), ", got ",
                  show(a.block_bias->sizes()));
        c.dtype(*a.block_bias, "block_bias", state_type(q));
        c.device(*a.block_bias, "block_bias", q, "q");
    }
    lists.entries = index.numel();
    // Not null where all lists are empty: null says that there are none.
    static int32_t const no_block = -1;
    lists.index = index.numel() > 0 ? in.keep<int32_t>(a.block_index) : &no_block;
    lists.row_ptr = in.keep<int64_t>(a.block_ptr);
    lists.bias = in.keep(a.block_bias);
    return lists;
}

// ---- Checks of values, where reading them is free ----

inline int64_t boundary(SparseAttnParams const& p, void const* cu, int64_t n) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(cu)[n]
                                 : static_cast<int32_t const*>(cu)[n];
}

// Whether lists can be read by them at all. CUDA kernels, and so the emulator's, answer bad boundaries with NaN.
inline bool in_order(SparseAttnParams const& p, void const* cu, int64_t T) {
    if (cu == nullptr) return true;
    bool ok = boundary(p, cu, 0) == 0 && boundary(p, cu, p.N) == T;
    for (int64_t n = 0; n < p.N; ++n) ok = ok && boundary(p, cu, n) <= boundary(p, cu, n + 1);
    return ok;
}

// Blocks [begin, end) of a list: ascending, each once, of the sequence's `blocks`.
inline void check_list(Checks const& c, int32_t const* begin, int32_t const* end, int64_t blocks,
                       bool filled_up, int64_t batch, int64_t head, int64_t row) {
    auto const where = [&] {
        return " in the list of batch row " + std::to_string(batch) + ", head " +
               std::to_string(head) + ", row " + std::to_string(row);
    };
    int64_t last = -1;
    bool ended = false;
    for (int32_t const* at = begin; at < end; ++at) {
        int64_t const block = *at;
        if (filled_up && block == -1) {
            ended = true;
            continue;
        }
        if (!ended && block > last && block < blocks) {  // words are made for errors alone
            last = block;
            continue;
        }
        c.require(!ended, "block_index must have nothing after -1, got block ", block, where());
        c.require(block >= 0 && block < blocks, "block_index must be in [0, ", blocks,
                  "), the key blocks of the sequence, got ", block, where());
        c.require(block > last, "block_index must ascend without repetition, got block ", block,
                  " after ", last, where());
    }
}

// `blocks_of(n)`: key blocks of sequence n.
template <class BlocksOf>
void check_lists(Checks const& c, SparseAttnParams const& p, BlocksOf const& blocks_of) {
    BlockLists const& lists = p.lists;
    if (lists.index == nullptr) return;
    if (int64_t const all = p.B * lists.heads * lists.rows; lists.row_ptr != nullptr) {
        c.require(lists.row_ptr[0] == 0, "block_ptr must start at 0, got ", lists.row_ptr[0]);
        for (int64_t r = 0; r < all; ++r) {
            c.require(lists.row_ptr[r + 1] >= lists.row_ptr[r], "block_ptr must not decrease, got ",
                      lists.row_ptr[r], " before ", lists.row_ptr[r + 1], " at position ", r + 1);
        }
        c.require(lists.row_ptr[all] == lists.entries, "block_ptr must end at the ", lists.entries,
                  " entries of block_index, got ", lists.row_ptr[all]);
    }
    bool const packed = p.cu_seqlens_q != nullptr;
    int64_t first = 0;  // row of this sequence
    for (int64_t n = 0; n < p.N; ++n) {
        int64_t const tokens =
            packed ? boundary(p, p.cu_seqlens_q, n + 1) - boundary(p, p.cu_seqlens_q, n) : p.Tq;
        int64_t const rows = (tokens + lists.block_q - 1) / lists.block_q, batch = packed ? 0 : n;
        if (!packed) first = 0;
        c.require(first + rows <= lists.rows,
                  "lists must have a row for every block_q = ", lists.block_q,
                  " tokens of each sequence, ", first + rows, " or more, got ", lists.rows);
        for (int64_t h = 0; h < lists.heads; ++h) {
            for (int64_t r = first; r < first + rows; ++r) {
                int64_t const list = (batch * lists.heads + h) * lists.rows + r;
                int64_t const begin =
                    lists.row_ptr != nullptr ? lists.row_ptr[list] : list * lists.capacity;
                int64_t const end =
                    lists.row_ptr != nullptr ? lists.row_ptr[list + 1] : begin + lists.capacity;
                check_list(c, lists.index + begin, lists.index + end, blocks_of(n),
                           lists.row_ptr == nullptr, batch, h, r);
            }
        }
        first += rows;
    }
}

inline void check_cache(Checks const& c, SparseAttnParams const& p) {
    for (int64_t b = 0; b < p.B; ++b) {
        int64_t const length = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.Tk;
        c.require(length >= 0 && length <= p.Tk, "cache_seqlens must be in [0, ", p.Tk,
                  "], what the cache has room for, got ", length, " for sequence ", b);
        if (p.block_table == nullptr) continue;
        for (int64_t i = 0; i * p.page_size < length; ++i) {
            int64_t const page = p.block_table[b * p.max_pages + i];
            c.require(page >= 0 && page < p.pages, "block_table must name pages in [0, ", p.pages,
                      "), got ", page, " for page ", i, " of sequence ", b);
        }
    }
}

// Params for the checks above.
struct Readable {
    SparseAttnParams p;
    std::vector<Tensor> kept{};

    template <class T>
    void move(OptionalTensor const& t, T const*& at) {
        if (!t || t->numel() == 0) return;
        kept.push_back(as_contiguous(on_host(*t)));
        at = static_cast<T const*>(kept.back().const_data_ptr());
    }
    void move_lists(Arguments const& a) {
        move(a.block_index, p.lists.index), move(a.block_ptr, p.lists.row_ptr);
    }
};

}  // namespace
}  // namespace lsm
