// Decay by channel: g [B, T, HV, K] or [B, T, HV, V], or one of either. On a side of gates every
// pair of tokens has a decay per channel; products with the state take what comes in or goes out
// decayed.
#pragma once

#include "decay.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

inline constexpr int kChannelBlock = 8;  // the work inside a block grows with its square

// reader_t A(-1, t) into start, A(-1, last) into total, for one panel.
template <class T>
LSM_INLINE void readers_to_start(T* start, T* total, T const* reader, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> prefix = Vector<T>{} + T(1);
#pragma GCC unroll 8
    for (int t = 0; t < kChannelBlock; ++t) {
        prefix *= load(a + t * W);
        store(start + t * W, load(reader + t * W) * prefix);
    }
    store(total, prefix);
}

// writer_j A(j, last) into end, A(-1, last) into total, for one panel.
template <class T>
LSM_INLINE void writers_to_end(T* end, T* total, T const* writer, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> suffix = Vector<T>{} + T(1);
#pragma GCC unroll 8
    for (int j = kChannelBlock - 1; j >= 0; --j) {
        store(end + j * W, load(writer + j * W) * suffix);
        suffix *= load(a + j * W);
    }
    store(total, suffix);
}

// Adds one panel's share of reader_t · writer_j A(j, t), lanes not yet summed, to sums[t][j].
template <class T>
LSM_INLINE void add_pairs(T* sums, T const* reader, T const* writer, T const* a) {
    constexpr int W = kLanes<T>;
    Vector<T> decayed[kChannelBlock];
#pragma GCC unroll 8
    for (int t = 0; t < kChannelBlock; ++t) {
        Vector<T> const r = load(reader + t * W), a_t = load(a + t * W);
        decayed[t] = load(writer + t * W);
#pragma GCC unroll 8
        for (int j = 0; j <= t; ++j) {
            if (j < t) decayed[j] *= a_t;
            T* const sum = sums + (t * kChannelBlock + j) * W;
            store(sum, load(sum) + r * decayed[j]);
        }
    }
}

// One panel of the side of the gates. d_reader and d_writer come as the products with the state,
// S other_reader_t and dS other_writer_j; pairs are the other side's, flux Σ S dS by channel.
template <class T>
struct ChannelPanel {
    T const *reader, *writer, *a, *pairs, *flux;
    T *d_reader, *d_writer, *dg;
};

//   dg_t = A(-1, last) flux + Σ_{s >= t} reader_s A(-1, s) (S other_reader_s)
//        + Σ_{j < t} writer_j A(j, last) (dS other_writer_j)
//        + Σ_{j < t <= s} (pair s, j) reader_s writer_j A(j, s)
// is Σ exp(g_t) S_{t-1} dS_t written out: every term has passed gate t, none is subtracted.
template <bool kReader, bool kWriter, bool kGate, class T>
LSM_INLINE void finish_panel(ChannelPanel<T> const& x) {
    constexpr int W = kLanes<T>, C = kChannelBlock;
    using V = Vector<T>;
    V decayed[C], d_writer[C] = {}, dg[C] = {}, from_state[C], to_state[C];
    V prefix = V{} + T(1);
#pragma GCC unroll 8
    for (int t = 0; t < C; ++t) {
        V const a = load(x.a + t * W);
        if constexpr (kReader || kGate) {
            prefix *= a;
            V d_reader = prefix * load(x.d_reader + t * W), past{};
            if constexpr (kGate) from_state[t] = load(x.reader + t * W) * d_reader;
            decayed[t] = load(x.writer + t * W);
#pragma GCC unroll 8
            for (int j = 0; j <= t; ++j) {
                if (j < t) decayed[j] *= a;
                V const weighed = x.pairs[t * C + j] * decayed[j];
                d_reader += weighed;
                if constexpr (kGate) {
                    past += load(x.reader + t * W) * weighed;
                    if (j < t) dg[j + 1] += past;
                }
            }
            if constexpr (kReader) store(x.d_reader + t * W, d_reader);
        }
        if constexpr (kWriter) {
            V back = load(x.reader + t * W);
#pragma GCC unroll 8
            for (int j = t; j >= 0; --j) {
                d_writer[j] += x.pairs[t * C + j] * back;
                if (j > 0) back *= load(x.a + j * W);
            }
        }
    }
    if constexpr (kWriter) {
        V future{}, suffix = V{} + T(1);
#pragma GCC unroll 8
        for (int t = C - 1; t >= 0; --t) {
            if constexpr (kGate) dg[t] += future += from_state[t];
            to_state[t] = suffix * load(x.d_writer + t * W);
            store(x.d_writer + t * W, d_writer[t] + to_state[t]);
            suffix *= load(x.a + t * W);
        }
    }
    if constexpr (kGate) {
        V past = prefix * load(x.flux);
#pragma GCC unroll 8
        for (int t = 0; t < C; ++t) {
            store(x.dg + t * W, dg[t] + past);
            past += load(x.writer + t * W) * to_state[t];
        }
    }
}

template <class T, Side kGated>
class ChannelDecay {
  public:
    static constexpr int kBlock = kChannelBlock;
    static constexpr bool acts_on(Side side) { return side == kGated; }
    static constexpr DecayOf of(Side lanes) {
        return lanes == kGated ? DecayOf::lanes : DecayOf::rows;
    }

    using Block = BlockSide<T>;

    ChannelDecay(ChunkParams const& p, ChunkTask const& task, Span const& span, Arena<T>& arena)
        : ChannelDecay(p, p.g, p.dg, task, span, arena) {}
    ChannelDecay(ChunkParams const& p, Rows const& g, Rows const& dg, ChunkTask const& task,
                 Span const& span, Arena<T>& arena)
        : channels_(kGated == Side::key ? p.K : task.v_end - task.v_begin),
          g_(g, p.gate_dtype, task.batch, task.head, span, channels_, first_channel(task)),
          dg_(dg, p.gate_dtype, task.batch, task.head, span, channels_, first_channel(task)),
          gate_(p.gate),
          wants_gradient_(dg.data != nullptr) {
        int64_t const width = (channels_ + W - 1) / W * W;
        arena.take_each(width * C, a_, dg_rows_);
        arena.take_each(width, total_, flux_);
        sums_ = arena.take(C * C * W);
    }
    static void lay_out(Block& side, Arena<T>& arena) {
        arena.take_each(side.panels * C * W, side.start, side.end);
    }

    void read(int64_t block) const {
        g_.read(a_, block);
        decays_of(gate_, a_, panels(channels_, W) * C * W);
    }
    LSM_INLINE void prefetch(int64_t block) const { g_.prefetch(block); }
    LSM_INLINE void prefetch_gradient(int64_t block) const {
        if (wants_gradient_) dg_.prefetch(block);
    }
    template <Side>
    void to_start(Block const& s) const {
        for (int64_t i = 0; i < s.panels; ++i) {
            int64_t const at = i * C * W;
            readers_to_start(s.start + at, total_ + i * W, s.reader + at, a_ + at);
        }
    }
    template <Side>
    void to_end(Block const& s) const {
        for (int64_t i = 0; i < s.panels; ++i) {
            int64_t const at = i * C * W;
            writers_to_end(s.end + at, total_ + i * W, s.writer + at, a_ + at);
        }
    }
    template <Side kSide>
    void pairs(Block const& s) const {
        if constexpr (kSide != kGated) {
            return causal_dots<C>(s.pairs, s.reader, s.writer, s.panels);
        }
        for (int i = 0; i < C * C; ++i) store(sums_ + i * W, Vector<T>{});
        for (int64_t i = 0; i < s.panels; ++i) {
            int64_t const at = i * C * W;
            add_pairs(sums_, s.reader + at, s.writer + at, a_ + at);
        }
        for (int i = 0; i < C * C; i += W) {
            Vector<T> lanes[W];
            for (int n = 0; n < W; ++n) lanes[n] = load(sums_ + (i + n) * W);
            store(s.pairs + i, sum_each<T>(lanes));
        }
    }
    T const* total(Side) const { return total_; }
    int64_t channels(Side) const { return channels_; }

    template <Side>
    auto reads(Block const&, Block const&) const {
        return Nothing{};
    }
    template <Side>
    auto writes(Block const&, Block const&) const {
        return Nothing{};
    }
    template <Side>
    bool wants_gradient() const {
        return wants_gradient_;
    }
    template <Side>
    T* flux() const {
        return flux_;
    }

    void finish_reads(Block const& s, Block const& other) const {
        finish<true, false, false>(s, other);
    }
    void gradients(Block const& key, Block const& value, int64_t block) {
        constexpr bool kReader = kGated == Side::key;  // o is not asked for
        Block const &s = kReader ? key : value, &other = kReader ? value : key;
        if (!wants_gradient_) {
            finish<kReader, true, false>(s, other);
        } else {
            finish<kReader, true, true>(s, other);
            if (gate_ != kGate<LogGate>) {  // a_ has served
                g_.read(a_, block);
                through_gate(gate_, dg_rows_, a_, s.panels * C * W);
            }
            dg_.write(dg_rows_, block);
        }
    }

  private:
    static constexpr int C = kBlock, W = kLanes<T>;

    static int64_t first_channel(ChunkTask const& task) {
        return kGated == Side::key ? 0 : task.v_begin;
    }
    template <bool kReader, bool kWriter, bool kGate>
    void finish(Block const& s, Block const& other) const {
        for (int64_t i = 0; i < s.panels; ++i) {
            int64_t const at = i * C * W;
            finish_panel<kReader, kWriter, kGate>(
                ChannelPanel<T>{s.reader + at, s.writer + at, a_ + at, other.pairs, flux_ + i * W,
                                s.d_reader + at, s.d_writer + at, dg_rows_ + at});
        }
    }

    int64_t channels_;
    HeadRows<T, C> g_, dg_;
    int32_t gate_;
    bool wants_gradient_;
    T *a_, *dg_rows_, *total_, *flux_, *sums_;
};

// Either side decays by channels of its own. What each does for the other is already in the pairs
// and in what the state takes in and gives out; only the flux must be told (weights of its sums).
template <class T>
class BothDecay {
  public:
    static constexpr int kBlock = kChannelBlock;
    static constexpr bool acts_on(Side) { return true; }
    static constexpr DecayOf of(Side) { return DecayOf::both; }

    using Block = BlockSide<T>;

    BothDecay(ChunkParams const& p, ChunkTask const& task, Span const& span, Arena<T>& arena)
        : key_(p, p.g, p.dg, task, span, arena), value_(p, p.gv, p.dgv, task, span, arena) {}
    static void lay_out(Block& side, Arena<T>& arena) {
        ChannelDecay<T, Side::key>::lay_out(side, arena);
    }

    void read(int64_t block) const {
        key_.read(block);
        value_.read(block);
    }
    LSM_INLINE void prefetch(int64_t block) const {
        key_.prefetch(block);
        value_.prefetch(block);
    }
    LSM_INLINE void prefetch_gradient(int64_t block) const {
        key_.prefetch_gradient(block);
        value_.prefetch_gradient(block);
    }
    template <Side kSide>
    void to_start(Block const& s) const {
        of_side<kSide>().template to_start<kSide>(s);
    }
    template <Side kSide>
    void to_end(Block const& s) const {
        of_side<kSide>().template to_end<kSide>(s);
    }
    template <Side kSide>
    void pairs(Block const& s) const {
        of_side<kSide>().template pairs<kSide>(s);
    }
    T const* total(Side side) const {
        return side == Side::key ? key_.total(side) : value_.total(side);
    }
    int64_t channels(Side side) const {
        return side == Side::key ? key_.channels(side) : value_.channels(side);
    }
    template <Side>
    auto reads(Block const&, Block const&) const {
        return Nothing{};
    }
    template <Side>
    auto writes(Block const&, Block const&) const {
        return Nothing{};
    }
    template <Side kSide>
    bool wants_gradient() const {
        return of_side<kSide>().template wants_gradient<kSide>();
    }
    template <Side kSide>
    T* flux() const {
        return of_side<kSide>().template flux<kSide>();
    }
    void finish_reads(Block const& value, Block const& key) const {
        value_.finish_reads(value, key);
    }
    void gradients(Block const& key, Block const& value, int64_t block) {
        key_.gradients(key, value, block);
        value_.gradients(key, value, block);
    }

  private:
    template <Side kSide>
    auto const& of_side() const {
        if constexpr (kSide == Side::key) {
            return key_;
        } else {
            return value_;
        }
    }

    ChannelDecay<T, Side::key> key_;
    ChannelDecay<T, Side::value> value_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
