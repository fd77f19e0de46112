// One token of decoding: S = decay(S) + k v^T, o = scale · S^T q, of the new state or of the old one,
// with S [B, HV, K, V] fp32 updated in place.
//
// The state is read once and written once and everything else is noise, so a thread first issues
// all its loads of the state, in 16-byte pieces, and only then touches q, k, v and the gate. A
// block owns Columns columns of one head's state: Columns / 4 lanes side by side along V, the other
// threads along K. Narrow tiles make enough blocks of few heads. The arithmetic is free beside the
// state's traffic: every element is decayed by its row and by its column, whose gates may be absent.
#pragma once

#include "kernels/platform.cuh"
#include "kernels/policy/decay.cuh"
#include "params/chunk.h"

namespace lsm::step_kernel {

// K: smallest supported number of state rows that holds the actual one.
template <int K, int Columns>
struct Config {
    static constexpr int kThreads = 128;
    static constexpr int kLanes = Columns / 4;         // threads along V
    static constexpr int kGroups = kThreads / kLanes;  // threads along K
    static constexpr int kRows = K / kGroups;  // rows per thread: group, group + kGroups, ...
    static_assert(kLanes <= 32 && 32 % kLanes == 0 && K % kGroups == 0);
};

template <int K, int Columns>
struct SharedStorage {
    float q[K], k[K], decay[K];
    alignas(16) float partial[Config<K, Columns>::kThreads / 32][Columns];  // o, one share per warp
};

struct Operands {
    Rows q, k, v, o;
    float* state;
    unsigned HV, heads_per_group;
    int K, V;
    float scale;
    bool exclusive;      // o reads the old state
    bool whole_vectors;  // every row of the state starts on 16 bytes and has whole pieces of 16
};

template <class T>
LSM_DEVICE T* row_of(Rows const& x, i64 batch, i64 head) {
    return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

template <class T, int K, int Columns>
__global__ void __launch_bounds__(Config<K, Columns>::kThreads)
    step_kernel(Operands const p, BySide<GateLoader<T>> const gates) {
    using C = Config<K, Columns>;
    auto& shared = *reinterpret_cast<SharedStorage<K, Columns>*>(dyn_smem());
    int const tid = threadIdx.x, lane = tid % C::kLanes, group = tid / C::kLanes;
    unsigned const tiles = (p.V + Columns - 1) / Columns;
    unsigned const chain = blockIdx.x / tiles;  // batch · HV + head
    int const column = static_cast<int>(blockIdx.x % tiles) * Columns + lane * 4;
    unsigned const batch = chain / p.HV, head = chain % p.HV, group_head = head / p.heads_per_group;
    float* const state = p.state + i64(chain) * p.K * p.V + column;

    // Load the state, [kRows][4] per thread; what lies outside is zero and stays out of every sum.
    float S[C::kRows][4];
    if (p.whole_vectors) {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = group + i * C::kGroups;
            bool const inside = c < p.K && column < p.V;
            float4 const x =
                inside ? load_global(reinterpret_cast<float4 const*>(state + i64(c) * p.V))
                       : float4{0.f, 0.f, 0.f, 0.f};
            S[i][0] = x.x, S[i][1] = x.y, S[i][2] = x.z, S[i][3] = x.w;
        }
    } else {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = group + i * C::kGroups;
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                bool const inside = c < p.K && column + j < p.V;
                S[i][j] = inside ? load_global(state + i64(c) * p.V + j) : 0.f;
            }
        }
    }

    // The token's query, key and decay, as floats; each thread's four values and columns' decays.
    auto decay = [&](bool inside, GateLoader<T> const& side, int channel) {
        return inside && side.g.data != nullptr
                   ? side.factor(side.load(side.at(batch, 0, head, channel)))
                   : 1.f;
    };
    T const* const q = row_of<T const>(p.q, batch, group_head);
    T const* const k = row_of<T const>(p.k, batch, group_head);
    T const* const v = row_of<T const>(p.v, batch, head) + column;
    LSM_UNROLL
    for (int i = 0; i < (K + C::kThreads - 1) / C::kThreads; ++i) {
        int const c = tid + i * C::kThreads;
        if (c >= K) break;
        bool const inside = c < p.K;
        shared.q[c] = inside ? p.scale * static_cast<float>(load_global(q + c)) : 0.f;
        shared.k[c] = inside ? static_cast<float>(load_global(k + c)) : 0.f;
        shared.decay[c] = decay(inside, gates.rows, c);
    }
    float value[4], column_decay[4];
    LSM_UNROLL
    for (int j = 0; j < 4; ++j) {
        bool const inside = column + j < p.V;
        value[j] = inside ? static_cast<float>(load_global(v + j)) : 0.f;
        column_decay[j] = decay(inside, gates.columns, column + j);
    }
    __syncthreads();

    // Decay, write, read.
    float out[4] = {0.f, 0.f, 0.f, 0.f};
    LSM_UNROLL
    for (int i = 0; i < C::kRows; ++i) {
        int const c = group + i * C::kGroups;
        float const qc = shared.q[c], kc = shared.k[c], a = shared.decay[c];
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) {
            float const old = S[i][j];
            S[i][j] = a * column_decay[j] * old + kc * value[j];
            out[j] += qc * (p.exclusive ? old : S[i][j]);
        }
    }

    // Store the state.
    if (p.whole_vectors) {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = group + i * C::kGroups;
            if (c < p.K && column < p.V) {
                store_global(reinterpret_cast<float4*>(state + i64(c) * p.V),
                             float4{S[i][0], S[i][1], S[i][2], S[i][3]});
            }
        }
    } else {
        LSM_UNROLL
        for (int i = 0; i < C::kRows; ++i) {
            int const c = group + i * C::kGroups;
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) {
                if (c < p.K && column + j < p.V) store_global(state + i64(c) * p.V + j, S[i][j]);
            }
        }
    }

    // Sum the output over K: within the warp by shuffles, then over the warps in their order.
    LSM_UNROLL
    for (int distance = C::kLanes; distance < 32; distance *= 2) {
        LSM_UNROLL
        for (int j = 0; j < 4; ++j) out[j] += __shfl_xor_sync(0xffffffffu, out[j], distance);
    }
    if (tid % 32 < C::kLanes) {
        store_shared(reinterpret_cast<float4*>(&shared.partial[tid / 32][lane * 4]),
                     float4{out[0], out[1], out[2], out[3]});
    }
    __syncthreads();
    int const own = column - lane * 4 + tid;
    if (tid < Columns && own < p.V) {
        float sum = 0.f;
        for (int w = 0; w < C::kThreads / 32; ++w) sum += shared.partial[w][tid];
        store_global(row_of<T>(p.o, batch, head) + own, static_cast<T>(sum));
    }
}

template <class T, int K, int Columns>
void run_step(StepParams const& p, void* stream) {
    Operands const operands{p.q,
                            p.k,
                            p.v,
                            p.o,
                            static_cast<float*>(p.state),
                            static_cast<unsigned>(p.HV),
                            static_cast<unsigned>(p.HV / p.H),
                            static_cast<int>(p.K),
                            static_cast<int>(p.V),
                            static_cast<float>(p.scale),
                            p.exclusive,
                            p.V % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % 16 == 0};
    i64 const blocks = p.B * p.HV * ((p.V + Columns - 1) / Columns);
    launch(step_kernel<T, K, Columns>, dim3(static_cast<unsigned>(blocks)),
           dim3(Config<K, Columns>::kThreads), sizeof(SharedStorage<K, Columns>), stream, operands,
           gate_loaders<T>(p));
}

}  // namespace lsm::step_kernel
