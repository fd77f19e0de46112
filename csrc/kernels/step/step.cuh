// One token of decoding: S = decay(S) + k v^T, o = scale · S^T q, of the new state or of the old one,
// with S fp32 updated in place, [B, HV, K, V] or [B, HV, V, K].
//
// The state is read once and written once and everything else is noise, so a thread first issues
// all its loads of the state, in 16-byte pieces, and only then touches q, k, v and the gate. The
// arithmetic is free beside the state's traffic: every element is decayed by its row and by its
// column, whose gates may be absent, and by its head.
//
// A block owns some value channels of one head's state and all its key channels. Where keys are the
// rows, Lanes threads side by side take its columns and the others share the rows, so an output is
// summed over the threads of a column; where values are the rows, lanes take all columns and an
// output is summed over the lanes of a row. Few channels make enough blocks of few heads.
#pragma once

#include "kernels/platform.cuh"
#include "kernels/policy/decay.cuh"
#include "params/chunk.h"
#include "policy/input_gate.h"
#include "policy/step_size.h"

namespace lsm::step_kernel {

constexpr int kThreads = 128;

// K: smallest supported number of key channels that holds the actual one; V: value channels of a
// block.
template <int K_, int V_, bool kValuesFirst_>
struct StepTile {
    static constexpr int K = K_, V = V_;
    static constexpr bool kValuesFirst = kValuesFirst_;
    static constexpr int kTileRows = kValuesFirst ? V : K, kTileColumns = kValuesFirst ? K : V;
    static constexpr int kLanes = kTileColumns / 4 < 32 ? kTileColumns / 4 : 32;
    static constexpr int kPieces = kTileColumns / (4 * kLanes);  // of four columns, per thread
    static constexpr int kColumns = 4 * kPieces;                 // per thread
    static constexpr int kGroups = kThreads / kLanes;            // threads along rows
    static constexpr int kRows = kTileRows / kGroups;  // per thread: group, group + kGroups, ...
    static_assert(32 % kLanes == 0 && kTileRows % kGroups == 0);

    // The i-th row and the j-th column of a thread, within the tile.
    LSM_DEVICE static int row(int i) {
        return static_cast<int>(threadIdx.x) / kLanes + i * kGroups;
    }
    LSM_DEVICE static int column(int j) {
        return j / 4 * 4 * kLanes + static_cast<int>(threadIdx.x) % kLanes * 4 + j % 4;
    }
};

// What a token brings to the channels of a side, keys or values.
template <int n>
struct Token {
    float write[n], read[n], decay[n];
    float bonus[n];  // of keys: how much of its own write the query reads before it is there
};

template <class Tile>
struct SharedStorage {
    Token<Tile::kTileRows> rows;
    alignas(16) float partial[kThreads / 32][Tile::V];  // o with keys in rows, one share per warp
};

// Decay of a head's state, weight of what is written to it, and what outputs are multiplied with.
struct alignas(16) HeadFactors {
    float decay, weight, inverse, unused;
};

// StepSizes, as floats.
template <class T>
struct SizeLoaders {
    GateLoader<T> dt, A, bias;
    bool softplus;

    LSM_DEVICE HeadFactors factors(i64 batch, i64 head) const {
        float const x = number(dt, batch, head) + number(bias, batch, head);
        StepSize<float> const size = step_size(x, number(A, batch, head), softplus);
        return {size.decay, size.weight, 1.f, 0.f};
    }

  private:
    LSM_DEVICE static float number(GateLoader<T> const& x, i64 batch, i64 head) {
        return x.value(x.load(x.at(batch, 0, head, 0)));
    }
};

// Finish, as floats.
template <class T>
struct FinishLoaders {
    GateLoader<T> skip, z;

    LSM_DEVICE float finished(float o, T const* v, i64 batch, i64 head, int channel) const {
        if (skip.g.data != nullptr) {
            o += skip.value(skip.load(skip.at(batch, 0, head, channel))) *
                 static_cast<float>(load_global(v + channel));
        }
        if (z.g.data == nullptr) return o;
        float const x = z.value(z.load(z.at(batch, 0, head, channel)));
        return o * (x / (1.f + expf(-x)));
    }
};

struct Operands {
    Rows q, k, v, o;
    float* state;
    HeadFactors const* factors;  // [B HV], or null: all 1
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

// f(i, j, element) for the first columns of a thread's pieces, or for all its elements.
template <class Tile, class F>
LSM_DEVICE void each(bool pieces, F const& f) {
    LSM_UNROLL
    for (int i = 0; i < Tile::kRows; ++i) {
        LSM_UNROLL
        for (int j = 0; j < Tile::kColumns; ++j) {
            if (!pieces || j % 4 == 0) f(i, j);
        }
    }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads)
    step_kernel(Operands const p, BySide<GateLoader<T>> const gates, GateLoader<T> const bonus,
                SizeLoaders<T> const sizes, FinishLoaders<T> const finish) {
    constexpr bool kValuesFirst = Tile::kValuesFirst;
    auto& shared = *reinterpret_cast<SharedStorage<Tile>*>(dyn_smem());
    int const tid = threadIdx.x;
    unsigned const tiles = (p.V + Tile::V - 1) / Tile::V;
    unsigned const chain = blockIdx.x / tiles;  // batch · HV + head
    int const first_value = static_cast<int>(blockIdx.x % tiles) * Tile::V;
    unsigned const batch = chain / p.HV, head = chain % p.HV, group_head = head / p.heads_per_group;
    // The state's rows and columns; where the tile begins among them.
    int const rows = kValuesFirst ? p.V : p.K, columns = kValuesFirst ? p.K : p.V;
    int const first_row = kValuesFirst ? first_value : 0;
    int const first_column = kValuesFirst ? 0 : first_value;
    auto const inside = [&](int i, int j) {
        return first_row + Tile::row(i) < rows && first_column + Tile::column(j) < columns;
    };
    float* const state = p.state + i64(chain) * p.K * p.V;
    auto const at = [&](int i, int j) {
        return state + i64(first_row + Tile::row(i)) * columns + first_column + Tile::column(j);
    };

    // Load the state; what lies outside is zero and stays out of every sum.
    float S[Tile::kRows][Tile::kColumns];
    if (p.whole_vectors) {
        each<Tile>(true, [&](int i, int j) {
            float4 const x = inside(i, j) ? load_global(reinterpret_cast<float4 const*>(at(i, j)))
                                          : float4{0.f, 0.f, 0.f, 0.f};
            S[i][j] = x.x, S[i][j + 1] = x.y, S[i][j + 2] = x.z, S[i][j + 3] = x.w;
        });
    } else {
        each<Tile>(false,
                   [&](int i, int j) { S[i][j] = inside(i, j) ? load_global(at(i, j)) : 0.f; });
    }

    // The token's query, key, value and decays, as floats: those of rows in shared memory, those of
    // a thread's columns in its registers.
    HeadFactors factors{1.f, 1.f, 1.f, 0.f};
    if (p.factors != nullptr) factors = load_global(p.factors + chain);
    if (sizes.dt.g.data != nullptr) factors = sizes.factors(batch, head);
    auto const decay = [&](GateLoader<T> const& side, int channel) {
        return side.g.data != nullptr ? side.factor(side.load(side.at(batch, 0, head, channel)))
                                      : 1.f;
    };
    T const* const q = row_of<T const>(p.q, batch, group_head);
    T const* const k = row_of<T const>(p.k, batch, group_head);
    T const* const v = row_of<T const>(p.v, batch, head);
    auto const of_key = [&](auto& token, int i, int channel) {
        bool const there = channel < p.K;
        token.read[i] = there ? p.scale * static_cast<float>(load_global(q + channel)) : 0.f;
        token.write[i] = there ? static_cast<float>(load_global(k + channel)) : 0.f;
        token.decay[i] = there ? factors.decay * decay(gates.rows, channel) : 1.f;
        token.bonus[i] =
            there && bonus.g.data != nullptr
                ? token.write[i] * bonus.value(bonus.load(bonus.at(batch, 0, head, channel)))
                : 0.f;
    };
    auto const of_value = [&](auto& token, int i, int channel) {
        bool const there = channel < p.V;
        token.write[i] =
            there ? factors.weight * static_cast<float>(load_global(v + channel)) : 0.f;
        token.decay[i] = there ? decay(gates.columns, channel) : 1.f;
    };
    LSM_UNROLL
    for (int i = 0; i < (Tile::kTileRows + kThreads - 1) / kThreads; ++i) {
        int const c = tid + i * kThreads;
        if (c >= Tile::kTileRows) break;
        if constexpr (kValuesFirst) {
            of_value(shared.rows, c, first_row + c);
        } else {
            of_key(shared.rows, c, c);
        }
    }
    Token<Tile::kColumns> own;
    LSM_UNROLL
    for (int j = 0; j < Tile::kColumns; ++j) {
        if constexpr (kValuesFirst) {
            of_key(own, j, Tile::column(j));
        } else {
            of_value(own, j, first_column + Tile::column(j));
        }
    }
    __syncthreads();

    // Decay, write, read.
    float out[kValuesFirst ? Tile::kRows : Tile::kColumns] = {};
    each<Tile>(false, [&](int i, int j) {
        int const c = Tile::row(i);
        float const old = S[i][j], row = shared.rows.write[c], column = own.write[j];
        S[i][j] = shared.rows.decay[c] * own.decay[j] * old + row * column;
        if constexpr (kValuesFirst) {
            out[i] += own.read[j] * (p.exclusive ? old + own.bonus[j] * row : S[i][j]);
        } else {
            out[j] +=
                shared.rows.read[c] * (p.exclusive ? old + shared.rows.bonus[c] * column : S[i][j]);
        }
    });

    // Store the state.
    if (p.whole_vectors) {
        each<Tile>(true, [&](int i, int j) {
            if (inside(i, j)) {
                store_global(reinterpret_cast<float4*>(at(i, j)),
                             float4{S[i][j], S[i][j + 1], S[i][j + 2], S[i][j + 3]});
            }
        });
    } else {
        each<Tile>(false, [&](int i, int j) {
            if (inside(i, j)) store_global(at(i, j), S[i][j]);
        });
    }

    // Sum the output: over the lanes of a row, or over the rows, within the warp by shuffles and
    // then over the warps in their order.
    T* const o = row_of<T>(p.o, batch, head);
    auto const write = [&](int channel, float sum) {
        float const x = finish.finished(factors.inverse * sum, v, batch, head, channel);
        store_global(o + channel, static_cast<T>(x));
    };
    if constexpr (kValuesFirst) {
        static_assert(Tile::kRows <= Tile::kLanes);  // lane i writes what row i has
        float own_sum = 0.f;
        int channel = p.V;
        LSM_UNROLL
        for (int i = 0; i < Tile::kRows; ++i) {
            LSM_UNROLL
            for (int distance = 1; distance < Tile::kLanes; distance *= 2)
                out[i] += __shfl_xor_sync(0xffffffffu, out[i], distance);
            if (tid % Tile::kLanes == i) own_sum = out[i], channel = first_row + Tile::row(i);
        }
        if (channel < p.V) write(channel, own_sum);
    } else {
        LSM_UNROLL
        for (int distance = Tile::kLanes; distance < 32; distance *= 2) {
            LSM_UNROLL
            for (int j = 0; j < 4; ++j) out[j] += __shfl_xor_sync(0xffffffffu, out[j], distance);
        }
        if (tid % 32 < Tile::kLanes) {
            store_shared(reinterpret_cast<float4*>(&shared.partial[tid / 32][Tile::column(0)]),
                         float4{out[0], out[1], out[2], out[3]});
        }
        __syncthreads();
        if (tid < Tile::V && first_column + tid < p.V) {
            float sum = 0.f;
            for (int w = 0; w < kThreads / 32; ++w) sum += shared.partial[w][tid];
            write(first_column + tid, sum);
        }
    }
}

// mLSTM's part before the step, since every block of a head needs the sums that one may change: a
// warp takes a head's normaliser and stabiliser past the token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normaliser_kernel(StepParams const p, GateLoader<T> const i_gate, GateLoader<T> const f_gate,
                      HeadFactors* const factors) {
    i64 const chain = i64(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (chain >= p.B * p.HV) return;
    int const lane = threadIdx.x % 32;
    i64 const batch = chain / p.HV, head = chain % p.HV, group_head = head / (p.HV / p.H);
    Normaliser const& own = p.normaliser;
    float* const m = static_cast<float*>(own.m) + chain;
    auto const value = [&](GateLoader<T> const& g) {
        return double(g.value(g.load(g.at(batch, 0, head, 0))));
    };
    InputGate const gate =
        input_gate(value(i_gate), value(f_gate), load_global(m), own.exponential);
    __syncwarp();
    float const decay = static_cast<float>(gate.decay), weight = static_cast<float>(gate.weight);
    T const* const q = row_of<T const>(p.q, batch, group_head);
    T const* const k = row_of<T const>(p.k, batch, group_head);
    float* const n = static_cast<float*>(own.n) + chain * p.K;
    float sum = 0.f;
    for (int c = lane; c < p.K; c += 32) {
        float const now =
            decay * load_global(n + c) + weight * static_cast<float>(load_global(k + c));
        store_global(n + c, now);
        sum += static_cast<float>(p.scale) * static_cast<float>(load_global(q + c)) * now;
    }
    LSM_UNROLL
    for (int distance = 1; distance < 32; distance *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane != 0) return;
    double const size = fabs(double(sum));
    double const divisor = (size < gate.least ? gate.least : size) + own.eps;
    store_global(m, static_cast<float>(gate.m));
    store_global(
        factors + chain,
        HeadFactors{decay, weight, own.divides ? static_cast<float>(1 / divisor) : 1.f, 0.f});
}

inline i64 workspace_bytes(StepParams const& p) {
    return p.normaliser.on ? p.B * p.HV * i64(sizeof(HeadFactors)) : 0;
}

template <class T>
void run_normaliser(StepParams const& p, HeadFactors* factors, void* stream) {
    auto const loader = [&](Rows const& g) {
        return GateLoader<T>{g, 0, p.normaliser.dtype == Dtype::f32, p.gate};
    };
    unsigned const blocks =
        static_cast<unsigned>((p.B * p.HV + kThreads / 32 - 1) / (kThreads / 32));
    launch(normaliser_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, p, loader(p.normaliser.i),
           loader(p.normaliser.f), factors);
}

template <class T, int K, int V, bool kValuesFirst>
void run_step(StepParams const& p, HeadFactors const* factors, void* stream) {
    using Tile = StepTile<K, V, kValuesFirst>;
    i64 const row = p.values_first ? p.K : p.V;
    Operands const operands{p.q,
                            p.k,
                            p.v,
                            p.o,
                            static_cast<float*>(p.state),
                            factors,
                            static_cast<unsigned>(p.HV),
                            static_cast<unsigned>(p.HV / p.H),
                            static_cast<int>(p.K),
                            static_cast<int>(p.V),
                            static_cast<float>(p.scale),
                            p.exclusive,
                            row % 4 == 0 && reinterpret_cast<uintptr_t>(p.state) % 16 == 0};
    auto const loader = [&](TypedRows const& x, bool channels) {
        return GateLoader<T>{x, channels ? 1 : 0, x.dtype == Dtype::f32, 0};
    };
    SizeLoaders<T> const sizes{loader(p.sizes.dt, false), loader(p.sizes.A, false),
                               loader(p.sizes.bias, false), p.sizes.softplus};
    FinishLoaders<T> const finish{loader(p.finish.skip, p.finish.skip_channels),
                                  loader({p.finish.z, p.dtype}, true)};
    i64 const blocks = p.B * p.HV * ((p.V + V - 1) / V);
    launch(step_kernel<T, Tile>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
           sizeof(SharedStorage<Tile>), stream, operands, gate_loaders<T>(p), loader(p.u, true),
           sizes, finish);
}

}  // namespace lsm::step_kernel
