// One token of decoding with the delta engine, S [B, HV, K, V] fp32 updated in place.
//
// As in kernels/step/step.cuh the state is read once and written once and everything else is noise:
// a block owns Columns columns of one head's state and a thread first issues all its loads of it.
// Every micro-step then takes one reduction over K, because what its write adds to the output is
// known without another look at the state:
//
//     r = S^T dot       u = beta (v - r), or r with dplr       S = A S + add u^T + plain v^T
//     o = scale · (S^T A q + (q · add) u + (q · plain) v)      of the last micro-step
//
// dot is A k (householder) or the erase key, add is k or (dplr) the write key, plain is k of dplr;
// A belongs to the first micro-step.
#pragma once

#include "kernels/delta/loaders.cuh"
#include "kernels/platform.cuh"

namespace lsm::delta::decode {

// K: smallest supported number of state rows that holds the actual one.
template <int K, int Columns>
struct Config {
    static constexpr int kThreads = 128;
    static constexpr int kLanes = Columns / 4;         // threads along V
    static constexpr int kGroups = kThreads / kLanes;  // threads along K
    static constexpr int kRows = K / kGroups;  // rows per thread: group, group + kGroups, ...
    static constexpr int kPerThread = (K + kThreads - 1) / kThreads;  // channels a thread loads
    static constexpr int kSums = 10;  // r and q's dots with four columns, and with add and plain
    static_assert(kLanes <= 32 && 32 % kLanes == 0 && K % kGroups == 0);
};

template <int K, int Columns>
struct SharedStorage {
    using C = Config<K, Columns>;
    struct MicroStep {
        float query[K], decay[K], dot[K], add[K], plain[K];
        alignas(16) float value[Columns], beta[Columns];
    } micro[2];
    float partial[2][C::kThreads / 32][C::kSums][C::kLanes];  // a share per warp
};

template <class T>
struct StepOperands {
    Transition transition;
    Rows q, k, v, erase, write, o;
    GateLoader<T> gates, betas;
    float* state;
    unsigned HV, heads_per_group;
    int K, V, n;
    float scale;
    bool whole_vectors;  // every row of the state starts on 16 bytes and has whole pieces of 16
};

template <class T, int K, int Columns>
struct Step {
    using C = Config<K, Columns>;
    using Storage = SharedStorage<K, Columns>;

    StepOperands<T> const& p;
    Storage& shared = *reinterpret_cast<Storage*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % C::kLanes, group = tid / C::kLanes;
    unsigned const tiles = (p.V + Columns - 1) / Columns;
    unsigned const chain = blockIdx.x / tiles;  // batch · HV + head
    int const column = first_column() + lane * 4;
    unsigned const batch = chain / p.HV, head = chain % p.HV, group_head = head / p.heads_per_group;
    float* const state = p.state + i64(chain) * p.K * p.V + column;
    float S[C::kRows][4];
    // Of the next micro-step.
    float query[C::kPerThread], decay[C::kPerThread], key[C::kPerThread], erase[C::kPerThread],
        written[C::kPerThread];
    float value, beta;

    LSM_DEVICE explicit Step(StepOperands<T> const& p) : p(p) {}

    LSM_DEVICE int first_column() const { return static_cast<int>(blockIdx.x % tiles) * Columns; }
    LSM_DEVICE int row(int i) const { return group + i * C::kGroups; }
    LSM_DEVICE int channel(int i) const { return tid + i * C::kThreads; }

    // What lies outside is zero and stays out of every sum.
    LSM_DEVICE void load_state() {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            float const* const from = state + i64(row(i)) * p.V;
            if (p.whole_vectors) {
                bool const inside = row(i) < p.K && column < p.V;
                float4 const x = inside ? load_global(reinterpret_cast<float4 const*>(from))
                                        : float4{0.f, 0.f, 0.f, 0.f};
                S[i][0] = x.x, S[i][1] = x.y, S[i][2] = x.z, S[i][3] = x.w;
            } else {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) {
                    bool const inside = row(i) < p.K && column + j < p.V;
                    S[i][j] = inside ? load_global(from + j) : 0.f;
                }
            }
        }
    }

    LSM_DEVICE void store_state() {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            if (row(i) >= p.K) break;
            float* const to = state + i64(row(i)) * p.V;
            if (p.whole_vectors) {
                if (column < p.V)
                    store_global(reinterpret_cast<float4*>(to),
                                 float4{S[i][0], S[i][1], S[i][2], S[i][3]});
            } else {
                LSM_UNROLL
                for (int j = 0; j < 4; ++j) {
                    if (column + j < p.V) store_global(to + j, S[i][j]);
                }
            }
        }
    }

    LSM_DEVICE float element(Rows const& x, int time, unsigned head, int c, int size) const {
        if (x.data == nullptr || c >= size) return 0.f;
        i64 const at = batch * x.batch + time * x.time + head * x.head + c;
        return static_cast<float>(load_global(static_cast<T const*>(x.data) + at));
    }

    // A token decays in its first micro-step.
    LSM_DEVICE void fetch(int micro) {
        LSM_UNROLL
        for (int i = 0; i < C::kPerThread; ++i) {
            int const c = channel(i);
            query[i] = micro == p.n - 1 ? element(p.q, 0, group_head, c, p.K) : 0.f;
            decay[i] = micro == 0 && c < p.K
                           ? p.gates.factor(p.gates.load(p.gates.at(batch, 0, head, c)))
                           : 1.f;
            key[i] = element(p.k, micro, group_head, c, p.K);
            erase[i] = element(p.erase, micro, group_head, c, p.K);
            written[i] = element(p.write, micro, group_head, c, p.K);
        }
        int const v = tid < Columns ? first_column() + tid : p.V;
        value = element(p.v, micro, head, v, p.V);
        beta = v < p.V ? p.betas.value(p.betas.load(p.betas.at(batch, micro, head, v))) : 0.f;
    }

    LSM_DEVICE void store(typename Storage::MicroStep& to) const {
        bool const dplr = p.transition == Transition::dplr;
        LSM_UNROLL
        for (int i = 0; i < C::kPerThread; ++i) {
            int const c = channel(i);
            if (c >= K) break;
            to.query[c] = query[i];
            to.decay[c] = decay[i];
            to.dot[c] = p.transition == Transition::householder ? decay[i] * key[i] : erase[i];
            to.add[c] = dplr ? written[i] : key[i];
            to.plain[c] = dplr ? key[i] : 0.f;
        }
        if (tid < Columns) to.value[tid] = value, to.beta[tid] = beta;
    }

    // Over K, the same in all threads along it.
    LSM_DEVICE void reduce(float (&sums)[C::kSums], int micro) {
        LSM_UNROLL
        for (int distance = C::kLanes; distance < 32; distance *= 2) {
            LSM_UNROLL
            for (int j = 0; j < C::kSums; ++j)
                sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], distance);
        }
        auto& partial = shared.partial[micro % 2];
        if (tid % 32 < C::kLanes) {
            LSM_UNROLL
            for (int j = 0; j < C::kSums; ++j) partial[tid / 32][j][lane] = sums[j];
        }
        __syncthreads();
        LSM_UNROLL
        for (int j = 0; j < C::kSums; ++j) {
            sums[j] = partial[0][j][lane];
            LSM_UNROLL
            for (int w = 1; w < C::kThreads / 32; ++w) sums[j] += partial[w][j][lane];
        }
    }

    LSM_DEVICE void advance(int micro) {
        auto& token = shared.micro[micro % 2];
        store(token);
        __syncthreads();
        bool const last = micro == p.n - 1;
        if (!last) fetch(micro + 1);

        float sums[C::kSums] = {};
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = row(i);
            float const q = token.query[c], dot = token.dot[c], aq = token.decay[c] * q;
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                sums[j] += dot * S[i][j];
                sums[4 + j] += aq * S[i][j];
            }
            sums[8] += q * token.add[c];
            sums[9] += q * token.plain[c];
        }
        reduce(sums, micro);

        bool const dplr = p.transition == Transition::dplr;
        float x[4], u[4];
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[j] = token.value[lane * 4 + j];
            u[j] = dplr ? sums[j] : token.beta[lane * 4 + j] * (x[j] - sums[j]);
        }
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = row(i);
            float const a = token.decay[c], add = token.add[c], plain = token.plain[c];
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) S[i][j] = a * S[i][j] + add * u[j] + plain * x[j];
        }
        if (!last || group != 0) return;
        T* const o = static_cast<T*>(p.o.data) + batch * p.o.batch + head * p.o.head + column;
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) {
            float const out = sums[4 + j] + sums[8] * u[j] + sums[9] * x[j];
            if (column + j < p.V) store_global(o + j, static_cast<T>(p.scale * out));
        }
    }
};

template <class T, int K, int Columns>
__global__ void __launch_bounds__(Config<K, Columns>::kThreads)
    step_kernel(StepOperands<T> const p) {
    Step<T, K, Columns> s(p);
    s.load_state();
    s.fetch(0);
    LSM_UNROLL_BY(1)
    for (int micro = 0; micro < p.n; ++micro) s.advance(micro);
    s.store_state();
}

template <class T, int K, int Columns>
void run_step(DeltaStepParams const& p, void* stream) {
    StepOperands<T> const operands{p.transition,
                                   p.q,
                                   p.k,
                                   p.v,
                                   p.erase,
                                   p.write,
                                   p.o,
                                   decay_loader<T>(p),
                                   beta_loader<T>(p),
                                   static_cast<float*>(p.state),
                                   static_cast<unsigned>(p.HV),
                                   static_cast<unsigned>(p.HV / p.H),
                                   static_cast<int>(p.K),
                                   static_cast<int>(p.V),
                                   static_cast<int>(p.n),
                                   static_cast<float>(p.scale),
                                   p.V % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % 16 == 0};
    i64 const blocks = p.B * p.HV * ((p.V + Columns - 1) / Columns);
    launch(step_kernel<T, K, Columns>, dim3(static_cast<unsigned>(blocks)),
           dim3(Config<K, Columns>::kThreads), sizeof(SharedStorage<K, Columns>), stream, operands);
}

}  // namespace lsm::delta::decode
