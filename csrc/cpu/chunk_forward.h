// Forward over one stretch of one value head, a block of tokens at a time (the sums: chunk_block.h).
// The scale is folded into q. Tokens that read the state before they write to it are blocks whose
// writers come a slot after their readers, behind one that writes nothing. Single-threaded: the
// scheduler deals out stretches, heads and value columns.
#pragma once

#include "chunk_normaliser.h"
#include "decay_channel.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// The product of a stretch's decays, for the scheduler that joins stretches.
template <class T>
class StretchDecay {
  public:
    StretchDecay(void* decay, int64_t count) : decay_(static_cast<T*>(decay)) {
        for (int64_t i = 0; decay_ != nullptr && i < count; ++i) decay_[i] = 1;
    }
    template <class Decay>
    void multiply(Decay const& block) {
        if (decay_ == nullptr) return;
        T* product = decay_;
        take<Side::key>(block, product);
        take<Side::value>(block, product);
    }

  private:
    template <Side kSide, class Decay>
    static void take(Decay const& block, T*& product) {
        if constexpr (Decay::acts_on(kSide)) {
            T const* const total = block.total(kSide);
            for (int64_t i = 0; i < block.channels(kSide); ++i) *product++ *= total[i];
        }
    }

    T* decay_;
};

// What forward and backward have in common: a stretch of one value head, seen by its two sides.
template <class T, class Decay>
class Stretch {
  protected:
    static constexpr int W = kLanes<T>, C = Decay::kBlock;
    using Rows = HeadRows<T, C>;

    // more_columns: of values, behind those in memory.
    Stretch(ChunkParams const& p, ChunkTask const& task, void* scratch, int64_t more_columns = 0)
        : p_(p),
          task_(task),
          arena_(scratch),
          readers_{task.begin, task.end},
          writers_{task.begin, task.end, p.exclusive ? 1 : 0},
          blocks_((task.end - task.begin + writers_.delay + C - 1) / C),
          key_(p.K, p.features, p.channels),
          value_(task.v_end - task.v_begin + more_columns),
          decay_(p, task, writers_, arena_),
          features_(p, arena_),
          q_(key_rows(p.q, readers_)),
          k_(key_rows(p.k, writers_)),
          v_(value_rows(p.v, writers_)) {
        if (task.begin == task.end) blocks_ = 0;
    }

    Rows key_rows(lsm::Rows const& rows, Span const& span) const {
        return {rows, p_.dtype, task_.batch, task_.head / (p_.HV / p_.H), span, p_.channels};
    }
    Rows value_rows(lsm::Rows const& rows, Span const& span) const {
        return {rows,         p_.dtype, task_.batch, task_.head, span, task_.v_end - task_.v_begin,
                task_.v_begin};
    }

    // Rows of one side for a block; which of them decay before a state takes them in.
    void lay_out(BlockSide<T>& side, Side which) {
        arena_.take_each(side.panels * C * W, side.reader, side.writer, side.d_reader,
                         side.d_writer);
        side.raw_reader = side.reader, side.raw_writer = side.writer;
        if (side.features != Features::none)
            arena_.take_each(side.raw_panels * C * W, side.raw_reader, side.raw_writer);
        side.pairs = arena_.take(C * C);
        if constexpr (Decay::acts_on(Side::key) || Decay::acts_on(Side::value)) {
            if (Decay::acts_on(which)) return Decay::lay_out(side, arena_);
        }
        side.start = side.reader, side.end = side.writer;
    }

    BlockSide<T> const& side(Side which) const { return which == Side::key ? key_ : value_; }

    void read_queries(int64_t block) const {
        features_.read(q_, key_.reader, key_.raw_reader, block, T(p_.scale));
    }
    void read_keys(int64_t block) const { features_.read(k_, key_.writer, key_.raw_writer, block); }

    // Readers of a side as the state takes them, or writers as it gives them.
    template <Side kSide>
    void to_start() const {
        if constexpr (Decay::acts_on(kSide)) decay_.template to_start<kSide>(side(kSide));
    }
    template <Side kSide>
    void to_end() const {
        if constexpr (Decay::acts_on(kSide)) decay_.template to_end<kSide>(side(kSide));
    }
    void to_start() const {
        to_start<Side::key>();
        to_start<Side::value>();
    }
    void to_end() const {
        to_end<Side::key>();
        to_end<Side::value>();
    }

    // What d_reader and d_writer of one side need after the product with the state.
    template <Side kSide>
    auto reads() const {
        auto const &own = side(kSide), &other = side(opposite(kSide));
        if constexpr (Decay::acts_on(kSide)) {
            return decay_.template reads<kSide>(own, other);
        } else {
            return PlusTriangle<Triangle::past, C, T>{other.pairs, own.writer};
        }
    }
    template <Side kSide>
    auto writes() const {
        auto const &own = side(kSide), &other = side(opposite(kSide));
        if constexpr (Decay::acts_on(kSide)) {
            return decay_.template writes<kSide>(own, other);
        } else {
            return PlusTriangle<Triangle::future, C, T>{other.pairs, own.reader};
        }
    }

    // Panels [i, i + N) of a state with one side's channels in lanes, over a block.
    template <Side kSide, int N>
    LSM_INLINE void advance(T* next, T const* state, T const* rows, T const* lanes, int64_t i) {
        constexpr Side kOther = opposite(kSide);
        advance_state<C, Decay::of(kSide), N>(next, state, rows, side(kOther).panels, lanes,
                                              decay_.total(kOther), decay_.total(kSide), i);
    }

    ChunkParams const& p_;
    ChunkTask const& task_;
    Arena<T> arena_;
    Span readers_, writers_;
    int64_t blocks_;
    BlockSide<T> key_, value_;
    Decay decay_;
    std::conditional_t<std::is_same_v<Decay, ScalarDecay<T>>, FeatureRows<T, C>, PlainRows<T, C>>
        features_;
    Rows q_, k_, v_;
};

template <class T, class Decay>
class ForwardStretch : Stretch<T, Decay> {
    using Base = Stretch<T, Decay>;
    using Base::arena_, Base::task_, Base::p_, Base::key_, Base::value_, Base::decay_;
    using Base::blocks_, Base::q_, Base::k_, Base::v_, Base::C, Base::W;

  public:
    ForwardStretch(ChunkParams const& p, ChunkTask const& task, void* scratch)
        : Base(p, task, scratch),
          o_(Base::value_rows(p.o, Base::readers_)),
          normaliser_(p, task, key_.panels, arena_) {
        Base::lay_out(key_, Side::key);
        Base::lay_out(value_, Side::value);
        S_ = arena_.take(key_.panels * W * value_.panels * W);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    template <bool kOutputs>
    void run() {
        auto const* begin = static_cast<T const*>(task_.state_begin);
        read_state(S_, begin == nullptr ? begin : begin + task_.v_begin, p_.V, p_.K,
                   value_.channels, value_.panels);
        normaliser_.begin();
        StretchDecay<T> stretch_decay(task_.decay, gates_per_token(p_.decay, p_.K, p_.V));
        for (int64_t b = 0; b < blocks_; ++b) {
            Base::read_keys(b);
            k_.prefetch(b + 1);
            v_.read(value_.writer, b);
            v_.prefetch(b + 1);
            normaliser_.weigh(value_.writer, value_.panels, b);
            decay_.read(b);
            decay_.prefetch(b + 1);
            Base::to_end();
            if constexpr (kOutputs) {
                Base::read_queries(b);
                q_.prefetch(b + 1);
                o_.prefetch(b + 1);
                Base::template to_start<Side::key>();
                decay_.template pairs<Side::key>(key_);
                normaliser_.sums(key_.start, key_.pairs, b);
            }
            normaliser_.advance(key_.end, decay_.total(Side::key));
            for_each_tile(value_.panels, [&](auto tile, int64_t i) {
                constexpr int N = decltype(tile)::value;
                if constexpr (kOutputs) {
                    block_times_state<C, N>(value_.d_reader, key_.start, S_, key_.panels * W,
                                            key_.channels, i, Base::template reads<Side::value>());
                }
                Base::template advance<Side::value, N>(S_, S_, key_.end, value_.end, i);
            });
            if constexpr (kOutputs) {
                if constexpr (Decay::acts_on(Side::value)) decay_.finish_reads(value_, key_);
                normaliser_.divide(value_.d_reader, value_.panels);
                o_.write(value_.d_reader, b);
            }
            stretch_decay.multiply(decay_);
        }
        if (task_.state_end != nullptr) {
            write_state(static_cast<T*>(task_.state_end) + task_.v_begin, p_.V, S_, p_.K,
                        value_.channels);
        }
        normaliser_.end();
    }

  private:
    typename Base::Rows o_;
    std::conditional_t<std::is_same_v<Decay, ScalarDecay<T>>, StretchNormaliser<T, C>, NoNormaliser>
        normaliser_;
    T* S_;  // [K, V], V in lanes
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
