// How decays act on a block's sides (chunk_block.h), and the gates' gradients. A class for each
// `Decay`, with
//   kBlock              tokens in a block
//   acts_on(side)       whether that side's channels take part in the decays
//   of(lanes)           where the decay of a state sits that has the channels of `lanes` in lanes
//   read                a block's gates
// and for a side it acts on
//   lay_out             memory for its readers and writers as the state needs them
//   to_start, to_end    those readers and writers
//   total, channels     the block's decays, by channel
//   reads, writes       what a product with a state lacks on that side
//   finish_reads        what is left to do there when the product is there (forward)
//   flux                Σ S dS by channel, to be filled where the gate's gradient is wanted
// and for both, on request of either,
//   pairs               reader · writer of any two tokens
//   gradients           what is left to do when all products are there
// What the numbers in a gate say of a decay is another matter: policy/gate.h.
#pragma once

#include "chunk_features.h"
#include "policy/gate.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Numbers of gates to decays, in place.
template <class T>
LSM_INLINE void decays_of(int32_t gate, T* x, int64_t count) {
    with_gate(gate, [&](auto policy) {
        for (int64_t i = 0; i < count; i += kLanes<T>) {
            store(x + i, exp(policy.log_decay(load(x + i))));
        }
    });
}

// Gradients of log decays to those of the numbers x.
template <class T>
LSM_INLINE void through_gate(int32_t gate, T* gradient, T const* x, int64_t count) {
    with_gate(gate, [&](auto policy) {
        if constexpr (!std::is_same_v<decltype(policy), LogGate>) {
            for (int64_t i = 0; i < count; i += kLanes<T>) {
                store(gradient + i, load(gradient + i) * policy.slope(load(x + i)));
            }
        }
    });
}

// No gates.
template <class T>
class NoDecay {
  public:
    static constexpr int kBlock = 16;
    static constexpr bool acts_on(Side) { return false; }
    static constexpr DecayOf of(Side) { return DecayOf::nothing; }

    using Block = BlockSide<T>;

    NoDecay(ChunkParams const&, ChunkTask const&, Span const&, Arena<T>&) {}

    void read(int64_t) const {}
    LSM_INLINE void prefetch(int64_t) const {}
    LSM_INLINE void prefetch_gradient(int64_t) const {}
    template <Side>
    void pairs(Block const& s) const {
        causal_dots<kBlock>(s.pairs, s.reader, s.writer, s.panels);
    }
    T const* total(Side) const { return nullptr; }
    void gradients(Block const&, Block const&, int64_t) const {}
};

// What a product with a state lacks where each token has one decay: acc_t <- decay_t acc_t, its dot
// with a row of the token, and a triangle.
template <Triangle kTriangle, int C, class T>
struct PlusDecayed {
    T const* decay;  // [C]
    T const* rows;   // block panels
    T* dots;         // [C][W], lanes and panels not yet summed; null: not wanted
    PlusTriangle<kTriangle, C, T> triangle;

    template <int M, int N, class V>
    LSM_INLINE void add(V (&acc)[M][N], int first, int64_t panel) const {
        constexpr int W = kLanes<T>;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m][n] *= decay[first + m];
        }
        if (dots != nullptr) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                V sum = panel == 0 ? V{} : load(dots + (first + m) * W);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    sum += acc[m][n] * load(rows + ((panel + n) * C + first + m) * W);
                }
                store(dots + (first + m) * W, sum);
            }
        }
        triangle.add(acc, first, panel);
    }
};

// g: [B, T, HV]. One factor per token and a matrix of them between tokens; no work per channel.
template <class T>
class ScalarDecay {
  public:
    static constexpr int kBlock = 16;
    static constexpr bool acts_on(Side side) { return side == Side::key; }
    static constexpr DecayOf of(Side) { return DecayOf::state; }

    using Block = BlockSide<T>;

    ScalarDecay(ChunkParams const& p, ChunkTask const& task, Span const& span, Arena<T>& arena)
        : g_(p.g, p.gate_dtype, task.batch, task.head, span),
          dg_(p.dg, p.gate_dtype, task.batch, task.head, span),
          gate_(p.gate),
          wants_gradient_(p.dg.data != nullptr) {
        arena.take_each(C, a_, prefix_, suffix_);
        arena.take_each(C * C, between_, weighed_);
        arena.take_each(C * W, reader_dots_, writer_dots_);
        flux_ = arena.take((p.K + W - 1) / W * W);
    }
    static void lay_out(Block& side, Arena<T>& arena) {
        arena.take_each(side.panels * C * W, side.start, side.end);
    }

    void read(int64_t block) {
        g_.read(a_, block);
        decays_of(gate_, a_, C);
        T prefix = 1, suffix = 1;
        for (int t = 0; t < C; ++t) {
            prefix_[t] = prefix *= a_[t];
            for (int j = 0; j < C; j += W) {
                Vector<T> row = t == 0 ? Vector<T>{} : a_[t] * load(between_ + (t - 1) * C + j);
                store(between_ + t * C + j, row);
            }
            between_[t * C + t] = 1;
        }
        for (int t = C - 1; t >= 0; --t) {
            suffix_[t] = suffix;
            suffix *= a_[t];
        }
    }
    LSM_INLINE void prefetch(int64_t) const {}
    LSM_INLINE void prefetch_gradient(int64_t) const {}
    template <Side>
    void to_start(Block const& s) const {
        weigh(s.start, s.reader, prefix_, s.panels);
    }
    template <Side>
    void to_end(Block const& s) const {
        weigh(s.end, s.writer, suffix_, s.panels);
    }
    template <Side kSide>
    void pairs(Block const& s) const {
        pair_dots<C>(s);
        multiply(kSide == Side::key ? s.pairs : weighed_, s.pairs, between_);
    }
    T const* total(Side) const { return prefix_ + C - 1; }
    int64_t channels(Side) const { return 1; }

    template <Side>
    auto reads(Block const& s, Block const&) const {
        return PlusDecayed<Triangle::past, C, T>{
            prefix_, s.reader, wants_gradient_ ? reader_dots_ : nullptr, {weighed_, s.writer}};
    }
    template <Side>
    auto writes(Block const& s, Block const&) const {
        return PlusDecayed<Triangle::future, C, T>{
            suffix_, s.writer, wants_gradient_ ? writer_dots_ : nullptr, {weighed_, s.reader}};
    }
    template <Side>
    bool wants_gradient() const {
        return wants_gradient_;
    }
    template <Side>
    T* flux() const {
        return flux_;
    }

    // dg_t = A(-1, last) ⟨S, dS⟩ + Σ_{s >= t} reader dot + Σ_{j < t} writer dot
    //      + Σ_{j < t <= s} pair s, j times the other's pair
    void gradients(Block const& s, Block const& other, int64_t block) {
        if (!wants_gradient_) return;
        Vector<T> all{};
        for (int64_t i = 0; i < s.panels; ++i) all += load(flux_ + i * W);
        T dg[C], reader[C], writer[C];
        sum_rows(reader, reader_dots_);
        sum_rows(writer, writer_dots_);
        multiply(weighed_, s.pairs, other.pairs);
        crossing(dg);
        T future = 0, past = *total(Side::key) * sum_lanes<T>(all);
        for (int t = C - 1; t >= 0; --t) dg[t] += future += reader[t];
        for (int t = 0; t < C; ++t) {
            dg[t] += past;
            past += writer[t];
        }
        if (gate_ != kGate<LogGate>) {
            T x[C];
            g_.read(x, block);
            through_gate(gate_, dg, x, C);
        }
        dg_.write(dg, block);
    }

  private:
    static constexpr int C = kBlock, W = kLanes<T>;

    static void weigh(T* out, T const* x, T const* decay, int64_t panels) {
        for (int64_t p = 0; p < panels; ++p) {
#pragma GCC unroll 8
            for (int t = 0; t < C; ++t, out += W, x += W) store(out, load(x) * decay[t]);
        }
    }
    static void multiply(T* out, T const* x, T const* y) {
        for (int i = 0; i < C * C; i += W) store(out + i, load(x + i) * load(y + i));
    }
    static void sum_rows(T* sums, T const* x) {
        for (int t = 0; t < C; t += W) {
            Vector<T> rows[W];
            for (int i = 0; i < W; ++i) rows[i] = load(x + (t + i) * W);
            store(sums + t, sum_each<T>(rows));
        }
    }
    // out_t = Σ_{j < t <= s} weighed_[s][j]
    void crossing(T* out) const {
        T row[C] = {};  // Σ over s >= t
        for (int last = C - 1; last >= 0; last -= W) {
            Vector<T> sums[W];
            for (int i = W - 1; i >= 0; --i) {
                int const t = last - (W - 1) + i;
                sums[i] = Vector<T>{};
                for (int j = 0; j < C; j += W) {
                    Vector<T> const r = load(row + j) + load(weighed_ + t * C + j);
                    store(row + j, r);
                    sums[i] += lane_numbers<T>() < T(t - j) ? r : Vector<T>{};
                }
            }
            store(out + last - (W - 1), sum_each<T>(sums));
        }
    }

    HeadScalars<T, C> g_, dg_;
    int32_t gate_;
    bool wants_gradient_;
    T *a_, *prefix_, *suffix_;
    T *between_, *weighed_;  // [C][C]: A(j, t), and the other side's pairs times it
    T *reader_dots_, *writer_dots_, *flux_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
