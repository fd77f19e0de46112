// What divides outputs, around one value head (Normaliser, params/chunk.h): mLSTM's gates for all
// tokens of a sequence at once, and, over a stretch, the sums of weighted keys. In
// the backward those are one more column of the state, of values that are 1.
#pragma once

#include "chunk_block.h"
#include "numbers.h"
#include "policy/input_gate.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// One head's rows of Normaliser::tokens.
template <class T>
struct GateRows {
    GateRows() = default;
    GateRows(ChunkParams const& p, int64_t batch, int64_t head) {
        T** const rows[] = {&log_decay, &weight, &size, &least};
        T* const first = static_cast<T*>(p.normaliser.tokens) + (batch * p.HV + head) * p.T;
        for (int64_t i = 0; i < kGateRows; ++i) *rows[i] = first + i * p.B * p.HV * p.T;
    }
    T *log_decay = nullptr, *weight = nullptr, *size = nullptr, *least = nullptr;
};

// Gates of all tokens of a task's sequence, and m after the last. m_t = max(log σ(f_t) + m_{t-1},
// i_t) is found one token after the other, in fp64; what takes exponentials in vectors.
template <class T>
void normaliser_gates(ChunkParams const& p, ChunkTask const& task) {
    constexpr int C = 16, W = kLanes<T>;
    Normaliser const& own = p.normaliser;
    GateRows<T> const rows(p, task.batch, task.head);
    if (!own.gated) {
        for (int64_t t = task.begin; t < task.end; ++t)
            rows.log_decay[t] = rows.least[t] = 0, rows.weight[t] = 1;
        return;
    }
    Span const span{task.begin, task.end};
    HeadScalars<T, C> const i_gates(own.i, own.dtype, task.batch, task.head, span);
    HeadScalars<T, C> const f_gates(own.f, own.dtype, task.batch, task.head, span);
    int64_t const chain = task.sequence * p.HV + task.head;
    double m = own.m0 == nullptr ? 0 : double(static_cast<T const*>(own.m0)[chain]);
    for (int64_t t = task.begin, block = 0; t < task.end; t += C, ++block) {
        T i[C], fall[C], decay[C], weight[C], least[C];
        i_gates.read(i, block);
        f_gates.read(fall, block);
        int64_t const count = min_of(C, task.end - t);
        auto const keep = [&](T* row, T const* from) {
            std::memcpy(row + t, from, size_t(count) * sizeof(T));
        };
        if (own.weights_only) {
            keep(rows.log_decay, fall), keep(rows.weight, i);
            continue;
        }
        for (int c = 0; c < C; c += W) store(fall + c, log_sigmoid(load(fall + c)));
        if (own.exponential) {
            for (int64_t c = 0; c < count; ++c) {
                double const next = next_stabiliser(i[c], fall[c], m);
                decay[c] = T(double(fall[c]) + (m - next));
                weight[c] = T(double(i[c]) - next);
                least[c] = T(-next);
                m = next;
            }
            for (int64_t c = count; c < C; ++c) decay[c] = weight[c] = least[c] = 0;
            for (int c = 0; c < C; c += W) store(weight + c, exp(load(weight + c)));
            for (int c = 0; c < C; c += W) store(least + c, exp(load(least + c)));
        } else {
            for (int c = 0; c < C; c += W) {
                store(decay + c, load(fall + c));
                store(weight + c, sigmoid(load(i + c)));
                store(least + c, splat(T(1)));
            }
        }
        keep(rows.log_decay, decay), keep(rows.weight, weight), keep(rows.least, least);
    }
    if (own.m != nullptr) static_cast<T*>(own.m)[chain] = T(m);
}

// What a stretch without one has in its place.
struct NoNormaliser {
    template <class... Arguments>
    explicit NoNormaliser(Arguments const&...) {}
    void begin() const {}
    void end() const {}
    template <class... Arguments>
    void weigh(Arguments const&...) const {}
    template <class... Arguments>
    void sums(Arguments const&...) const {}
    template <class... Arguments>
    void divide(Arguments const&...) const {}
    template <class... Arguments>
    void advance(Arguments const&...) const {}
    template <class... Arguments>
    void gradients(Arguments const&...) const {}
    template <class... Arguments>
    void read_begin(Arguments const&...) const {}
    template <class... Arguments>
    void read_grad_end(Arguments const&...) const {}
    template <class... Arguments>
    void write_grad_begin(Arguments const&...) const {}
    LSM_INLINE void prefetch(int64_t) const {}
};

// A block of one of the rows; `none` after the last token.
template <int C, class T>
LSM_INLINE void read_gate_row(T* block_row, T const* row, ChunkTask const& task, int64_t block,
                              T none = 0) {
    int64_t const t = task.begin + block * C, count = min_of(C, task.end - t);
    std::memcpy(block_row, row + t, size_t(count) * sizeof(T));
    for (int64_t c = count; c < C; ++c) block_row[c] = none;
}

// A block's rows, each by its own number.
template <int C, class T>
LSM_INLINE void scale_rows(T* x, int64_t panels, T const* by) {
    constexpr int W = kLanes<T>;
    for (int64_t p = 0; p < panels; ++p) {
#pragma GCC unroll 8
        for (int t = 0; t < C; ++t, x += W) store(x, load(x) * by[t]);
    }
}

template <class T, int C>
class StretchNormaliser {
  public:
    StretchNormaliser(ChunkParams const& p, ChunkTask const& task, int64_t key_panels,
                      Arena<T>& arena)
        : own_(p.normaliser), task_(task), keys_(p.K), panels_(key_panels) {
        if (!on()) return;
        rows_ = GateRows<T>(p, task.batch, task.head);
        arena.take_each(C, weight_, inverse_);
        if (own_.sums()) n_ = arena.take(panels_ * W);
    }

    bool on() const { return own_.on; }

    void begin() const {
        if (!own_.sums()) return;
        std::memset(n_, 0, size_t(panels_ * W) * sizeof(T));
        if (task_.n_begin != nullptr) std::memcpy(n_, task_.n_begin, size_t(keys_) * sizeof(T));
    }
    void end() const {
        if (own_.sums() && task_.n_end != nullptr)
            std::memcpy(task_.n_end, n_, size_t(keys_) * sizeof(T));
    }

    // What a block writes, weighted.
    void weigh(T* values, int64_t panels, int64_t block) const {
        if (!on()) return;
        read_gate_row<C>(weight_, rows_.weight, task_, block);
        scale_rows<C>(values, panels, weight_);
    }

    // The sums of the block's tokens, from q as the state takes it and the decayed pairs.
    void sums(T const* start, T const* pairs, int64_t block) const {
        if (!on() || !own_.divides) return;
        T size[C], least[C];
        for (int t = 0; t < C; t += W) {
            Vector<T> sums[W];
            for (int i = 0; i < W; ++i) {
                sums[i] = Vector<T>{};
                for (int64_t p = 0; p < panels_; ++p)
                    sums[i] += load(start + (p * C + t + i) * W) * load(n_ + p * W);
                for (int j = 0; j < C; j += W) {
                    Vector<T> const pair = load(pairs + (t + i) * C + j) * load(weight_ + j);
                    sums[i] += lane_numbers<T>() <= T(t + i - j) ? pair : Vector<T>{};
                }
            }
            store(size + t, sum_each<T>(sums));
        }
        read_gate_row<C>(least, rows_.least, task_, block);
        for (int t = 0; t < C; t += W) {
            Vector<T> const x = load(size + t);
            Vector<T> const divisor = max_of(max_of(x, -x), load(least + t)) + T(own_.eps);
            store(inverse_ + t, 1 / divisor);
        }
        if (task_.v_begin == 0) {
            int64_t const t = task_.begin + block * C;
            std::memcpy(rows_.size + t, size, size_t(min_of(C, task_.end - t)) * sizeof(T));
        }
    }

    void divide(T* outputs, int64_t panels) const {
        if (on() && own_.divides) scale_rows<C>(outputs, panels, inverse_);
    }

    // n past a block, from k as the state takes it.
    void advance(T const* end, T const* decay) const {
        if (!own_.sums()) return;
        for (int64_t p = 0; p < panels_; ++p) {
            Vector<T> n = load(n_ + p * W) * *decay;
            for (int j = 0; j < C; ++j) n += load(end + (p * C + j) * W) * weight_[j];
            store(n_ + p * W, n);
        }
    }

  private:
    static constexpr int W = kLanes<T>;

    Normaliser const& own_;
    ChunkTask const& task_;
    int64_t keys_, panels_;
    GateRows<T> rows_;
    T *n_ = nullptr, *weight_ = nullptr, *inverse_ = nullptr;
};

// The backward's: with outputs h = above / divisor, above and n·q are both outputs of the engine,
// and its values are those of v with a 1 behind them, weighted; or v alone, where nothing is summed.
template <class T, int C>
class NormaliserColumn {
  public:
    NormaliserColumn(ChunkParams const& p, ChunkTask const& task, BlockSide<T> const& value,
                     Arena<T>& arena)
        : own_(p.normaliser),
          task_(task),
          panels_(value.panels),
          V_(value.channels - (p.normaliser.sums() ? 1 : 0)),
          h_(p.normaliser.sums() ? p.o : p.v, p.dtype, task.batch, task.head,
             {task.begin, task.end}, V_),
          dweight_(p.normaliser.dweight, p.state_dtype, task.batch, task.head,
                   {task.begin, task.end}) {
        if (!on()) return;
        rows_ = GateRows<T>(p, task.batch, task.head);
        outputs_ = arena.take(panels_ * C * W);
        weight_ = arena.take(C);
    }

    bool on() const { return own_.on; }

    void weigh(T* values, int64_t block) const {
        if (!on()) return;
        read_gate_row<C>(weight_, rows_.weight, task_, block);
        scale_rows<C>(values, panels(V_, W), weight_);
        if (own_.sums()) append(values, weight_);
    }

    // Gradients of outputs to those of what was divided, and of n·q. The divisor has a gradient
    // where n·q, of either sign, is what it was made of.
    void divide(T* grad, int64_t block) const {
        if (!own_.sums()) return;
        T below[C] = {};
        if (own_.divides) {
            T size[C], least[C], inverse[C];
            read_gate_row<C>(size, rows_.size, task_, block);
            read_gate_row<C>(least, rows_.least, task_, block, T(1));
            h_.read(outputs_, block);
            for (int t = 0; t < C; t += W) {
                Vector<T> dots[W];
                for (int i = 0; i < W; ++i) dots[i] = dot(grad, outputs_, panels(V_, W), t + i);
                Vector<T> const x = load(size + t), magnitude = max_of(x, -x);
                Vector<T> const one_over = 1 / (max_of(magnitude, load(least + t)) + T(own_.eps));
                Vector<T> const total = sum_each<T>(dots) * one_over, none{};
                store(inverse + t, one_over);
                store(below + t, magnitude > load(least + t) ? (x > none ? -total : total) : none);
            }
            scale_rows<C>(grad, panels(V_, W), inverse);
        }
        append(grad, below);
    }

    // Of the weights' logarithms, by way of what a block wrote, or of weights as they are, which may
    // be 0, by way of v; and of v.
    void gradients(T* d_values, T const* values, int64_t block) const {
        if (!on() || !own_.gated) return;
        T dweight[C];
        if (own_.weights_only) {
            h_.read(outputs_, block);
            values = outputs_;
        }
        for (int t = 0; t < C; t += W) {
            Vector<T> dots[W];
            for (int i = 0; i < W; ++i) dots[i] = dot(d_values, values, panels_, t + i);
            store(dweight + t, sum_each<T>(dots));
        }
        dweight_.write(dweight, block);
        scale_rows<C>(d_values, panels(V_, W), weight_);
    }

    // The column of a state with keys in lanes, and of a gradient with values in lanes.
    void read_begin(T* state, int64_t K) const {
        if (!on() || task_.n_begin == nullptr) return;
        auto const* const n = static_cast<T const*>(task_.n_begin);
        for (int64_t k = 0; k < K; ++k) state[(k / W * panels_ * W + V_) * W + k % W] = n[k];
    }
    void read_grad_end(T* grad, int64_t K) const {
        if (!on() || task_.n_grad_end == nullptr) return;
        auto const* const n = static_cast<T const*>(task_.n_grad_end);
        for (int64_t k = 0; k < K; ++k) column(grad, K)[k * W] = n[k];
    }
    void write_grad_begin(T* grad, int64_t K) const {
        if (!on() || task_.n_grad_begin == nullptr) return;
        auto* const n = static_cast<T*>(task_.n_grad_begin);
        for (int64_t k = 0; k < K; ++k) n[k] = column(grad, K)[k * W];
    }

    LSM_INLINE void prefetch(int64_t block) const {
        if (on() && own_.divides) h_.prefetch(block);
    }

  private:
    static constexpr int W = kLanes<T>;

    T* column(T* state, int64_t K) const { return state + V_ / W * panels(K, W) * W * W + V_ % W; }

    void append(T* rows, T const* x) const {
        T* const panel = rows + V_ / W * C * W;
        for (int t = 0; t < C; ++t) {
            if (V_ % W == 0) store(panel + t * W, Vector<T>{});  // which no values were read into
            panel[t * W + V_ % W] = x[t];
        }
    }

    static LSM_INLINE Vector<T> dot(T const* x, T const* y, int64_t panels, int t) {
        Vector<T> sum{};
        for (int64_t p = 0; p < panels; ++p)
            sum += load(x + (p * C + t) * W) * load(y + (p * C + t) * W);
        return sum;
    }

    Normaliser const& own_;
    ChunkTask const& task_;
    int64_t panels_, V_;  // V_: of v, and the place of the column
    HeadRows<T, C> h_;    // without sums: v
    HeadScalars<T, C> dweight_;
    GateRows<T> rows_;
    T *outputs_ = nullptr, *weight_ = nullptr;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
