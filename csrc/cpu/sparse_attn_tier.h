// One instruction set's table of sparse attention (see chunk_tier.h): the forward of a tile of queries, the backward of
// many with the gradients of all the keys they see.
#pragma once

#include "sparse_attn_tile.h"
#include "sparse_attn_tokens.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

template <class T>
class AttnForward {
  public:
    static constexpr int W = kLanes<T>;

    AttnForward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch)
        : p_(p), task_(task), arena_(scratch), tile_(p, task, false) {
        tile_.take(arena_);
        scores_ = arena_.take(p.lists.block_k * kLaneCount);
        turned_ = arena_.take(tile_.V() * kLaneCount);
        output_ = arena_.take(kLaneCount * tile_.V());
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        Tiles const tiles(tile_.pairs());
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            start_softmax();
            while (tile_.next()) {
                tile_.read_keys();
                tile_.pack();
                tile_.scores(scores_, nullptr);
                bool const finite = !tile_.partial() || tile_.finite_values();
                bool const pairs = tile_.pairs() && finite;
                tile_.over_runs([&](Run run) {
                    for (int v = run.begin; v < run.end; ++v) softmax(v, pairs);
                    over_heavy(run, [&](Run heavy) {
                        if (pairs) return tile_.add_paired_values(turned_, heavy);
                        tile_.add_values(turned_, scores_, heavy, finite);
                    });
                });
            }
            finish();
        }
    }

  private:
    void start_softmax() {
        for (int i = 0; i < tile_.vectors() * W; ++i) {
            start_row(p_, tile_.head(i), most_[i], sum_[i]);
            most_[i] /= tile_.score_scale();
        }
        for (int64_t c = 0; c < tile_.V(); ++c)
            std::memset(turned_ + c * kLaneCount, 0, size_t(tile_.vectors() * W) * sizeof(T));
    }

    // f(run) for the vectors of a run whose values count.
    template <class F>
    void over_heavy(Run run, F const& f) const {
        for (int v = run.begin; v < run.end;) {
            int end = v;
            while (end < run.end && heavy_[end] == heavy_[v]) ++end;
            if (heavy_[v]) f(Run{v, end});
            v = end;
        }
    }

    void softmax(int v, bool pairs) {
        Vector<T> const before = load(most_ + v * W);
        Vector<T> most = before, sum = load(sum_ + v * W), highest;
        T* const s = scores_ + v * W;
        T const scale = tile_.score_scale(), slack = T(softmax_slack(p_)) / scale;
        Vector<T> const fade = tile_.pairs()
                                   ? soften<true>(s, tile_.size(), scale, slack, most, sum, highest,
                                                  pairs ? tile_.weight_pairs(v) : nullptr)
                                   : soften(s, tile_.size(), scale, slack, most, sum, highest);
        store(most_ + v * W, most), store(sum_ + v * W, sum);
        heavy_[v] = weighs<T>(p_, (highest - most) * scale, tile_.lanes() - v * W);
        bool moved = false;
        for (int i = 0; i < W; ++i) moved |= most[i] != before[i];
        if (!moved) return;
        T* const o = turned_ + v * W;
        for (int64_t c = 0; c < p_.V; ++c)
            store(o + c * kLaneCount, load(o + c * kLaneCount) * fade);
    }

    void finish() {
        for (int v = 0; v < tile_.vectors(); ++v) {
            Vector<T> const sum = load(sum_ + v * W);
            Vector<T> const share = sum == T(0) ? Vector<T>{} : T(1) / sum;
            store(most_ + v * W, load(most_ + v * W) * tile_.score_scale());
            T* const o = turned_ + v * W;
            for (int64_t c = 0; c < p_.V; ++c)
                store(o + c * kLaneCount, load(o + c * kLaneCount) * share);
        }
        turn(output_, tile_.V(), turned_, kLaneCount, tile_.V(), tile_.vectors() * W);
        tile_.write_outputs(output_, most_, sum_);
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    AttnTile<T> tile_;
    T *scores_, *turned_, *output_;
    // Of each query: the score that weights are relative to, not yet scaled, and the weights' sum.
    T most_[kLaneCount], sum_[kLaneCount];
    bool heavy_[kLaneCount / W];
};

// With s the scores, P = exp(s - lse) and D = rowsum(dO * O) - dlse:
//   dS = scale P (dO V^T - D),  dq = dS k,  dk = dS^T q,  dv = P^T dO
template <class T>
class AttnBackward {
  public:
    static constexpr int W = kLanes<T>;

    AttnBackward(SparseAttnParams const& p, SparseAttnTask const& task, SparseAttnSums const& sums,
                 void* scratch)
        : p_(p),
          task_(task),
          arena_(scratch),
          tile_(p, task, true),
          dk_(static_cast<T*>(sums.dk)),
          dv_(static_cast<T*>(sums.dv)),
          d_bias_(static_cast<T*>(sums.block_bias)),
          d_sink_(static_cast<T*>(sums.sink_logits)),
          d_ramp_(static_cast<T*>(sums.ramp)) {
        int64_t const keys = p.lists.block_k, K = tile_.K(), V = tile_.V();
        tile_.take(arena_);
        arena_.take_each(keys * kLaneCount, weights_, grads_);
        capped_ = p.softcap > 0 ? arena_.take(keys * kLaneCount) : nullptr;
        arena_.take_each(kLaneCount * V, grad_o_, grad_o_turned_, output_);
        dq_ = arena_.take(kLaneCount * K);
        if (!tile_.pairs()) return;
        int64_t const pairs = pair_depth(keys) / 2;
        arena_.take_each(keys * kLaneCount / 2, weight_rows_, grad_rows_);
        arena_.take_each(pairs * kLaneCount, grad_pairs_, grads_by_query_);
        key_pairs_ = arena_.take(pairs * K);
        query_pairs_ = arena_.take(kLaneCount / 2 * K);
        grad_o_pairs_ = arena_.take(kLaneCount / 2 * V);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
        Tiles const tiles(tile_.pairs());
        int64_t const step = tokens_of_tile(p_);
        for (int64_t token = task_.begin; token < task_.end; token += step) {
            tile_.start(token);
            read_gradients();
            while (tile_.next()) block();
            write_query_gradients();
        }
    }

  private:
    void read_gradients() {
        int const lanes = tile_.vectors() * W;
        int64_t const V = tile_.V();
        std::memset(grad_o_, 0, size_t(lanes * V) * sizeof(T));
        for (int i = 0; i < lanes; ++i) lse_[i] = 0, dot_[i] = 0, ramp_sum_[i] = 0;
        tile_.read_gradients(grad_o_, lse_, dot_, d_sink_, output_);
        if (tile_.pairs()) {
            tile_.turn_pairs(grad_o_turned_, p_.grad_o, p_.V);
            tile_.pair_lanes(grad_o_pairs_, p_.grad_o, p_.V);
            tile_.pair_lanes(query_pairs_, p_.q, p_.K);
        } else {
            turn(grad_o_turned_, kLaneCount, grad_o_, V, lanes, V);
        }
        finite_grads_ = all_finite(grad_o_, lanes * V), finite_queries_ = tile_.finite_queries();
        finite_lse_ = all_finite(lse_, lanes);
        std::memset(dq_, 0, size_t(lanes * tile_.K()) * sizeof(T));
    }

    void block() {
        tile_.read_keys();
        tile_.scores(weights_, capped_);
        tile_.over_runs([&](Run run) { tile_.value_products(grads_, grad_o_turned_, run); });
        bool const full = !tile_.partial(), finite_keys = full || tile_.finite_keys();
        // Pairs multiply what no query sees, and queries that see nothing, with weights of 0; where lse is NaN they are not 0.
        bool const finite_rows = finite_grads_ && finite_queries_ && finite_lse_;
        if (tile_.pairs() && ((full && tile_.every_lane()) || (finite_keys && finite_rows)))
            return add_by_pairs();
        if (tile_.pairs() && full) tile_.read_numbers();
        tile_.over_runs([&](Run run) {
            for (int v = run.begin; v < run.end; ++v) softmax<false>(v);
            add(run, full, finite_keys);
        });
    }

    void add(Run run, bool full, bool finite_keys) {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size();
        int64_t const at = run.begin * W, lanes = (run.end - run.begin) * W;
        add_weighed<false>(full || finite_grads_, dv_ + tile_.key() * V, V, weights_ + at,
                           kLaneCount, grad_o_ + at * V, V, keys, V / W, lanes);
        add_weighed<false>(full || finite_queries_, dk_ + tile_.key() * K, K, grads_ + at,
                           kLaneCount, tile_.queries() + at * K, K, keys, K / W, lanes);
        add_weighed<true, true>(finite_keys, dq_ + at * K, K, grads_ + at, kLaneCount, tile_.keys(),
                                K, lanes, K / W, keys);
    }

    void add_by_pairs() {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size();
        if (!tile_.every_lane()) {
            std::memset(weight_rows_, 0, size_t(keys * kRowBytes));
            std::memset(grad_rows_, 0, size_t(keys * kRowBytes));
        }
        Run all{kLaneCount, 0};
        tile_.over_runs([&](Run run) {
            for (int v = run.begin; v < run.end; ++v) softmax<true>(v);
            all = {std::min(all.begin, run.begin), std::max(all.end, run.end)};
        });
        int64_t const at = all.begin * W / kPairDepth * kPairDepth;
        int64_t const depth = pair_depth(all.end * W - at);
        auto const over_lanes = [&](T* to, T const* rows, T const* pairs, int64_t columns) {
            multiply_by_pairs(to + tile_.key() * columns, columns,
                              reinterpret_cast<Bf16 const*>(rows) + at, kRowBytes,
                              pairs + at / 2 * columns, columns, keys, columns / W, depth, true);
        };
        over_lanes(dv_, weight_rows_, grad_o_pairs_, V);
        over_lanes(dk_, grad_rows_, query_pairs_, K);

        int64_t const pairs = pair_depth(keys) / 2, lanes = tile_.vectors() * W;
        pair_rows(grad_pairs_, lanes, keys, [&](int64_t j) {
            return reinterpret_cast<Bf16 const*>(grad_rows_) + j * kLaneCount;
        });
        turn(grads_by_query_, pairs, grad_pairs_, lanes, pairs, lanes);
        pair_rows(key_pairs_, K, keys,
                  [&](int64_t j) { return tile_.row_of(p_.k, tile_.key() + j); });
        tile_.over_runs([&](Run run) {
            int64_t const first = run.begin * W;
            multiply_by_pairs(dq_ + first * K, K, grads_by_query_ + first * pairs, pairs * 4,
                              key_pairs_, K, (run.end - run.begin) * W, K / W, pairs * 2, true);
        });
    }

    // Scores to weights and dP to dS, of vector v, rounded where products of pairs take them; on the way what the scores'
    // other terms take.
    template <bool kPairs>
    void softmax(int v) {
        Vector<T> const lse = load(lse_ + v * W), dot = load(dot_ + v * W);
        Vector<T> const none = {}, hidden = splat(T(-INFINITY));
        Vector<T> sum = {}, ramp_sum = {};
        T const scale = tile_.score_scale();
        for (int64_t j = 0; j < tile_.size(); ++j) {
            int64_t const at = j * kLaneCount + v * W;
            Vector<T> const s = load(weights_ + at);
            Vector<T> const weight = at_most_one(kPairs        ? rough_exp<T>(s, scale, lse)
                                                 : s == hidden ? none
                                                               : exp(s * scale - lse));
            Vector<T> grad = s == hidden ? none : weight * (load(grads_ + at) - dot);
            sum += grad;
            if (d_ramp_ != nullptr) {
                Vector<T> const factor = tile_.ramp(v, j);
                Vector<T> const slope = grad / (T(p_.ramp_length) * factor);
                ramp_sum += factor > none ? (factor <= T(1) ? slope : none) : none;
            }
            if (p_.softcap > 0) {
                Vector<T> const x = load(capped_ + at);
                grad = grad == none ? none : grad * (T(1) - x * x);
            }
            grad *= T(p_.scale);
            if constexpr (kPairs && std::is_same_v<T, float>) {
                narrow(reinterpret_cast<Bf16*>(weight_rows_) + at, weight);
                narrow(reinterpret_cast<Bf16*>(grad_rows_) + at, grad);
            } else {
                store(weights_ + at, weight), store(grads_ + at, grad);
            }
        }
        if (d_bias_ != nullptr) {
            tile_.over_entries([&](int64_t entry, int begin, int end) {
                for (int i = 0; i < W; ++i)
                    if (v * W + i >= begin && v * W + i < end) d_bias_[entry] += sum[i];
            });
        }
        if (d_ramp_ != nullptr) store(ramp_sum_ + v * W, load(ramp_sum_ + v * W) + ramp_sum);
    }

    void write_query_gradients() {
        tile_.write_gradients(dq_);
        for (int i = 0; d_ramp_ != nullptr && i < tile_.lanes(); ++i)
            d_ramp_[i % task_.heads] += ramp_sum_[i];
    }

    static constexpr int64_t kRowBytes = kLaneCount * 2;  // of rows in bf16

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    AttnTile<T> tile_;
    T *dk_, *dv_, *d_bias_, *d_sink_, *d_ramp_;
    T *weights_, *grads_, *capped_;  // [keys][lanes]
    T *grad_o_, *grad_o_turned_, *output_, *dq_;
    // For products of pairs.
    T *weight_rows_, *grad_rows_;      // weights and grads in bf16
    T *grad_pairs_, *grads_by_query_;  // [keys / 2][vectors' lanes], [lanes][keys / 2]
    T* key_pairs_;                     // [keys / 2][K]
    T *query_pairs_, *grad_o_pairs_;   // [lanes / 2][K or V]
    bool finite_grads_, finite_queries_, finite_lse_;
    T lse_[kLaneCount], dot_[kLaneCount], ramp_sum_[kLaneCount];
};

template <class F>
auto with_attn_type(SparseAttnParams const& p, F const& f) {
    return with_accumulator(p.dtype, f);
}

int64_t attn_scratch_bytes(SparseAttnParams const& p, bool backward) {
    return with_attn_type(p, [&](auto zero) {
        using T = decltype(zero);
        SparseAttnTask const task{};
        if (lists_by_token(p))
            return backward ? AttnTokensBackward<T>(p, task, {}, nullptr).scratch_bytes()
                            : AttnTokensForward<T>(p, task, nullptr).scratch_bytes();
        return backward ? AttnBackward<T>(p, task, {}, nullptr).scratch_bytes()
                        : AttnForward<T>(p, task, nullptr).scratch_bytes();
    });
}

int64_t attn_columns(SparseAttnParams const& p, int64_t channels) {
    return with_attn_type(p, [&](auto zero) {
        constexpr int W = kLanes<decltype(zero)>;
        return panels(channels, W) * W;
    });
}

void attn_forward(SparseAttnParams const& p, SparseAttnTask const& task, void* scratch) {
    with_attn_type(p, [&](auto zero) {
        using T = decltype(zero);
        if (lists_by_token(p)) return AttnTokensForward<T>(p, task, scratch).run();
        AttnForward<T>(p, task, scratch).run();
    });
}

void attn_backward(SparseAttnParams const& p, SparseAttnTask const& task,
                   SparseAttnSums const& sums, void* scratch) {
    with_attn_type(p, [&](auto zero) {
        using T = decltype(zero);
        if (lists_by_token(p)) return AttnTokensBackward<T>(p, task, sums, scratch).run();
        AttnBackward<T>(p, task, sums, scratch).run();
    });
}

template <class T>
void write_sums(SparseAttnParams const& p, SparseAttnTask const& task, Rows const& to, void* sums,
                int64_t channels, int64_t parts, int64_t begin, int64_t end) {
    constexpr int W = kLanes<T>;
    int64_t const columns = panels(channels, W) * W, part = task.keys * columns;
    RowAccess<T> const access(p.dtype);
    for (int64_t j = begin; j < end; ++j) {
        T* const first = static_cast<T*>(sums) + j * columns;
        for (int64_t c = 0; c < columns && parts > 1; c += W) {
            Vector<T> sum = load(first + c);
            for (int64_t i = 1; i < parts; ++i) sum += load(first + i * part + c);
            store(first + c, sum);
        }
        access.write(access.at(to, task.batch, task.first_k + j, task.kv_head), first, channels);
    }
}

void attn_write_key_gradients(SparseAttnParams const& p, SparseAttnTask const& task,
                              SparseAttnSums const& sums, int64_t parts, int64_t begin,
                              int64_t end) {
    with_attn_type(p, [&](auto zero) {
        using T = decltype(zero);
        write_sums<T>(p, task, p.dk, sums.dk, p.K, parts, begin, end);
        write_sums<T>(p, task, p.dv, sums.dv, p.V, parts, begin, end);
    });
}

}  // namespace

constinit SparseAttnKernels const sparse_attn_kernels{
    attn_scratch_bytes, attn_columns, attn_forward, attn_backward, attn_write_key_gradients};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
