// Decay policies: how a block's decays a = exp(g) come out of memory, and where their gradients go.
// Padding decays by exp(0) = 1, which leaves a state as it is.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {

// g: [B, T, HV, K], one natural-log decay per channel of the key.
template <class T>
class VectorDecay {
  public:
    VectorDecay(ChunkParams const& p, int64_t batch, int64_t head)
        : g_(p.g, p.gate_dtype, batch, head), dg_(p.dg, p.gate_dtype, batch, head), K_(p.K) {}

    void read(T* a, int64_t t, int64_t count) const {
        constexpr int W = kLanes<T>;
        g_.read(a, t, count, K_);
        for (int64_t i = 0; i < panels(K_, W) * kBlock; ++i) store(a + i * W, exp(load(a + i * W)));
    }
    void prefetch(int64_t t, int64_t count) const { g_.prefetch(t, count, K_); }
    void prefetch_grad(int64_t t, int64_t count) const { dg_.prefetch(t, count, K_); }
    void write_grad(T const* dg, int64_t t, int64_t count) const { dg_.write(dg, t, count, K_); }

  private:
    HeadRows<T> g_, dg_;
    int64_t K_;
};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
