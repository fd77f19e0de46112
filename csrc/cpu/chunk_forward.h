// Forward over one stretch of one value head, a block of tokens at a time:
//   o_t = (q_t A(-1, t))ᵀ S + Σ_{j <= t} P[t][j] v_j
//   S  <- A(-1, last) S + Σ_j (k_j A(j, last)) v_jᵀ
// The scale is folded into q. Single-threaded: the scheduler deals out stretches, heads and value
// columns.
#pragma once

#include "chunk_block.h"
#include "chunk_kernels.h"
#include "decay.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

template <class T>
struct ForwardScratch {
    ForwardScratch(void* base, int64_t K, int64_t V) : arena(base) {
        constexpr int W = kLanes<T>;
        int64_t const KP = panels(K, W), VP = panels(V, W), block = kBlock * W;
        arena.take_each(KP * block, q, k, a, queries, keys);
        arena.take_each(VP * block, v, o);
        total = arena.take(KP * W);
        pairs = arena.take(kPairs * W);
        P = arena.take(kBlock * kBlock);
        S = arena.take(KP * W * VP * W);
    }

    Arena<T> arena;
    T *q, *k, *a, *queries, *keys;  // [K] block panels
    T *v, *o;                       // [V] block panels
    T *total, *pairs, *P;
    T* S;  // [K, V], V in lanes
};

// The product of a stretch's decays, for the scheduler that joins stretches.
template <class T>
class StretchDecay {
  public:
    StretchDecay(void* decay, int64_t K)
        : decay_(static_cast<T*>(decay)), K_(decay_ == nullptr ? 0 : K) {
        for (int64_t i = 0; i < K_; ++i) decay_[i] = 1;
    }
    void multiply(T const* total) {
        for (int64_t i = 0; i < K_; ++i) decay_[i] *= total[i];
    }

  private:
    T* decay_;
    int64_t K_;
};

template <class T, class Decay, bool kOutputs>
void forward_stretch(ChunkParams const& p, ChunkTask const& task, void* scratch) {
    constexpr int W = kLanes<T>, block = kBlock * W;
    int64_t const K = p.K, V = task.v_end - task.v_begin, KP = panels(K, W), VP = panels(V, W);
    int64_t const query_head = task.head / (p.HV / p.H);
    ForwardScratch<T> s(scratch, K, V);
    HeadRows<T> const q(p.q, p.dtype, task.batch, query_head),
        k(p.k, p.dtype, task.batch, query_head);
    HeadRows<T> const v(p.v, p.dtype, task.batch, task.head, task.v_begin);
    HeadRows<T> const o(p.o, p.dtype, task.batch, task.head, task.v_begin);
    Decay const decay(p, task.batch, task.head);

    auto const* begin = static_cast<T const*>(task.state_begin);
    read_state(s.S, begin == nullptr ? begin : begin + task.v_begin, p.V, K, V);
    StretchDecay<T> stretch_decay(task.decay, K);
    for (int64_t t = task.begin; t < task.end; t += kBlock) {
        int64_t const count = min_of(kBlock, task.end - t);
        int64_t const next = t + kBlock, next_count = min_of(kBlock, task.end - next);
        k.read(s.k, t, count, K);
        k.prefetch(next, next_count, K);
        v.read(s.v, t, count, V);
        v.prefetch(next, next_count, V);
        decay.read(s.a, t, count);
        decay.prefetch(next, next_count);
        for (int64_t i = 0; i < KP; ++i) {
            keys_to_end(s.keys + i * block, s.total + i * W, s.k + i * block, s.a + i * block);
        }
        if constexpr (kOutputs) {
            q.read(s.q, t, count, K, T(p.scale));
            q.prefetch(next, next_count, K);
            o.prefetch(next, next_count, V);
            for (int64_t i = 0; i < KP; ++i) {
                queries_to_start(s.queries + i * block, s.total + i * W, s.q + i * block,
                                 s.a + i * block);
            }
            scores(s.P, s.pairs, s.q, s.k, s.a, KP);
        }
        for_each_tile(VP, [&](auto tile, int64_t i) {
            constexpr int N = decltype(tile)::value;
            if constexpr (kOutputs) {
                block_times_state<N>(s.o, s.queries, s.S, KP * W, K, i,
                                     PlusTriangle<Triangle::past, T>{s.P, s.v});
            }
            advance_state<DecayOf::rows, N>(s.S, s.S, s.keys, KP, s.v, s.total, i);
        });
        if constexpr (kOutputs) o.write(s.o, t, count, V);
        stretch_decay.multiply(s.total);
    }
    if (task.state_end != nullptr) {
        write_state(static_cast<T*>(task.state_end) + task.v_begin, p.V, s.S, K, V);
    }
}

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
