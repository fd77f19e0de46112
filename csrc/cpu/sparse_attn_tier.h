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
        : p_(p), task_(task), arena_(scratch), tile_(p, task, true) {
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
                tile_.scores(scores_, nullptr);
                bool const finite = !tile_.partial() || tile_.finite_values();
                tile_.over_runs([&](Run run) {
                    for (int v = run.begin; v < run.end; ++v) softmax(v);
                    over_heavy(
                        run, [&](Run heavy) { tile_.add_values(turned_, scores_, heavy, finite); });
                });
            }
            finish();
        }
    }

  private:
    void start_softmax() {
        for (int i = 0; i < tile_.vectors() * W; ++i)
            start_row(p_, tile_.head(i), most_[i], sum_[i]);
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

    void softmax(int v) {
        Vector<T> const before = load(most_ + v * W);
        Vector<T> most = before, sum = load(sum_ + v * W), highest;
        T* const s = scores_ + v * W;
        T const scale = tile_.score_scale();
        Vector<T> const fade = tile_.pairs()
                                   ? soften<true>(s, tile_.size(), scale, most, sum, highest)
                                   : soften(s, tile_.size(), scale, most, sum, highest);
        store(most_ + v * W, most), store(sum_ + v * W, sum);
        heavy_[v] = weighs<T>(p_, highest, most, tile_.lanes() - v * W);
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
    T most_[kLaneCount],
        sum_[kLaneCount];  // of each query: the largest score, and the weights' sum
    bool heavy_[kLaneCount / W];
};

// With s the scores, P = exp(s - lse) and D = rowsum(dO * O) - dlse:
//   dS = P (dO V^T - D),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO
template <class T>
class AttnBackward {
  public:
    static constexpr int W = kLanes<T>;

    AttnBackward(SparseAttnParams const& p, SparseAttnTask const& task, SparseAttnSums const& sums,
                 void* scratch)
        : p_(p),
          task_(task),
          arena_(scratch),
          tile_(p, task, false),
          dk_(static_cast<T*>(sums.dk)),
          dv_(static_cast<T*>(sums.dv)),
          d_bias_(static_cast<T*>(sums.block_bias)),
          d_sink_(static_cast<T*>(sums.sink_logits)),
          d_ramp_(static_cast<T*>(sums.ramp)) {
        int64_t const block = p.lists.block_k * kLaneCount;
        tile_.take(arena_);
        arena_.take_each(block, weights_, grads_);
        capped_ = p.softcap > 0 ? arena_.take(block) : nullptr;
        arena_.take_each(kLaneCount * tile_.V(), grad_o_, grad_o_turned_, output_);
        arena_.take_each(kLaneCount * tile_.K(), dq_, dq_turned_);
    }
    int64_t scratch_bytes() const { return arena_.used(); }

    void run() {
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
        turn(grad_o_turned_, kLaneCount, grad_o_, V, lanes, V);
        finite_grads_ = all_finite(grad_o_, lanes * V), finite_queries_ = tile_.finite_queries();
        for (int64_t c = 0; c < tile_.K(); ++c)
            std::memset(dq_turned_ + c * kLaneCount, 0, size_t(lanes) * sizeof(T));
    }

    void block() {
        int64_t const K = tile_.K(), V = tile_.V(), keys = tile_.size();
        T* const dk = dk_ + tile_.key() * K;
        T* const dv = dv_ + tile_.key() * V;
        tile_.read_keys();
        tile_.scores(weights_, capped_);
        bool const full = !tile_.partial(), finite_keys = full || tile_.finite_keys();
        tile_.over_runs([&](Run run) {
            int64_t const at = run.begin * W, lanes = (run.end - run.begin) * W;
            int64_t const vectors = run.end - run.begin;
            multiply<false>(grads_ + at, kLaneCount, tile_.values(), V, grad_o_turned_ + at,
                            kLaneCount, keys, vectors, p_.V, false);
            for (int v = run.begin; v < run.end; ++v) softmax(v);
            add_weighed<false>(full || finite_grads_, dv, V, weights_ + at, kLaneCount,
                               grad_o_ + at * V, V, keys, V / W, lanes);
            add_weighed<false>(full || finite_queries_, dk, K, grads_ + at, kLaneCount,
                               tile_.queries() + at * K, K, keys, K / W, lanes);
            add_weighed<true>(finite_keys, dq_turned_ + at, kLaneCount, tile_.keys(), K,
                              grads_ + at, kLaneCount, p_.K, vectors, keys);
        });
    }

    // Scores to weights and dP to dS, of vector v; on the way what the scores' other terms take.
    void softmax(int v) {
        Vector<T> const lse = load(lse_ + v * W), dot = load(dot_ + v * W);
        Vector<T> const none = {}, hidden = splat(T(-INFINITY));
        Vector<T> sum = {}, ramp_sum = {};
        for (int64_t j = 0; j < tile_.size(); ++j) {
            int64_t const at = j * kLaneCount + v * W;
            Vector<T> const s = load(weights_ + at);
            Vector<T> const weight = s == hidden ? none : exp(s - lse);
            Vector<T> grad = s == hidden ? none : weight * (load(grads_ + at) - dot);
            store(weights_ + at, weight);
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
            store(grads_ + at, grad);
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
        turn(dq_, tile_.K(), dq_turned_, kLaneCount, tile_.K(), tile_.vectors() * W);
        tile_.write_gradients(dq_);
        for (int i = 0; d_ramp_ != nullptr && i < tile_.lanes(); ++i)
            d_ramp_[i % task_.heads] += ramp_sum_[i];
    }

    SparseAttnParams const& p_;
    SparseAttnTask const& task_;
    Arena<T> arena_;
    AttnTile<T> tile_;
    T *dk_, *dv_, *d_bias_, *d_sink_, *d_ramp_;
    T *weights_, *grads_, *capped_;
    T *grad_o_, *grad_o_turned_, *output_, *dq_, *dq_turned_;
    bool finite_grads_, finite_queries_;
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
