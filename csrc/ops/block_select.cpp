// Block selection's operators: check, allocate, fill the params, run. Compiled once per backend.
#include "params/block_select.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "ops/layout.h"

namespace lsm {
namespace {

using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

// The tensors a call reads, kept alive beside the params that point into them.
struct Call {
    std::vector<Tensor> kept;
    ScoreParams p{};
    BlockChoice choice{};

    void const* keep(OptionalTensor const& t) {
        if (!t) return nullptr;
        kept.push_back(as_contiguous(*t));
        return kept.back().const_data_ptr();
    }
    Rows keep_rows(Tensor const& t) {
        kept.push_back(kernel_layout(t));
        return rows(kept.back());
    }
};

void check_tensor(Checks const& c, OptionalTensor const& t, char const* arg, char const* dims,
                  std::initializer_list<int64_t> shape, ScalarType type, Tensor const& like,
                  char const* like_arg) {
    if (!t) return;
    c.shape(*t, arg, dims, shape);
    c.dtype(*t, arg, type);
    c.device(*t, arg, like, like_arg);
}

template <class Params>
int64_t boundary(Params const& p, void const* cu, int64_t i) {
    return p.cu_seqlens_is_64bit ? static_cast<int64_t const*>(cu)[i]
                                 : static_cast<int32_t const*>(cu)[i];
}

// Where each sequence's rows begin: `first` of a sequence of so many tokens has rows(tokens) of them.
template <class Params, class RowsOf>
void check_rows(Checks const& c, Params const& p, void const* cu, int32_t const* first,
                char const* arg, RowsOf const& rows) {
    int64_t at = 0;
    for (int64_t n = 0; n <= p.N; ++n) {
        c.require(first[n] == at, arg, " must say where each sequence's rows begin, ", at,
                  " for sequence ", n, ", got ", first[n]);
        if (n < p.N) at += rows(boundary(p, cu, n + 1) - boundary(p, cu, n));
    }
}

// rule: softmax, group, causal, offset, q_stride, q_length, key_stride, key_length, block_q, block_k, tap_step, tap_first,
// tap_count, tap_max, blocks.
void read_rule(Checks const& c, Ints const& rule, ScoreParams& p) {
    c.require(rule.size() == 15, "rule must have 15 numbers, got ", rule.size());
    p.softmax = rule[0] != 0, p.group = rule[1] != 0, p.causal = rule[2] != 0;
    p.offset = rule[3], p.q_stride = rule[4], p.q_length = rule[5];
    p.key_stride = rule[6], p.key_length = rule[7], p.block_q = rule[8], p.block_k = rule[9];
    p.tap_step = rule[10], p.tap_first = rule[11], p.tap_count = rule[12];
    p.tap_max = rule[13] != 0, p.blocks = rule[14];
    c.require(p.q_stride >= 1 && p.q_length >= 1 && p.key_stride >= 1 && p.key_length >= 1,
              "strides and lengths must be at least 1, got q_stride ", p.q_stride, ", q_length ",
              p.q_length, ", key_stride ", p.key_stride, ", key_length ", p.key_length);
    c.require(p.block_q >= 1 && p.block_k >= 1, "block_q and block_k must be at least 1, got ",
              p.block_q, " and ", p.block_k);
    c.require(p.tap_step >= 1 && p.tap_count >= 1,
              "tap_step and the number of taps must be at least 1, got ", p.tap_step, " and ",
              p.tap_count);
    constexpr int64_t kMost = int64_t{1} << 31;  // so that places are sums of numbers that fit
    c.require(std::max({p.tap_step, p.tap_count, std::abs(p.tap_first), p.blocks}) < kMost,
              "tap_step, tap_first, the number of taps and blocks must be below 2^31, got ",
              p.tap_step, ", ", p.tap_first, ", ", p.tap_count, " and ", p.blocks);
    c.require(p.blocks >= 0, "blocks must not be negative, got ", p.blocks);
}

// choice: top_k, first, local, capacity. cuts: top_p, threshold.
BlockChoice read_choice(Checks const& c, Ints const& choice, Floats const& cuts) {
    c.require(choice.size() == 4, "choice must have 4 numbers, got ", choice.size());
    c.require(cuts.size() == 2, "cuts must have 2 numbers, got ", cuts.size());
    BlockChoice made{choice[0], choice[1], choice[2], choice[3], cuts[0], cuts[1]};
    c.require(made.top_k >= 0 && made.first >= 0 && made.local >= 0 && made.capacity >= 0,
              "top_k, first, local and capacity must not be negative, got ", show(choice));
    c.require(made.top_p >= 0 && made.top_p <= 1, "top_p must be in [0, 1], got ", made.top_p);
    return made;
}

// Boundaries of packed sequences, rows of the map, lengths. `q` has shape [B, Tq, ..].
void read_sequences(Checks const& c, Call& call, Tensor const& q, char const* q_arg,
                    OptionalTensor const& cu_q, OptionalTensor const& cu_rows,
                    OptionalTensor const& lengths) {
    ScoreParams& p = call.p;
    p.N = p.B;
    c.require(cu_q.has_value() == cu_rows.has_value(),
              "cu_seqlens_q and cu_rows come together or not at all");
    c.require(!lengths || !cu_q, "lengths are for a batch, not for packed sequences");
    check_tensor(c, lengths, "lengths", "[B]", {p.B}, ScalarType::Int, q, q_arg);
    p.lengths = static_cast<int32_t const*>(call.keep(lengths));
    p.rows = (p.Tq + p.block_q - 1) / p.block_q;
    if (!cu_q) return;
    p.N = cu_q->size(0) - 1;
    p.cu_seqlens_is_64bit = cu_q->scalar_type() == ScalarType::Long;
    p.cu_seqlens_q = call.keep(cu_q);
    check_tensor(c, cu_rows, "cu_rows", "[N + 1]", {p.N + 1}, ScalarType::Int, q, q_arg);
    p.cu_rows = static_cast<int32_t const*>(call.keep(cu_rows));
    p.rows = p.Tq / p.block_q + p.N;
    if (kReadsValues && !kTensorCores)
        check_rows(c, p, p.cu_seqlens_q, p.cu_rows, "cu_rows",
                   [&](int64_t tokens) { return (tokens + p.block_q - 1) / p.block_q; });
}

Call prepare(Checks const& c, Tensor const& q, Tensor const& k, OptionalTensor const& lse,
             OptionalTensor const& taps, OptionalTensor const& cu_q, OptionalTensor const& cu_k,
             OptionalTensor const& cu_rows, OptionalTensor const& lengths, double scale,
             Ints const& rule) {
    c.rank(q, "q", "[B, Tq, Hq, K]", 4);
    check_floating(c, q);
    c.rank(k, "k", "[B, Tk, Hk, K]", 4);
    c.require(k.size(0) == q.size(0) && k.size(3) == q.size(3),
              "k must have shape [B, Tk, Hk, K] with B = ", q.size(0), " and K = ", q.size(3),
              " like q, got ", show(k.sizes()));
    c.require(k.size(2) > 0 && q.size(2) > 0 && q.size(2) % k.size(2) == 0,
              "q must have a multiple of the Hk = ", k.size(2),
              " heads of k, got Hq = ", q.size(2));
    c.require(q.size(3) > 0, "K must be at least 1, got 0");
    c.dtype(k, "k", q.scalar_type(), " like q");
    c.device(k, "k", q, "q");
    c.require(cu_q.has_value() == cu_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k come together or not at all");
    check_cu_seqlens(c, cu_q, q, "q", "cu_seqlens_q");
    if (cu_k) {
        // Pooled keys may end before their tensor does.
        c.require(cu_k->dim() == 1 && cu_k->size(0) == cu_q->size(0),
                  "cu_seqlens_k must have N + 1 = ", cu_q->size(0),
                  " boundaries like cu_seqlens_q, got ", show(cu_k->sizes()));
        c.dtype(*cu_k, "cu_seqlens_k", cu_q->scalar_type(), " like cu_seqlens_q");
        c.device(*cu_k, "cu_seqlens_k", q, "q");
    }
    Call call;
    ScoreParams& p = call.p;
    read_rule(c, rule, p);
    p.dtype = to_dtype(q.scalar_type()), p.acc_dtype = to_dtype(state_type(q));
    p.B = q.size(0), p.Tq = q.size(1), p.Hq = q.size(2), p.K = q.size(3);
    p.Tk = k.size(1), p.Hk = k.size(2), p.scale = scale;
    p.heads = p.group ? p.Hk : p.Hq;
    read_sequences(c, call, q, "q", cu_q, cu_rows, lengths);
    p.cu_seqlens_k = call.keep(cu_k);
    if (cu_k && kReadsValues) {
        for (int64_t n = 0; n <= p.N; ++n) {
            int64_t const at = boundary(p, p.cu_seqlens_k, n);
            int64_t const before = n > 0 ? boundary(p, p.cu_seqlens_k, n - 1) : 0;
            c.require(at >= before && at <= p.Tk, "cu_seqlens_k must ascend within [0, ", p.Tk,
                      "], got ", at, " at position ", n);
        }
    }
    check_tensor(c, lse, "lse", "[B, Hq, Tq]", {p.B, p.Hq, p.Tq}, state_type(q), q, "q");
    check_tensor(c, taps, "taps", "[taps]", {p.tap_count}, state_type(q), q, "q");
    p.lse = call.keep(lse), p.taps = call.keep(taps);
    Tensor const padded_q = kTensorCores ? pad_last(q, padding(q)) : q;
    Tensor const padded_k = kTensorCores ? pad_last(k, padding(k)) : k;
    p.K = padded_q.size(3);
    p.q = call.keep_rows(padded_q), p.k = call.keep_rows(padded_k);
    return call;
}

Tensor run_scores(Tensor const& q, Tensor const& k, OptionalTensor const& lse,
                  OptionalTensor const& taps, OptionalTensor const& cu_q,
                  OptionalTensor const& cu_k, OptionalTensor const& cu_rows,
                  OptionalTensor const& lengths, double scale, Ints rule) {
    Checks const c("block_scores");
    Call call = prepare(c, q, k, lse, taps, cu_q, cu_k, cu_rows, lengths, scale, rule);
    ScoreParams& p = call.p;
    DeviceScope const scope(q);
    Tensor map = empty({p.B, p.heads, p.rows, p.blocks}, state_type(q), q);
    p.scores = map.mutable_data_ptr();
    if (map.numel() == 0) return map;
    Tensor scratch = workspace(block_scores_workspace(p), q);
    block_scores(p, scratch.mutable_data_ptr(), scope.stream());
    return map;
}

Tensor run_select(Tensor const& q, Tensor const& k, OptionalTensor const& lse,
                  OptionalTensor const& taps, OptionalTensor const& cu_q,
                  OptionalTensor const& cu_k, OptionalTensor const& cu_rows,
                  OptionalTensor const& lengths, double scale, Ints rule, Ints choice,
                  Floats cuts) {
    Checks const c("block_select");
    Call call = prepare(c, q, k, lse, taps, cu_q, cu_k, cu_rows, lengths, scale, rule);
    ScoreParams& p = call.p;
    call.choice = read_choice(c, choice, cuts);
    int64_t const keys = std::min(p.blocks * p.tap_step + p.tap_count, p.Tk);
    c.require(keys + p.blocks <= most_scores(), "a row's ", keys, " keys and ", p.blocks,
              " blocks are beyond the CUDA kernel (supported: ", most_scores(),
              " together); use block_scores and block_topk");
    DeviceScope const scope(q);
    Tensor index = empty({p.B, p.heads, p.rows, call.choice.capacity}, ScalarType::Int, q);
    if (index.numel() == 0) return index;
    p.index = static_cast<int32_t*>(index.mutable_data_ptr());
    Tensor scratch = workspace(block_scores_workspace(p), q);
    select_blocks(p, call.choice, scratch.mutable_data_ptr(), scope.stream());
    return index;
}

Tensor run_topk(Tensor const& map, OptionalTensor const& cu_q, OptionalTensor const& cu_rows,
                OptionalTensor const& lengths, int64_t Tq, Ints rule, Ints choice, Floats cuts) {
    Checks const c("block_topk");
    c.rank(map, "scores", "[B, heads, rows, blocks]", 4);
    auto const type = map.scalar_type();
    c.require(type == ScalarType::Float || (!kTensorCores && type == ScalarType::Double),
              "scores must have dtype float32", kTensorCores ? "" : " or float64", ", got ",
              name(type));
    Call call;
    ScoreParams& p = call.p;
    read_rule(c, rule, p);
    p.dtype = p.acc_dtype = to_dtype(type);
    p.B = map.size(0), p.heads = map.size(1), p.Tq = Tq, p.blocks = map.size(3);
    p.Hq = p.Hk = p.heads;
    if (cu_q) {
        c.require(cu_q->dim() == 1 && cu_q->size(0) >= 1,
                  "cu_seqlens_q must have shape [N + 1], got ", show(cu_q->sizes()));
        c.require(p.B == 1, "cu_seqlens_q needs one batch row, got B = ", p.B);
        c.device(*cu_q, "cu_seqlens_q", map, "scores");
    }
    read_sequences(c, call, map, "scores", cu_q, cu_rows, lengths);
    c.require(map.size(2) == p.rows, "scores must have ", p.rows, " rows for Tq = ", Tq,
              " queries, got ", map.size(2));
    call.choice = read_choice(c, choice, cuts);
    DeviceScope const scope(map);
    Tensor index = empty({p.B, p.heads, p.rows, call.choice.capacity}, ScalarType::Int, map);
    if (index.numel() == 0) return index;
    p.scores = const_cast<void*>(call.keep(map));
    p.index = static_cast<int32_t*>(index.mutable_data_ptr());
    choose_blocks(p, call.choice, scope.stream());
    return index;
}

PoolParams read_pool(Checks const& c, Call& call, Tensor const& x, OptionalTensor const& cu,
                     OptionalTensor const& cu_blocks, OptionalTensor const& lengths, int64_t length,
                     int64_t stride, int64_t kind, bool partial) {
    c.rank(x, "x", "[B, T, H, K]", 4);
    check_floating(c, x, "x");
    c.require(length >= 1 && stride >= 1, "length and stride must be at least 1, got ", length,
              " and ", stride);
    c.require(kind >= 0 && kind <= 3, "pool must be 0 to 3, got ", kind);
    check_cu_seqlens(c, cu, x, "x");
    c.require(cu.has_value() == cu_blocks.has_value(),
              "cu_seqlens and cu_blocks come together or not at all");
    c.require(!lengths || !cu, "lengths are for a batch, not for packed sequences");
    PoolParams p{};
    p.dtype = to_dtype(x.scalar_type()), p.pool = static_cast<Pool>(kind);
    p.B = x.size(0), p.T = x.size(1), p.H = x.size(2), p.K = x.size(3), p.N = p.B;
    p.length = length, p.stride = stride, p.partial = partial;
    auto const windows = [&](int64_t tokens) {
        if (partial) return (tokens + stride - 1) / stride;
        return tokens < length ? 0 : (tokens - length) / stride + 1;
    };
    check_tensor(c, lengths, "lengths", "[B]", {p.B}, ScalarType::Int, x, "x");
    p.lengths = static_cast<int32_t const*>(call.keep(lengths));
    for (int64_t b = 0; kReadsValues && lengths && b < p.B; ++b)
        c.require(p.lengths[b] >= 0 && p.lengths[b] <= p.T, "lengths must be in [0, ", p.T,
                  "], got ", p.lengths[b], " for sequence ", b);
    p.blocks = windows(p.T);
    if (cu) {
        p.N = cu->size(0) - 1;
        p.cu_seqlens_is_64bit = cu->scalar_type() == ScalarType::Long;
        p.cu_seqlens = call.keep(cu);
        check_tensor(c, cu_blocks, "cu_blocks", "[N + 1]", {p.N + 1}, ScalarType::Int, x, "x");
        p.cu_blocks = static_cast<int32_t const*>(call.keep(cu_blocks));
        p.blocks = p.T / stride + p.N;
        if (kReadsValues && !kTensorCores)
            check_rows(c, p, p.cu_seqlens, p.cu_blocks, "cu_blocks", windows);
    }
    return p;
}

int64_t pooled_columns(PoolParams const& p) {
    return p.pool == Pool::bounds ? 2 * p.K : p.K;
}

Tensor run_pool(Tensor const& x, OptionalTensor const& cu, OptionalTensor const& cu_blocks,
                OptionalTensor const& lengths, int64_t length, int64_t stride, int64_t kind,
                bool partial) {
    Checks const c("block_pool");
    Call call;
    PoolParams p = read_pool(c, call, x, cu, cu_blocks, lengths, length, stride, kind, partial);
    DeviceScope const scope(x);
    Tensor const tokens = last_contiguous(x);
    Tensor y = empty({p.B, p.blocks, p.H, pooled_columns(p)}, x.scalar_type(), x);
    p.x = rows(tokens), p.y = rows(y);
    if (y.numel() != 0) block_pool(p, scope.stream());
    return y;
}

Tensor run_pool_backward(Tensor const& x, OptionalTensor const& cu, OptionalTensor const& cu_blocks,
                         OptionalTensor const& lengths, int64_t length, int64_t stride,
                         int64_t kind, bool partial, Tensor const& y, Tensor const& grad_y) {
    Checks const c("block_pool_bwd");
    Call call;
    PoolParams p = read_pool(c, call, x, cu, cu_blocks, lengths, length, stride, kind, partial);
    std::initializer_list<int64_t> const shape = {p.B, p.blocks, p.H, pooled_columns(p)};
    check_tensor(c, y, "y", "[B, blocks, H, columns]", shape, x.scalar_type(), x, "x");
    check_tensor(c, grad_y, "grad_y", "[B, blocks, H, columns]", shape, x.scalar_type(), x, "x");
    DeviceScope const scope(x);
    Tensor const tokens = last_contiguous(x), pooled = last_contiguous(y),
                 grads = last_contiguous(grad_y);
    Tensor dx = empty(x.sizes(), x.scalar_type(), x);
    p.x = rows(tokens), p.y = rows(pooled), p.grad_y = rows(grads), p.dx = rows(dx);
    if (dx.numel() == 0) return dx;
    Tensor scratch = workspace(block_pool_bwd_workspace(p), x);
    block_pool_bwd(p, scratch.mutable_data_ptr(), scope.stream());
    return dx;
}

}  // namespace
}  // namespace lsm

STABLE_TORCH_LIBRARY_IMPL(LSM_NAMESPACE, LSM_DISPATCH_KEY, m) {
    using namespace lsm;
    m.impl("block_pool", TORCH_BOX(&run_pool));
    m.impl("block_pool_bwd", TORCH_BOX(&run_pool_backward));
    m.impl("block_scores", TORCH_BOX(&run_scores));
    m.impl("block_select", TORCH_BOX(&run_select));
    m.impl("block_topk", TORCH_BOX(&run_topk));
}
