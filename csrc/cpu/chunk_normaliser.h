// mLSTM's extras around one value head (Normaliser, params/chunk.h): its gates for all tokens of a
// sequence at once, and, over a stretch, the sums of weighted keys that outputs are divided by.
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
    Span const span{task.begin, task.end};
    HeadScalars<T, C> const i_gates(own.i, own.dtype, task.batch, task.head, span);
    HeadScalars<T, C> const f_gates(own.f, own.dtype, task.batch, task.head, span);
    int64_t const chain = task.sequence * p.HV + task.head;
    double m = own.m0 == nullptr ? 0 : double(static_cast<T const*>(own.m0)[chain]);
    for (int64_t t = task.begin, block = 0; t < task.end; t += C, ++block) {
        T i[C], fall[C], decay[C], weight[C], least[C];
        i_gates.read(i, block);
        f_gates.read(fall, block);
        for (int c = 0; c < C; c += W) store(fall + c, log_sigmoid(load(fall + c)));
        int64_t const count = min_of(C, task.end - t);
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
        auto const keep = [&](T* row, T const* from) {
            std::memcpy(row + t, from, size_t(count) * sizeof(T));
        };
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
};

template <class T, int C>
class StretchNormaliser {
  public:
    StretchNormaliser(ChunkParams const& p, ChunkTask const& task, int64_t key_panels,
                      Arena<T>& arena)
        : own_(p.normaliser), task_(task), keys_(p.K), panels_(key_panels) {
        if (!on()) return;
        rows_ = GateRows<T>(p, task.batch, task.head);
        n_ = arena.take(panels_ * W);
        arena.take_each(C, weight_, inverse_);
    }

    bool on() const { return own_.on; }

    void begin() const {
        if (!on()) return;
        std::memset(n_, 0, size_t(panels_ * W) * sizeof(T));
        if (task_.n_begin != nullptr) std::memcpy(n_, task_.n_begin, size_t(keys_) * sizeof(T));
    }
    void end() const {
        if (on() && task_.n_end != nullptr) std::memcpy(task_.n_end, n_, size_t(keys_) * sizeof(T));
    }

    // What a block writes, weighted.
    void weigh(T* values, int64_t panels, int64_t block) const {
        if (!on()) return;
        read(weight_, rows_.weight, block);
        scale(values, panels, weight_);
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
        read(least, rows_.least, block);
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
        if (on() && own_.divides) scale(outputs, panels, inverse_);
    }

    // n past a block, from k as the state takes it.
    void advance(T const* end, T const* decay) const {
        if (!on()) return;
        for (int64_t p = 0; p < panels_; ++p) {
            Vector<T> n = load(n_ + p * W) * *decay;
            for (int j = 0; j < C; ++j) n += load(end + (p * C + j) * W) * weight_[j];
            store(n_ + p * W, n);
        }
    }

  private:
    static constexpr int W = kLanes<T>;

    void read(T* block_row, T const* row, int64_t block) const {
        int64_t const t = task_.begin + block * C, count = min_of(C, task_.end - t);
        std::memcpy(block_row, row + t, size_t(count) * sizeof(T));
        for (int64_t c = count; c < C; ++c) block_row[c] = 0;
    }

    static void scale(T* x, int64_t panels, T const* by) {
        for (int64_t p = 0; p < panels; ++p) {
#pragma GCC unroll 8
            for (int t = 0; t < C; ++t, x += W) store(x, load(x) * by[t]);
        }
    }

    Normaliser const& own_;
    ChunkTask const& task_;
    int64_t keys_, panels_;
    GateRows<T> rows_;
    T *n_ = nullptr, *weight_ = nullptr, *inverse_ = nullptr;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
