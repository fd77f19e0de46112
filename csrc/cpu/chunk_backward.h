// Backward over one stretch of one value head, blocks of tokens last to first (the sums:
// chunk_block.h). S is the state before a block, dS the gradient of the state after it:
//   dS  <- A(-1, last) dS + Σ_t (q_t A(-1, t)) grad_o_tᵀ
// S comes from a forward pass that keeps Sᵀ before every piece of blocks, then before every block
// of the piece at hand.
#pragma once

#include "chunk_forward.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Blocks between two checkpoints: as many states as half a second-level cache holds, within reason.
inline int64_t blocks_per_piece(int64_t state_bytes) {
    int64_t const blocks = (int64_t(512) << 10) / state_bytes;
    return blocks < 16 ? 16 : blocks > 64 ? 64 : blocks;
}

template <class T, class Decay>
class BackwardStretch : Stretch<T, Decay> {
    using Base = Stretch<T, Decay>;
    using Base::arena_, Base::task_, Base::p_, Base::key_, Base::value_, Base::decay_;
    using Base::blocks_, Base::features_, Base::q_, Base::k_, Base::v_, Base::C, Base::W;

  public:
    BackwardStretch(ChunkParams const& p, ChunkTask const& task, void* scratch)
        : Base(p, task, scratch, p.normaliser.sums() ? 1 : 0),
          grad_o_(Base::value_rows(p.grad_o, Base::readers_)),
          dq_(key_gradient(p.dq, Base::readers_)),
          dk_(key_gradient(p.dk, Base::writers_)),
          dv_(Base::value_rows(p.dv, Base::writers_)),
          normaliser_(p, task, value_, arena_) {
        Base::lay_out(key_, Side::key);
        Base::lay_out(value_, Side::value);
        state_ = key_.panels * W * value_.panels * W;
        piece_ = blocks_per_piece(state_ * int64_t(sizeof(T)));
        pieces_ = (blocks_ + piece_ - 1) / piece_;
        arena_.take_each(state_, dS_, dS_transposed_, S_);
        piece_states_ = arena_.take(state_ * min_of(piece_, blocks_));
        checkpoints_ = arena_.take(state_ * (pieces_ > 0 ? pieces_ : 1));
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void gradients() {
        read_grad_end();
        transpose_state(dS_transposed_, dS_, value_.panels, key_.panels);
        read_transposed_state(checkpoints_, static_cast<T const*>(task_.state_begin), p_.K, p_.V,
                              value_.panels);
        normaliser_.read_begin(checkpoints_, p_.K);
        for (int64_t i = 0; i + 1 < pieces_; ++i) write_checkpoint(i);
        for (int64_t i = pieces_ - 1; i >= 0; --i) {
            int64_t const first = i * piece_, last = min_of(first + piece_, blocks_) - 1;
            for (int64_t b = first; b < last; ++b) {
                advance_transposed(state_before(i, b + 1), state_before(i, b), b);
            }
            for (int64_t b = last; b >= first; --b) block_gradients(b, state_before(i, b));
        }
        write_grad_begin();
    }

    // The recurrence of dS alone, and the product of all decays.
    void begin_grad() {
        read_grad_end();
        StretchDecay<T> stretch_decay(task_.decay, gates_per_token(p_.decay, p_.K, p_.V));
        for (int64_t b = blocks_ - 1; b >= 0; --b) {
            read_readers(b);
            decay_.read(b);
            Base::to_start();
            for_each_tile(value_.panels, [&](auto tile, int64_t i) {
                carry_grad<Side::value, decltype(tile)::value>(i);
            });
            stretch_decay.multiply(decay_);
        }
        write_grad_begin();
    }

  private:
    typename Base::Rows key_gradient(Rows const& rows, Span const& span) const {
        return {rows, p_.key_grad_dtype, task_.batch, task_.head, span, p_.channels};
    }

    T* state_before(int64_t piece, int64_t b) const {
        int64_t const i = b - piece * piece_;
        return i == 0 ? checkpoints_ + piece * state_ : piece_states_ + (i - 1) * state_;
    }

    void read_readers(int64_t b) {
        Base::read_queries(b);
        grad_o_.read(value_.reader, b);
        normaliser_.divide(value_.reader, b);
    }

    void read_writers(int64_t b) {
        Base::read_keys(b);
        v_.read(value_.writer, b);
        normaliser_.weigh(value_.writer, b);
        decay_.read(b);
        Base::to_end();
    }

    void advance_transposed(T* next, T const* state, int64_t b) {
        read_writers(b);
        k_.prefetch(b + 1);
        v_.prefetch(b + 1);
        decay_.prefetch(b + 1);
        for_each_tile(key_.panels, [&](auto tile, int64_t i) {
            Base::template advance<Side::key, decltype(tile)::value>(next, state, value_.end,
                                                                     key_.end, i);
        });
    }

    void write_checkpoint(int64_t piece) {
        T* const next = state_before(piece + 1, (piece + 1) * piece_);
        T const* state = state_before(piece, piece * piece_);
        for (int64_t i = 0; i < piece_; ++i, state = next) {
            advance_transposed(next, state, piece * piece_ + i);
        }
    }

    // Keys, values and gates of a piece are still at hand from its forward pass.
    LSM_INLINE void prefetch_gradients(int64_t b) const {
        for (auto const* rows : {&q_, &dq_, &dk_, &grad_o_, &dv_}) rows->prefetch(b);
        decay_.prefetch_gradient(b);
        normaliser_.prefetch(b);
    }

    void block_gradients(int64_t b, T const* state) {
        read_writers(b);
        read_readers(b);
        Base::to_start();
        decay_.template pairs<Side::key>(key_);
        decay_.template pairs<Side::value>(value_);
        if (b > 0) prefetch_gradients(b - 1);
        if (wants_gate<Side::value>()) {
            transpose_state(S_, state, key_.panels, value_.panels);
        }
        transpose_state(dS_transposed_, dS_, value_.panels, key_.panels);
        side_gradients<Side::value>(S_);
        side_gradients<Side::key>(state);
        decay_.gradients(key_, value_, b);
        features_.write(dq_, key_.d_reader, key_.raw_reader, b, T(p_.scale));
        features_.write(dk_, key_.d_writer, key_.raw_writer, b);
        normaliser_.gradients(value_.d_writer, value_.writer, b);
        dv_.write(value_.d_writer, b);
    }

    // Whether a gradient is wanted of gates on one side.
    template <Side kSide>
    bool wants_gate() const {
        if constexpr (Decay::acts_on(kSide)) {
            return decay_.template wants_gradient<kSide>();
        } else {
            return false;
        }
    }

    // d_reader and d_writer of one side, but for what the decay policy does in the end; dS before
    // the block. S has this side's channels in lanes.
    template <Side kSide>
    LSM_INLINE void side_gradients(T const* S) {
        auto const &own = Base::side(kSide), &other = Base::side(opposite(kSide));
        T* const dS = kSide == Side::key ? dS_transposed_ : dS_;
        bool const d_gate = wants_gate<kSide>();
        for_each_tile(own.panels, [&](auto tile, int64_t i) {
            constexpr int N = decltype(tile)::value;
            auto const product = [&](T* out, T const* rows, T const* state, auto const& plus) {
                block_times_state<C, N>(out, rows, state, other.panels * W, other.channels, i,
                                        plus);
            };
            if (kSide == Side::key || d_gate) {  // a gradient of grad_o nobody asks for
                product(own.d_reader, other.start, S, Base::template reads<kSide>());
            }
            product(own.d_writer, other.end, dS, Base::template writes<kSide>());
            if constexpr (Decay::acts_on(kSide)) {
                constexpr bool kWeighed = Decay::of(kSide) == DecayOf::both;
                if (d_gate) {
                    sum_products<kWeighed, N>(decay_.template flux<kSide>(), S, dS,
                                              other.panels * W, decay_.total(opposite(kSide)), i);
                }
            }
            if (kSide == Side::value) carry_grad<kSide, N>(i);
        });
    }

    // Panels [i, i + N) of dS with one side's channels in lanes, from the end of a block to its
    // beginning.
    template <Side kSide, int N>
    LSM_INLINE void carry_grad(int64_t i) {
        auto const &own = Base::side(kSide), &other = Base::side(opposite(kSide));
        T* const dS = kSide == Side::key ? dS_transposed_ : dS_;
        Base::template advance<kSide, N>(dS, dS, other.start, own.start, i);
    }

    void read_grad_end() {
        read_state(dS_, static_cast<T const*>(task_.grad_end), p_.V, p_.K, p_.V, value_.panels);
        normaliser_.read_grad_end(dS_, p_.K);
    }

    void write_grad_begin() {
        if (task_.grad_begin != nullptr)
            write_state(static_cast<T*>(task_.grad_begin), p_.V, dS_, p_.K, p_.V);
        normaliser_.write_grad_begin(dS_, p_.K);
    }

    typename Base::Rows grad_o_, dq_, dk_, dv_;
    std::conditional_t<std::is_same_v<Decay, ScalarDecay<T>>, NormaliserColumn<T, C>, NoNormaliser>
        normaliser_;
    int64_t state_, piece_, pieces_;
    T *dS_, *dS_transposed_;
    T* S_;             // before a block, V in lanes
    T* piece_states_;  // Sᵀ before each block of a piece but its first
    T* checkpoints_;   // Sᵀ before each piece
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
