// Backward over one stretch of one value head, blocks of tokens last to first. With S the state
// before a block, dS the gradient of the state after it, the scale inside q, and
// X_t = S do_t, Y_j = dS v_j, D[t][j] = do_t · v_j (A and P as in chunk_block.h):
//   dq_t = scale (A(-1, t) X_t + Σ_{j <= t} D[t][j] k_j A(j, t))
//   dk_j = A(j, last) Y_j + Σ_{t >= j} D[t][j] q_t A(j, t)
//   dv_j = dSᵀ (k_j A(j, last)) + Σ_{t >= j} P[t][j] do_t
//   dg_t = A(-1, last) Σ_v S dS + Σ_{s >= t} q_s A(-1, s) X_s + Σ_{j < t} k_j A(j, last) Y_j
//        + Σ_{j < t <= s} D[s][j] q_s k_j A(j, s)
//   dS  <- A(-1, last) dS + Σ_t (q_t A(-1, t)) do_tᵀ
// dg_t is Σ_v exp(g_t) S_{t-1} dS_t written out: every term has passed gate t, none is subtracted.
// S comes from a forward pass that keeps Sᵀ before every piece of blocks, then before every block
// of the piece at hand.
#pragma once

#include "chunk_forward.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// Blocks between two checkpoints: as many states as half a second-level cache holds, within reason.
template <class T>
int64_t blocks_per_piece(int64_t K, int64_t V) {
    constexpr int W = kLanes<T>;
    int64_t const state = panels(K, W) * W * panels(V, W) * W * int64_t(sizeof(T));
    int64_t const blocks = (int64_t(512) << 10) / state;
    return blocks < 16 ? 16 : blocks > 64 ? 64 : blocks;
}

template <class T>
struct BackwardScratch {
    BackwardScratch(void* base, int64_t K, int64_t V, int64_t tokens) : arena(base) {
        constexpr int W = kLanes<T>;
        int64_t const KP = panels(K, W), VP = panels(V, W), block = kBlock * W;
        piece_blocks = blocks_per_piece<T>(K, V);
        blocks = (tokens + kBlock - 1) / kBlock;
        pieces = (blocks + piece_blocks - 1) / piece_blocks;
        state = KP * W * VP * W;
        arena.take_each(KP * block, q, k, a, queries, keys, X, Y, dq, dk, dg);
        arena.take_each(VP * block, v, grad_o, dv);
        total = arena.take(KP * W);
        both = arena.take(KP * W);
        pairs = arena.take(kPairs * W);
        P = arena.take(kBlock * kBlock);
        D = arena.take(kBlock * kBlock);
        dS = arena.take(state);
        dS_transposed = arena.take(state);
        piece_states = arena.take(state * min_of(piece_blocks, blocks));
        checkpoints = arena.take(state * (pieces > 0 ? pieces : 1));
    }

    Arena<T> arena;
    int64_t piece_blocks, blocks, pieces, state;
    T *q, *k, *a, *queries, *keys, *X, *Y, *dq, *dk, *dg;  // [K] block panels
    T *v, *grad_o, *dv;                                    // [V] block panels
    T *total, *both, *pairs, *P, *D;
    T *dS, *dS_transposed;
    T* piece_states;  // Sᵀ before each block of a piece but its first
    T* checkpoints;   // Sᵀ before each piece
};

// dq, dk and dg of one panel from X, Y, D and `both` = Σ_v S dS; see the head of this file.
template <class T>
struct PanelGrads {
    T const *q, *k, *a, *X, *Y, *both, *D;
    T *dq, *dk, *dg;
};

template <class T>
LSM_INLINE void panel_grads(PanelGrads<T> const& g) {
    constexpr int W = kLanes<T>;
    using V = Vector<T>;
    V key[kBlock], dk[kBlock] = {}, dg[kBlock] = {}, from_state[kBlock], to_state[kBlock];
    V prefix = V{} + T(1);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
        V const q = load(g.q + t * W), a = load(g.a + t * W);
        prefix *= a;
        V dq = prefix * load(g.X + t * W);
        from_state[t] = q * dq;
        key[t] = load(g.k + t * W);
        V past{};
#pragma GCC unroll 8
        for (int j = 0; j <= t; ++j) {
            if (j < t) key[j] *= a;
            V const weighted = g.D[t * kBlock + j] * key[j];
            dq += weighted;
            past += q * weighted;
            if (j < t) dg[j + 1] += past;
        }
        store(g.dq + t * W, dq);
        V query = q;
#pragma GCC unroll 8
        for (int j = t; j >= 0; --j) {
            dk[j] += g.D[t * kBlock + j] * query;
            if (j > 0) query *= load(g.a + j * W);
        }
    }
    // Token t's gate acts on what later queries read from the state before the block, ...
    V future{}, suffix = V{} + T(1);
#pragma GCC unroll 8
    for (int t = kBlock - 1; t >= 0; --t) {
        future += from_state[t];
        dg[t] += future;
        to_state[t] = suffix * load(g.Y + t * W);
        suffix *= load(g.a + t * W);
    }
    // ... and on what reaches the state after it: the state before and the keys up to t - 1.
    V past = prefix * load(g.both);
#pragma GCC unroll 8
    for (int t = 0; t < kBlock; ++t) {
        store(g.dk + t * W, dk[t] + to_state[t]);
        store(g.dg + t * W, dg[t] + past);
        past += load(g.k + t * W) * to_state[t];
    }
}

template <class T, class Decay>
class BackwardStretch {
  public:
    BackwardStretch(ChunkParams const& p, ChunkTask const& task, void* scratch)
        : p_(p),
          task_(task),
          s_(scratch, p.K, p.V, task.end - task.begin),
          q_(p.q, p.dtype, task.batch, task.head / (p.HV / p.H)),
          k_(p.k, p.dtype, task.batch, task.head / (p.HV / p.H)),
          v_(p.v, p.dtype, task.batch, task.head),
          grad_o_(p.grad_o, p.dtype, task.batch, task.head),
          dq_(p.dq, p.dtype, task.batch, task.head),
          dk_(p.dk, p.dtype, task.batch, task.head),
          dv_(p.dv, p.dtype, task.batch, task.head),
          decay_(p, task.batch, task.head) {}

    void gradients() {
        auto const* grad_end = static_cast<T const*>(task_.grad_end);
        read_state(s_.dS, grad_end, V, K, V);
        read_transposed_state(s_.dS_transposed, grad_end, K, V);
        read_transposed_state(s_.checkpoints, static_cast<T const*>(task_.state_begin), K, V);
        for (int64_t piece = 0; piece + 1 < s_.pieces; ++piece) write_checkpoint(piece);
        for (int64_t piece = s_.pieces - 1; piece >= 0; --piece) {
            int64_t const first = piece * s_.piece_blocks;
            int64_t const last = min_of(first + s_.piece_blocks, s_.blocks) - 1;
            for (int64_t b = first; b < last; ++b) {
                advance_transposed(state_before(piece, b + 1), state_before(piece, b), b);
            }
            for (int64_t b = last; b >= first; --b) block_gradients(b, state_before(piece, b));
        }
        write_grad_begin();
    }

    // The recurrence of dS alone, and the product of all decays.
    void begin_grad() {
        read_state(s_.dS, static_cast<T const*>(task_.grad_end), V, K, V);
        StretchDecay<T> stretch_decay(task_.decay, K);
        for (int64_t b = s_.blocks - 1; b >= 0; --b) {
            int64_t const t = token(b), count = tokens_of(b);
            q_.read(s_.q, t, count, K, T(p_.scale));
            decay_.read(s_.a, t, count);
            grad_o_.read(s_.grad_o, t, count, V);
            for (int64_t i = 0; i < KP; ++i) start_queries(i);
            for_each_tile(VP, [&](auto tile, int64_t i) { carry_grad<decltype(tile)::value>(i); });
            stretch_decay.multiply(s_.total);
        }
        write_grad_begin();
    }

  private:
    static constexpr int W = kLanes<T>, kPanel = kBlock * W;

    int64_t token(int64_t b) const { return task_.begin + b * kBlock; }
    int64_t tokens_of(int64_t b) const { return min_of(kBlock, task_.end - token(b)); }

    T* state_before(int64_t piece, int64_t b) const {
        int64_t const i = b - piece * s_.piece_blocks;
        return i == 0 ? s_.checkpoints + piece * s_.state : s_.piece_states + (i - 1) * s_.state;
    }

    void start_queries(int64_t i) {
        int64_t const at = i * kPanel;
        queries_to_start(s_.queries + at, s_.total + i * W, s_.q + at, s_.a + at);
    }

    void end_keys(int64_t i) {
        int64_t const at = i * kPanel;
        keys_to_end(s_.keys + at, s_.total + i * W, s_.k + at, s_.a + at);
    }

    void read_keys(int64_t b) {
        int64_t const t = token(b), count = tokens_of(b);
        k_.read(s_.k, t, count, K);
        v_.read(s_.v, t, count, V);
        decay_.read(s_.a, t, count);
        for (int64_t i = 0; i < KP; ++i) end_keys(i);
    }

    void advance_transposed(T* next, T const* state, int64_t b) {
        read_keys(b);
        if (b + 1 < s_.blocks) {
            int64_t const t = token(b + 1), count = tokens_of(b + 1);
            k_.prefetch(t, count, K);
            v_.prefetch(t, count, V);
            decay_.prefetch(t, count);
        }
        for_each_tile(KP, [&](auto tile, int64_t i) {
            constexpr int N = decltype(tile)::value;
            advance_state<DecayOf::lanes, N>(next, state, s_.v, VP, s_.keys, s_.total, i);
        });
    }

    void write_checkpoint(int64_t piece) {
        T* const next = state_before(piece + 1, (piece + 1) * s_.piece_blocks);
        T const* state = state_before(piece, piece * s_.piece_blocks);
        for (int64_t i = 0; i < s_.piece_blocks; ++i, state = next) {
            advance_transposed(next, state, piece * s_.piece_blocks + i);
        }
    }

    // Keys, values and gates of a piece are still at hand from its forward pass.
    void prefetch_gradients(int64_t b) {
        int64_t const t = token(b), count = tokens_of(b);
        for (HeadRows<T> const* rows : keyed_) rows->prefetch(t, count, K);
        for (HeadRows<T> const* rows : valued_) rows->prefetch(t, count, V);
        decay_.prefetch_grad(t, count);
    }

    void block_gradients(int64_t b, T const* state) {
        int64_t const t = token(b), count = tokens_of(b);
        read_keys(b);
        q_.read(s_.q, t, count, K, T(p_.scale));
        grad_o_.read(s_.grad_o, t, count, V);
        for (int64_t i = 0; i < KP; ++i) start_queries(i);
        scores(s_.P, s_.pairs, s_.q, s_.k, s_.a, KP);
        causal_dots(s_.D, s_.grad_o, s_.v, VP);
        if (b > 0) prefetch_gradients(b - 1);

        for_each_tile(VP, [&](auto tile, int64_t i) {
            constexpr int N = decltype(tile)::value;
            block_times_state<N>(s_.dv, s_.keys, s_.dS, KP * W, K, i,
                                 PlusTriangle<Triangle::future, T>{s_.P, s_.grad_o});
            carry_grad<N>(i);
        });
        for_each_tile(KP, [&](auto tile, int64_t i) {
            constexpr int N = decltype(tile)::value;
            block_times_state<N>(s_.X, s_.grad_o, state, VP * W, V, i);
            block_times_state<N>(s_.Y, s_.v, s_.dS_transposed, VP * W, V, i);
            sum_products<N>(s_.both, state, s_.dS_transposed, VP * W, i);
            advance_state<DecayOf::lanes, N>(s_.dS_transposed, s_.dS_transposed, s_.grad_o, VP,
                                             s_.queries, s_.total, i);
        });
        for (int64_t i = 0; i < KP; ++i) {
            int64_t const at = i * kPanel;
            panel_grads<T>({s_.q + at, s_.k + at, s_.a + at, s_.X + at, s_.Y + at, s_.both + i * W,
                            s_.D, s_.dq + at, s_.dk + at, s_.dg + at});
        }
        dv_.write(s_.dv, t, count, V);
        dq_.write(s_.dq, t, count, K, T(p_.scale));
        dk_.write(s_.dk, t, count, K);
        decay_.write_grad(s_.dg, t, count);
    }

    // Panels [i, i + N) of dS, from the end of a block to its beginning.
    template <int N>
    LSM_INLINE void carry_grad(int64_t i) {
        advance_state<DecayOf::rows, N>(s_.dS, s_.dS, s_.queries, KP, s_.grad_o, s_.total, i);
    }

    void write_grad_begin() {
        if (task_.grad_begin != nullptr)
            write_state(static_cast<T*>(task_.grad_begin), V, s_.dS, K, V);
    }

    ChunkParams const& p_;
    ChunkTask const& task_;
    BackwardScratch<T> s_;
    HeadRows<T> q_, k_, v_, grad_o_, dq_, dk_, dv_;
    Decay decay_;
    HeadRows<T> const* const keyed_[3] = {&q_, &dq_, &dk_};
    HeadRows<T> const* const valued_[2] = {&grad_o_, &dv_};
    int64_t const K = p_.K, V = p_.V, KP = panels(K, W), VP = panels(V, W);
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
