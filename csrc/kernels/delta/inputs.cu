// What comes before the delta rules in one launch, one pass over memory: unit rows, log decays, strengths. A warp has
// rows of one argument. Of decays it has the tokens of a chunk in one head, so that a bias is read once and its gradient
// summed in registers; the backward's second launch adds the chunks up in their order.
#include "kernels/warp.cuh"
#include "params/delta_inputs.h"

namespace lsm {
namespace delta_inputs {

constexpr int kWarps = 8, kColumns = 8;  // columns of a lane at a time: 256 of a row
constexpr int kHeads = 4;                // rows of a token that a warp loads together
constexpr int kChunk = 32;               // tokens of a chunk of decays

constexpr int kBlock = 32 * kColumns;

enum Part { kQ, kK, kBeta, kG, kParts };

struct Grid {
    DeltaInputsParams p;
    i64 blocks[kParts];     // of the launch, one part's after another's
    float* sums = nullptr;  // [chunks, biases + rates], backward
};

i64 ceil_div(i64 a, i64 b) {
    return (a + b - 1) / b;
}

// Units of a part, one per warp: four rows of a token, or a chunk of decays in a head.
i64 row_units(DeltaInput const& x) {
    return x.tokens() * ceil_div(x.H, kHeads);
}
i64 chunks(DeltaInputsParams const& p) {
    return ceil_div(p.g.tokens(), kChunk);
}

template <class F>
LSM_DEVICE void with_element(Dtype dtype, F const& f) {
    if (dtype == Dtype::bf16) {
        f(bf16{});
    } else if (dtype == Dtype::f16) {
        f(half{});
    } else {
        f(0.f);
    }
}

// A row's columns c = first + lane + 32 i.
template <class F>
LSM_DEVICE void columns(int first, int D, F const& f) {
    int const lane = threadIdx.x % 32;
    LSM_UNROLL
    for (int i = 0; i < kColumns; ++i) {
        int const c = first + lane + 32 * i;
        if (c < D) f(i, c);
    }
}

template <class T>
LSM_DEVICE float number(void const* data, i64 at) {
    return static_cast<float>(load_global(static_cast<T const*>(data) + at));
}

LSM_DEVICE float sigmoid(float x) {
    return 1.f / (1.f + expf(-x));
}
LSM_DEVICE float softplus(float x) {
    return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x)));
}

// Rows of unit length, or strengths; kBackward: their gradients.
template <class T, bool kUnit, bool kBackward>
LSM_DEVICE void rows(DeltaInputsParams const& p, DeltaInput const& of, i64 unit) {
    using Wide = std::conditional_t<sizeof(T) == 4, double, float>;
    using Y = std::conditional_t<kUnit, T, float>;
    int const D = static_cast<int>(of.D);
    i64 const groups = (of.H + kHeads - 1) / kHeads, token = unit / groups;
    i64 const b = token / of.T, t = token % of.T, h0 = unit % groups * kHeads;
    auto const at = [&](Rows const& r, int j) {
        return b * r.batch + t * r.time + (h0 + j) * r.head;
    };
    float x[kHeads][kColumns], grad[kHeads][kColumns];
    auto const load = [&](int first) {
        LSM_UNROLL
        for (int j = 0; j < kHeads; ++j) {
            LSM_UNROLL
            for (int i = 0; i < kColumns; ++i) x[j][i] = grad[j][i] = 0.f;
            if (h0 + j >= of.H) continue;
            columns(first, D, [&](int i, int c) {
                x[j][i] = number<T>(of.x.data, at(of.x, j) + c);
                if constexpr (kBackward)
                    grad[j][i] = number<Y>(of.grad_y.data, at(of.grad_y, j) + c);
            });
        }
    };
    Wide inverse[kHeads];
    float along[kHeads];  // of grad, what changes the length, over it
    if constexpr (kUnit) {
        Wide squares[kHeads] = {};
        float products[kHeads] = {};
        for (int first = 0; first < D; first += kBlock) {
            load(first);
            LSM_UNROLL
            for (int j = 0; j < kHeads; ++j) {
                LSM_UNROLL
                for (int i = 0; i < kColumns; ++i) {
                    squares[j] += Wide(x[j][i]) * Wide(x[j][i]);
                    products[j] += x[j][i] * grad[j][i];
                }
            }
        }
        LSM_UNROLL
        for (int j = 0; j < kHeads; ++j) {
            inverse[j] = Wide(1) / sqrt(warp_sum(squares[j]) + Wide(p.eps));
            if constexpr (kBackward)
                along[j] = warp_sum(products[j]) * static_cast<float>(inverse[j] * inverse[j]);
        }
    }
    for (int first = 0; first < D; first += kBlock) {
        if (!kUnit || D > kBlock) load(first);
        LSM_UNROLL
        for (int j = 0; j < kHeads; ++j) {
            if (h0 + j >= of.H) continue;
            columns(first, D, [&](int i, int c) {
                float const own = x[j][i], strength = static_cast<float>(p.strength);
                if constexpr (kBackward) {
                    float dx = grad[j][i] * strength;
                    if constexpr (kUnit) {
                        dx = static_cast<float>(inverse[j]) * (grad[j][i] - own * along[j]);
                    } else {
                        dx *= sigmoid(own) * sigmoid(-own);
                    }
                    store_global(static_cast<T*>(of.dx.data) + at(of.dx, j) + c,
                                 static_cast<T>(dx));
                } else {
                    float y = strength * sigmoid(own);
                    if constexpr (kUnit) y = static_cast<float>(Wide(own) * inverse[j]);
                    store_global(static_cast<Y*>(of.y.data) + at(of.y, j) + c, static_cast<Y>(y));
                }
            });
        }
    }
}

// A head's decays of a chunk of tokens.
template <class T, bool kBackward>
LSM_DEVICE void decays(Grid const& grid, i64 unit) {
    DeltaInputsParams const& p = grid.p;
    DeltaInput const& g = p.g;
    int const D = static_cast<int>(g.D), lane = threadIdx.x % 32;
    i64 const chunk = unit / g.H, h = unit % g.H;
    i64 const begin = chunk * kChunk, last = begin + kChunk;
    i64 const end = last < g.tokens() ? last : g.tokens();
    float const bound = static_cast<float>(p.lower_bound);
    float* const sums = kBackward ? grid.sums + chunk * (p.biases() + p.rates()) : nullptr;
    float head_sum = 0.f;
    for (int first = 0; first < D; first += kBlock) {
        float rate[kColumns], bias[kColumns], rate_sum[kColumns] = {}, bias_sum[kColumns] = {};
        columns(first, D, [&](int i, int c) {
            rate[i] = p.A_log == nullptr ? 1.f : expf(number<float>(p.A_log, p.by_channel ? h : c));
            bias[i] = p.dt_bias == nullptr ? 0.f : number<float>(p.dt_bias, h * D + c);
        });
        LSM_UNROLL_BY(2)
        for (i64 t = begin; t < end; ++t) {
            columns(first, D, [&](int i, int c) {
                i64 const at = t * g.x.time + h * g.x.head + c;  // all of them alike
                float const z = number<T>(g.x.data, at) + bias[i];
                if constexpr (kBackward) {
                    float const up = load_global(static_cast<float const*>(g.grad_y.data) + at);
                    float dz, d_rate;  // d_rate: of log rate
                    if (p.bounded) {
                        float const y = rate[i] * z;
                        float const slope = up * bound * sigmoid(y) * sigmoid(-y);
                        dz = slope * rate[i], d_rate = slope * y;
                    } else {
                        dz = -up * rate[i] * sigmoid(z), d_rate = -up * rate[i] * softplus(z);
                    }
                    bias_sum[i] += dz, rate_sum[i] += d_rate;
                    store_global(static_cast<T*>(g.dx.data) + at, static_cast<T>(dz));
                } else {
                    float const y =
                        p.bounded ? bound * sigmoid(rate[i] * z) : -rate[i] * softplus(z);
                    store_global(static_cast<float*>(g.y.data) + at, y);
                }
            });
        }
        if constexpr (kBackward) {
            columns(first, D, [&](int i, int c) {
                store_global(sums + h * D + c, bias_sum[i]);
                if (!p.by_channel) store_global(sums + p.biases() + c, rate_sum[i]);
                head_sum += rate_sum[i];
            });
        }
    }
    if constexpr (kBackward) {
        head_sum = warp_sum(head_sum);
        if (p.by_channel && lane == 0) store_global(sums + p.biases() + h, head_sum);
    }
}

template <bool kBackward>
__global__ void __launch_bounds__(kWarps * 32) pass_kernel(Grid const grid) {
    DeltaInputsParams const& p = grid.p;
    i64 block = blockIdx.x;
    int part = kQ;
    LSM_UNROLL
    for (int i = 0; i + 1 < kParts; ++i) {
        if (part == i && block >= grid.blocks[i]) block -= grid.blocks[i], ++part;
    }
    i64 const unit = block * kWarps + threadIdx.x / 32;
    if (part == kG) {
        if (unit < (p.g.tokens() + kChunk - 1) / kChunk * p.g.H)
            with_element(p.g.dtype, [&](auto x) { decays<decltype(x), kBackward>(grid, unit); });
        return;
    }
    DeltaInput const of = part == kQ ? p.q : part == kK ? p.k : p.beta;
    if (unit >= of.tokens() * ((of.H + kHeads - 1) / kHeads)) return;
    with_element(of.dtype, [&](auto x) {
        using T = decltype(x);
        if (part == kBeta) {
            rows<T, false, kBackward>(p, of, unit);
        } else {
            rows<T, true, kBackward>(p, of, unit);
        }
    });
}

// Columns of all chunks' sums: warps take every kWarps-th, and warp 0 adds up the warps.
__global__ void __launch_bounds__(kWarps * 32) sum_kernel(Grid const grid, i64 count) {
    DeltaInputsParams const& p = grid.p;
    float* const shared = reinterpret_cast<float*>(dyn_smem());
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 const width = p.biases() + p.rates(), c = static_cast<i64>(blockIdx.x) * 32 + lane;
    float sum = 0.f;
    for (i64 i = warp; c < width && i < count; i += kWarps)
        sum += load_global(grid.sums + i * width + c);
    store_shared(shared + threadIdx.x, sum);
    __syncthreads();
    if (warp != 0 || c >= width) return;
    LSM_UNROLL
    for (int i = 1; i < kWarps; ++i) sum += load_shared(shared + 32 * i + lane);
    void* const to = c < p.biases() ? p.ddt_bias : p.dA_log;
    if (to != nullptr)
        store_global(static_cast<float*>(to) + (c < p.biases() ? c : c - p.biases()), sum);
}

template <bool kBackward>
void run(DeltaInputsParams const& p, void* sums, void* stream) {
    Grid grid{p, {}, static_cast<float*>(sums)};
    i64 const units[kParts] = {row_units(p.q), row_units(p.k), row_units(p.beta),
                               chunks(p) * p.g.H};
    i64 blocks = 0;
    for (int i = 0; i < kParts; ++i) blocks += grid.blocks[i] = ceil_div(units[i], kWarps);
    if (blocks > 0)
        launch(pass_kernel<kBackward>, dim3(static_cast<unsigned>(blocks)), dim3(kWarps * 32), 0,
               stream, grid);
    if (kBackward && (p.dA_log != nullptr || p.ddt_bias != nullptr)) {
        i64 const width = p.biases() + p.rates();
        launch(sum_kernel, dim3(static_cast<unsigned>(ceil_div(width, 32))), dim3(kWarps * 32),
               kWarps * 32 * sizeof(float), stream, grid, chunks(p));
    }
}

}  // namespace delta_inputs

int64_t delta_inputs_bwd_workspace(DeltaInputsParams const& p) {
    return delta_inputs::chunks(p) * (p.biases() + p.rates()) * static_cast<i64>(sizeof(float));
}

void delta_inputs_fwd(DeltaInputsParams const& p, void* stream) {
    delta_inputs::run<false>(p, nullptr, stream);
}

void delta_inputs_bwd(DeltaInputsParams const& p, void* workspace, void* stream) {
    delta_inputs::run<true>(p, workspace, stream);
}

}  // namespace lsm
