// The sparse attention engine's operators: check, allocate, fill the params, run. Compiled once per backend.
#include "params/sparse_attn.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
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

void check_tensor(Checks const& c, OptionalTensor const& t, char const* arg, char const* dims,
                  std::initializer_list<int64_t> shape, ScalarType type, Tensor const& q) {
    if (!t) return;
    c.shape(*t, arg, dims, shape);
    c.dtype(*t, arg, type);
    c.device(*t, arg, q, "q");
}

// Queries against keys and values, or the pages of a cache; in codes of so many bits, or 0.
void check_attention(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v, bool paged,
                     int64_t code_bits = 0) {
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
AttnMask read_mask(Checks const& c, Ints const& mask) {
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

bool is_block(int64_t n) {
    return n >= 16 && n <= 128 && (n & (n - 1)) == 0;
}

// blocks: heads of the lists, block_q, block_k.
BlockLists read_lists(Checks const& c, Arguments const& a, Tensor const& q, int64_t Hkv,
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

int64_t boundary(SparseAttnParams const& p, void const* cu, int64_t n) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(cu)[n]
                                 : static_cast<int32_t const*>(cu)[n];
}

// Whether lists can be read by them at all. CUDA kernels, and so the emulator's, answer bad boundaries with NaN.
bool in_order(SparseAttnParams const& p, void const* cu, int64_t T) {
    if (cu == nullptr) return true;
    bool ok = boundary(p, cu, 0) == 0 && boundary(p, cu, p.N) == T;
    for (int64_t n = 0; n < p.N; ++n) ok = ok && boundary(p, cu, n) <= boundary(p, cu, n + 1);
    return ok;
}

// Blocks [begin, end) of a list: ascending, each once, of the sequence's `blocks`.
void check_list(Checks const& c, int32_t const* begin, int32_t const* end, int64_t blocks,
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

void check_cache(Checks const& c, SparseAttnParams const& p) {
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

// ---- Params ----

void read_scores(Checks const& c, Arguments const& a, Tensor const& q, Inputs& in) {
    SparseAttnParams& p = in.p;
    auto const wide = state_type(q);
    c.require(a.scores.size() == 4, "scores must have 4 numbers, got ", a.scores.size());
    p.scale = a.scores[0], p.softcap = a.scores[1], p.ramp_length = a.scores[2];
    p.pv_threshold = a.scores[3];
    c.require(p.pv_threshold >= 0, "pv_threshold must not be negative, got ", p.pv_threshold);
    c.require(p.softcap >= 0, "softcap must not be negative, got ", p.softcap);
    c.require(!a.ramp || p.ramp_length > 0, "ramp_length must be above 0, got ", p.ramp_length);
    check_tensor(c, a.head_left, "head_left", "[Hq]", {p.Hq}, ScalarType::Int, q);
    check_tensor(c, a.sink_logits, "sink_logits", "[Hq]", {p.Hq}, wide, q);
    check_tensor(c, a.alibi_slopes, "alibi_slopes", "[Hq]", {p.Hq}, wide, q);
    check_tensor(c, a.ramp, "ramp", "[Hq]", {p.Hq}, wide, q);
    p.mask = read_mask(c, a.mask);
    p.mask.head_left = in.keep<int32_t>(a.head_left);
    p.sink_logits = in.keep(a.sink_logits);
    p.alibi_slopes = in.keep(a.alibi_slopes);
    p.ramp = in.keep(a.ramp);
}

// CUDA kernels read codes by 8 bytes.
Tensor codes_layout(Tensor const& t) {
    if (!kTensorCores) return last_contiguous(t);
    bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 8 == 0 && t.stride(3) == 1;
    for (int64_t d = 0; d < 3; ++d) ok = ok && t.stride(d) % 8 == 0;
    return ok ? t : contiguous_copy(t);
}

Inputs prepare(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
               Arguments const& a, bool codes = false) {
    Inputs in{kernel_layout(q),
              codes ? codes_layout(k) : kernel_layout(k),
              codes ? codes_layout(v) : kernel_layout(v),
              {},
              {}};
    SparseAttnParams& p = in.p;
    p.dtype = to_dtype(q.scalar_type()), p.acc_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.Tq = q.size(1), p.Tk = k.size(1), p.Hq = q.size(2), p.Hkv = k.size(2);
    p.K = q.size(3), p.V = v.size(3), p.N = p.B;
    p.q = rows(in.q), p.k = rows(in.k), p.v = rows(in.v);
    read_scores(c, a, q, in);
    return in;
}

Inputs prepare_sequences(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                         OptionalTensor const& cu_q, OptionalTensor const& cu_k,
                         Arguments const& a) {
    check_attention(c, q, k, v, false);
    c.require(cu_q.has_value() == cu_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k come together or not at all");
    check_cu_seqlens(c, cu_q, q, "q", "cu_seqlens_q");
    check_cu_seqlens(c, cu_k, k, "k", "cu_seqlens_k");
    if (cu_q) {
        c.require(cu_k->size(0) == cu_q->size(0), "cu_seqlens_k must have N + 1 = ", cu_q->size(0),
                  " boundaries like cu_seqlens_q, got ", cu_k->size(0));
        c.dtype(*cu_k, "cu_seqlens_k", cu_q->scalar_type(), " like cu_seqlens_q");
    }
    Inputs in = prepare(c, q, k, v, a);
    SparseAttnParams& p = in.p;
    if (cu_q) {
        p.N = cu_q->size(0) - 1;
        p.cu_seqlens_is_64bit = cu_q->scalar_type() == ScalarType::Long;
        p.cu_seqlens_q = in.keep(cu_q), p.cu_seqlens_k = in.keep(cu_k);
    }
    p.lists = read_lists(c, a, q, p.Hkv, cu_q.has_value(), in);
    if (!checks_lists() || p.lists.index == nullptr) return in;
    Readable lists{p};
    lists.move_lists(a);
    lists.move(cu_q, lists.p.cu_seqlens_q), lists.move(cu_k, lists.p.cu_seqlens_k);
    SparseAttnParams const& r = lists.p;
    if (in_order(r, r.cu_seqlens_q, p.Tq) && in_order(r, r.cu_seqlens_k, p.Tk)) {
        check_lists(c, r, [&](int64_t n) {
            int64_t const keys = r.cu_seqlens_k != nullptr ? boundary(r, r.cu_seqlens_k, n + 1) -
                                                                 boundary(r, r.cu_seqlens_k, n)
                                                           : p.Tk;
            return (keys + p.lists.block_k - 1) / p.lists.block_k;
        });
    }
    return in;
}

// What turns the codes of a cache into numbers.
struct Codes {
    Tensor const &k_affine, &v_affine;
};

// Of a cache of codes, 0 of one of numbers.
int64_t code_bits(Checks const& c, Tensor const& q, Tensor const& k, Codes const* codes) {
    if (codes == nullptr) return 0;
    c.rank(q, "q", "[B, Tq, Hq, K]", 4);
    c.rank(k, "k", "[B, Tk, Hkv, K] or [B, Tk, Hkv, K / 2]", 4);
    int64_t const K = q.size(3);
    c.require(k.size(3) == K || 2 * k.size(3) == K,
              "k must have a byte of codes for each of the K = ", K,
              " numbers of q, or for two, got ", k.size(3), " bytes");
    return k.size(3) == K ? 8 : 4;
}

void read_codes(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                Codes const& codes, Inputs& in) {
    SparseAttnParams& p = in.p;
    p.V = v.size(3) * (8 / p.code_bits);
    if (kTensorCores)
        c.require(p.K % 16 == 0 && p.V % 16 == 0,
                  "K and V must be multiples of 16 for the CUDA kernels to read codes, got K = ",
                  p.K, ", V = ", p.V);
    auto const affine = [&](Tensor const& t, char const* arg, Tensor const& like) {
        c.shape(t, arg, "like the codes, of 2 numbers",
                {like.size(0), like.size(1), like.size(2), 2});
        c.dtype(t, arg, state_type(q));
        c.device(t, arg, q, "q");
        in.others.push_back(last_contiguous(t));
        return rows(in.others.back());
    };
    p.k_affine = affine(codes.k_affine, "k_affine", k);
    p.v_affine = affine(codes.v_affine, "v_affine", v);
}

Inputs prepare_cache(Checks const& c, Tensor const& q, Tensor const& k, Tensor const& v,
                     Codes const* codes, OptionalTensor const& cache_seqlens,
                     OptionalTensor const& block_table, Arguments const& a) {
    int64_t const bits = code_bits(c, q, k, codes);
    check_attention(c, q, k, v, block_table.has_value(), bits);
    Inputs in = prepare(c, q, k, v, a, bits != 0);
    SparseAttnParams& p = in.p;
    p.code_bits = bits;
    if (codes != nullptr) read_codes(c, q, k, v, *codes, in);
    check_tensor(c, cache_seqlens, "cache_seqlens", "[B]", {p.B}, ScalarType::Int, q);
    p.cache_seqlens = in.keep<int32_t>(cache_seqlens);
    if (block_table) {
        c.rank(*block_table, "block_table", "[B, max_pages]", 2);
        c.require(block_table->size(0) == p.B, "block_table must have B = ", p.B,
                  " rows like q, got ", block_table->size(0));
        c.dtype(*block_table, "block_table", ScalarType::Int);
        c.device(*block_table, "block_table", q, "q");
        p.pages = k.size(0), p.page_size = k.size(1), p.max_pages = block_table->size(1);
        p.Tk = p.max_pages * p.page_size;
        p.block_table = in.keep<int32_t>(block_table);
    }
    p.lists = read_lists(c, a, q, p.Hkv, false, in);
    if (!checks_lists()) return in;
    Readable cache{p};
    cache.move_lists(a);
    cache.move(cache_seqlens, cache.p.cache_seqlens), cache.move(block_table, cache.p.block_table);
    check_cache(c, cache.p);
    check_lists(c, cache.p, [&](int64_t n) {
        int64_t const keys = cache_seqlens ? cache.p.cache_seqlens[n] : p.Tk;
        return (keys + p.lists.block_k - 1) / p.lists.block_k;
    });
    return in;
}

// ---- Operators ----

struct Output {
    Tensor o, lse;
};

Output allocate(SparseAttnParams& p, Tensor const& q) {
    Output out{empty({p.B, p.Tq, p.Hq, p.V}, q.scalar_type(), q),
               empty({p.B, p.Hq, p.Tq}, state_type(q), q)};
    p.o = rows(out.o), p.lse = out.lse.mutable_data_ptr();
    return out;
}

std::tuple<Tensor, Tensor> forward(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& cu_q,
    OptionalTensor const& cu_k, OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks) {
    Checks const c("block_sparse_attn_fwd");
    Inputs in = prepare_sequences(c, q, k, v, cu_q, cu_k,
                                  {block_index, block_ptr, block_bias, head_left, sink_logits,
                                   alibi_slopes, ramp, scores, mask, blocks});
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, lse] = forward(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cu_q, cu_k,
                                block_index, block_ptr, block_bias, head_left, sink_logits,
                                alibi_slopes, ramp, scores, mask, blocks);
        return {cut(o, v.size(3)), lse};
    }
    SparseAttnParams& p = in.p;
    DeviceScope const scope(q);
    Output const out = allocate(p, q);
    Tensor scratch = workspace(sparse_attn_fwd_workspace(p), q);
    sparse_attn_fwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {out.o, out.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& cu_q,
    OptionalTensor const& cu_k, OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks, Tensor const& o,
    Tensor const& lse, Tensor const& grad_o, OptionalTensor const& grad_lse) {
    Checks const c("block_sparse_attn_bwd");
    Inputs in = prepare_sequences(c, q, k, v, cu_q, cu_k,
                                  {block_index, block_ptr, block_bias, head_left, sink_logits,
                                   alibi_slopes, ramp, scores, mask, blocks});
    SparseAttnParams& p = in.p;
    c.require(p.pv_threshold == 0, "pv_threshold has no backward, got ", p.pv_threshold);
    auto const type = q.scalar_type(), wide = state_type(q);
    check_tensor(c, o, "o", "[B, Tq, Hq, V]", {p.B, p.Tq, p.Hq, p.V}, type, q);
    check_tensor(c, lse, "lse", "[B, Hq, Tq]", {p.B, p.Hq, p.Tq}, wide, q);
    check_tensor(c, grad_o, "grad_o", "[B, Tq, Hq, V]", {p.B, p.Tq, p.Hq, p.V}, type, q);
    check_tensor(c, grad_lse, "grad_lse", "[B, Hq, Tq]", {p.B, p.Hq, p.Tq}, wide, q);
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [dq, dk, dv, dbias, dsink, dramp] =
            backward(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cu_q, cu_k, block_index,
                     block_ptr, block_bias, head_left, sink_logits, alibi_slopes, ramp, scores,
                     mask, blocks, pad_last(o, dV), lse, pad_last(grad_o, dV), grad_lse);
        return {cut(dq, p.K), cut(dk, p.K), cut(dv, p.V), dbias, dsink, dramp};
    }
    DeviceScope const scope(q);
    Tensor const o_rows = kernel_layout(o), grad_o_rows = kernel_layout(grad_o);
    p.o = rows(o_rows), p.grad_o = rows(grad_o_rows);
    p.lse = const_cast<void*>(in.keep(lse)), p.grad_lse = in.keep(grad_lse);
    Tensor dq = empty(q.sizes(), type, q), dk = empty(k.sizes(), type, q);
    Tensor dv = empty(v.sizes(), type, q);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    auto const gradient = [&](OptionalTensor const& of, void*& pointer) {
        if (!of) return empty({0}, wide, q);
        Tensor grad = empty(of->sizes(), wide, q);
        pointer = grad.mutable_data_ptr();
        return grad;
    };
    Tensor const dbias = gradient(block_bias, p.grad_block_bias);
    Tensor const dsink = gradient(sink_logits, p.grad_sink_logits);
    Tensor const dramp = gradient(ramp, p.grad_ramp);
    Tensor scratch = workspace(sparse_attn_bwd_workspace(p), q);
    sparse_attn_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return {dq, dk, dv, dbias, dsink, dramp};
}

std::tuple<Tensor, Tensor> run_decode(SparseAttnParams& p, Tensor const& q) {
    DeviceScope const scope(q);
    Output const out = allocate(p, q);
    Tensor scratch = workspace(sparse_attn_decode_workspace(p), q);
    sparse_attn_decode(p, scratch.mutable_data_ptr(), scope.stream());
    return {out.o, out.lse};
}

std::tuple<Tensor, Tensor> decode(Tensor const& q, Tensor const& k, Tensor const& v,
                                  OptionalTensor const& cache_seqlens,
                                  OptionalTensor const& block_table,
                                  OptionalTensor const& block_index,
                                  OptionalTensor const& block_ptr, OptionalTensor const& block_bias,
                                  OptionalTensor const& head_left,
                                  OptionalTensor const& sink_logits,
                                  OptionalTensor const& alibi_slopes, OptionalTensor const& ramp,
                                  Floats scores, Ints mask, Ints blocks) {
    Checks const c("sparse_attn_decode");
    Inputs in = prepare_cache(c, q, k, v, nullptr, cache_seqlens, block_table,
                              {block_index, block_ptr, block_bias, head_left, sink_logits,
                               alibi_slopes, ramp, scores, mask, blocks});
    if (needs_padding(q, v)) {
        int64_t const dK = padding(q), dV = padding(v);
        auto [o, lse] = decode(pad_last(q, dK), pad_last(k, dK), pad_last(v, dV), cache_seqlens,
                               block_table, block_index, block_ptr, block_bias, head_left,
                               sink_logits, alibi_slopes, ramp, scores, mask, blocks);
        return {cut(o, v.size(3)), lse};
    }
    return run_decode(in.p, q);
}

std::tuple<Tensor, Tensor> decode_codes(
    Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& k_affine,
    Tensor const& v_affine, OptionalTensor const& cache_seqlens, OptionalTensor const& block_table,
    OptionalTensor const& block_index, OptionalTensor const& block_ptr,
    OptionalTensor const& block_bias, OptionalTensor const& head_left,
    OptionalTensor const& sink_logits, OptionalTensor const& alibi_slopes,
    OptionalTensor const& ramp, Floats scores, Ints mask, Ints blocks) {
    Checks const c("sparse_attn_decode_codes");
    Codes const codes{k_affine, v_affine};
    Inputs in = prepare_cache(c, q, k, v, &codes, cache_seqlens, block_table,
                              {block_index, block_ptr, block_bias, head_left, sink_logits,
                               alibi_slopes, ramp, scores, mask, blocks});
    return run_decode(in.p, q);
}

// Sizes, types and inputs of a merge.
struct Parts {
    Parts(Checks const& c, Tensor const& o_parts, Tensor const& lse_parts)
        : o(as_contiguous(o_parts)), lse(as_contiguous(lse_parts)) {
        c.rank(o_parts, "o", "[parts, B, T, H, V]", 5);
        check_floating(c, o_parts, "o");
        p.parts = o.size(0), p.B = o.size(1), p.T = o.size(2), p.H = o.size(3), p.V = o.size(4);
        c.shape(lse_parts, "lse", "[parts, B, H, T]", {p.parts, p.B, p.H, p.T}, " (like o)");
        c.dtype(lse_parts, "lse", state_type(o));
        c.device(lse_parts, "lse", o, "o");
        p.dtype = p.part_dtype = to_dtype(o.scalar_type());
        p.acc_dtype = to_dtype(state_type(o));
        p.o_parts = o.const_data_ptr(), p.lse_parts = lse.const_data_ptr();
    }
    Tensor o, lse;
    MergeParams p{};
};

std::tuple<Tensor, Tensor> merge(Tensor const& o_parts, Tensor const& lse_parts) {
    Checks const c("merge_attn_states");
    Parts in(c, o_parts, lse_parts);
    MergeParams& p = in.p;
    DeviceScope const scope(o_parts);
    Tensor o = empty({p.B, p.T, p.H, p.V}, o_parts.scalar_type(), o_parts);
    Tensor lse = empty({p.B, p.H, p.T}, state_type(o_parts), o_parts);
    p.o = rows(o), p.lse = lse.mutable_data_ptr();
    merge_attn_states(p, scope.stream());
    return {o, lse};
}

std::tuple<Tensor, Tensor> merge_backward(Tensor const& o_parts, Tensor const& lse_parts,
                                          Tensor const& o, Tensor const& lse, Tensor const& grad_o,
                                          OptionalTensor const& grad_lse) {
    Checks const c("merge_attn_states_bwd");
    Parts in(c, o_parts, lse_parts);
    MergeParams& p = in.p;
    auto const type = o_parts.scalar_type(), wide = state_type(o_parts);
    check_tensor(c, o, "o", "[B, T, H, V]", {p.B, p.T, p.H, p.V}, type, o_parts);
    check_tensor(c, lse, "lse", "[B, H, T]", {p.B, p.H, p.T}, wide, o_parts);
    check_tensor(c, grad_o, "grad_o", "[B, T, H, V]", {p.B, p.T, p.H, p.V}, type, o_parts);
    check_tensor(c, grad_lse, "grad_lse", "[B, H, T]", {p.B, p.H, p.T}, wide, o_parts);
    DeviceScope const scope(o_parts);
    Tensor const whole = last_contiguous(o), grad = last_contiguous(grad_o),
                 whole_lse = as_contiguous(lse);
    OptionalTensor const d_lse = grad_lse ? OptionalTensor(as_contiguous(*grad_lse)) : grad_lse;
    Tensor d_parts = empty(o_parts.sizes(), type, o_parts);
    Tensor d_scores = empty(lse_parts.sizes(), wide, o_parts);
    p.o = rows(whole), p.grad_o = rows(grad);
    p.lse = const_cast<void*>(whole_lse.const_data_ptr());
    if (d_lse) p.grad_lse = d_lse->const_data_ptr();
    p.do_parts = d_parts.mutable_data_ptr(), p.dlse_parts = d_scores.mutable_data_ptr();
    merge_attn_states_bwd(p, scope.stream());
    return {d_parts, d_scores};
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("block_sparse_attn_fwd", TORCH_BOX(&forward));
    m.impl("block_sparse_attn_bwd", TORCH_BOX(&backward));
    m.impl("sparse_attn_decode", TORCH_BOX(&decode));
    m.impl("sparse_attn_decode_codes", TORCH_BOX(&decode_codes));
    m.impl("merge_attn_states", TORCH_BOX(&merge));
    m.impl("merge_attn_states_bwd", TORCH_BOX(&merge_backward));
}
