// The sLSTM cell: one launch walks whole sequences, a block per sequence and head.
//
// Every token multiplies the head's last output with its recurrent weights, [D] x [D, 4 D], or, in the backward, the
// gates' gradients with the transposed ones, [4 D] x [4 D, D]. All threads take part, over columns and groups of rows,
// with the weights in shared memory where they fit; then each channel's own thread does the gates, and its state never
// leaves the block. Grid: (record, head).
#include "kernels/platform.cuh"
#include "kernels/segments.cuh"
#include "params/slstm.h"

namespace lsm {
namespace slstm {

constexpr int kThreads = 256;
constexpr std::size_t kWeightBytes = 96 * 1024;  // the most that stay in shared memory

// Columns of the product, and groups of rows so that there is a thread for every sum.
struct Product {
    int rows, columns, groups;
    bool cached;

    std::size_t floats() const {
        return static_cast<std::size_t>(groups) * columns + rows +
               (cached ? static_cast<std::size_t>(rows) * columns : 0);
    }
};

inline Product plan(int rows, int columns) {
    int const groups = columns < kThreads ? kThreads / columns : 1;
    return {rows, columns, groups < rows ? groups : rows,
            static_cast<std::size_t>(rows) * columns * sizeof(float) <= kWeightBytes};
}

// vector [rows] times weights [rows, columns], as `groups` partial sums for each column.
struct Multiplier {
    Product shape;
    float *vector, *partial, *cache;
    float const* weights;

    LSM_DEVICE Multiplier(Product const& product, float const* from)
        : shape(product),
          vector(reinterpret_cast<float*>(dyn_smem())),
          partial(vector + product.rows),
          cache(partial + product.groups * product.columns),
          weights(from) {
        if (!shape.cached) return;
        for (int i = threadIdx.x; i < shape.rows * shape.columns; i += kThreads)
            cache[i] = load_global(weights + i);
    }

    // Between two barriers: `vector` is written before, `sum` read after.
    LSM_DEVICE void run() const {
        int const each = (shape.rows + shape.groups - 1) / shape.groups;
        for (int unit = threadIdx.x; unit < shape.groups * shape.columns; unit += kThreads) {
            int const column = unit % shape.columns, group = unit / shape.columns;
            int const first = group * each,
                      end = first + each < shape.rows ? first + each : shape.rows;
            float sum = 0.f;
            if (shape.cached) {
                for (int k = first; k < end; ++k)
                    sum += vector[k] * cache[k * shape.columns + column];
            } else {
                for (int k = first; k < end; ++k)
                    sum += vector[k] *
                           load_global(weights + static_cast<i64>(k) * shape.columns + column);
            }
            partial[unit] = sum;
        }
    }

    LSM_DEVICE float sum(int column) const {
        float total = partial[column];
        for (int g = 1; g < shape.groups; ++g) total += partial[g * shape.columns + column];
        return total;
    }
};

struct State {
    float h, c, n, m;
};

LSM_DEVICE float logistic(float x) {
    return 1.f / (1.f + expf(-x));
}

LSM_DEVICE float log_sigmoid(float x) {
    return fminf(x, 0.f) - log1pf(expf(-fabsf(x)));
}

// What a channel makes of a token's pre-activations and of the state before it.
struct Cell {
    float write, keep, z, open;
    State after;
    bool by_input;  // m is i

    LSM_DEVICE Cell(float const (&raw)[4], State const& before) {
        float const carried = before.n == 0.f ? -INFINITY : log_sigmoid(raw[1]) + before.m;
        by_input = !(carried > raw[0]);
        after.m = by_input ? raw[0] : carried;
        write = expf(raw[0] - after.m), keep = expf(carried - after.m);
        z = tanhf(raw[2]), open = logistic(raw[3]);
        after.c = keep * before.c + write * z;
        after.n = keep * before.n + write;
        after.h = open * after.c / after.n;
    }
};

// Rows [4, H, D] of one token or sequence.
LSM_DEVICE State load_state(void const* from, i64 at, i64 stride) {
    float const* const p = static_cast<float const*>(from) + at;
    return {load_global(p), load_global(p + stride), load_global(p + 2 * stride),
            load_global(p + 3 * stride)};
}

LSM_DEVICE void store_state(void* to, i64 at, i64 stride, State const& s) {
    float* const p = static_cast<float*>(to) + at;
    store_global(p, s.h), store_global(p + stride, s.c);
    store_global(p + 2 * stride, s.n), store_global(p + 3 * stride, s.m);
}

// A sequence's channels: a thread has at most kChannels of them, kThreads apart.
constexpr int kChannels = 4;

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(SlstmParams const p, Segments const segments, Product const product) {
    i64 const head = blockIdx.x % static_cast<unsigned>(p.H);
    Segment const segment = segments[blockIdx.x / static_cast<unsigned>(p.H)];
    if (segment.unused()) return;
    int const D = static_cast<int>(p.D), tid = threadIdx.x;
    i64 const HD = p.H * p.D;
    i64 const owner = (static_cast<i64>(segment.sequence) * 4 * p.H + head) * D;
    Multiplier const multiplier(product, static_cast<float const*>(p.R) + head * p.D * 4 * p.D);
    State state[kChannels] = {};
    LSM_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        int const e = tid + i * kThreads;
        if (e >= D) continue;
        if (segment.poison) {
            state[i] = {nan_value(), nan_value(), nan_value(), nan_value()};
        } else if (p.initial_state != nullptr) {
            state[i] = load_state(p.initial_state, owner + e, HD);
        }
        multiplier.vector[e] = state[i].h;
    }
    __syncthreads();
    for (i64 t = segment.t0; t < segment.t1; ++t) {
        i64 const token = segment.batch * p.T + t;
        multiplier.run();
        __syncthreads();
        LSM_UNROLL
        for (int i = 0; i < kChannels; ++i) {
            int const e = tid + i * kThreads;
            if (e >= D) continue;
            T const* const x = static_cast<T const*>(p.x) + (token * 4 * p.H + head) * D + e;
            float raw[4];
            LSM_UNROLL
            for (int g = 0; g < 4; ++g)
                raw[g] = static_cast<float>(load_global(x + g * HD)) + multiplier.sum(g * D + e);
            state[i] = Cell(raw, state[i]).after;
            multiplier.vector[e] = state[i].h;
            store_global(static_cast<T*>(p.y) + (token * p.H + head) * D + e,
                         static_cast<T>(state[i].h));
            if (p.cells != nullptr)
                store_state(p.cells, (token * 4 * p.H + head) * D + e, HD, state[i]);
        }
        __syncthreads();
    }
    if (p.final_state == nullptr || segment.sequence < 0) return;
    LSM_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        int const e = tid + i * kThreads;
        if (segment.poison) state[i].m = nan_value();
        if (e < D) store_state(p.final_state, owner + e, HD, state[i]);
    }
}

// Gradients of h, c, n, and of the way the stabiliser m came about: outputs do not depend on it, but a final c and n
// are multiples of e^-m, as the initial ones are.
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(SlstmParams const p, Segments const segments, Product const product) {
    i64 const head = blockIdx.x % static_cast<unsigned>(p.H);
    Segment const segment = segments[blockIdx.x / static_cast<unsigned>(p.H)];
    if (segment.unused()) return;
    int const D = static_cast<int>(p.D), tid = threadIdx.x;
    i64 const HD = p.H * p.D;
    i64 const owner = (static_cast<i64>(segment.sequence) * 4 * p.H + head) * D;
    Multiplier const multiplier(product,
                                static_cast<float const*>(p.R_transposed) + head * p.D * 4 * p.D);
    // The state after a token, or the initial one.
    auto const state_after = [&](i64 t, int e) -> State {
        if (t >= segment.t0)
            return load_state(p.states, ((segment.batch * p.T + t) * 4 * p.H + head) * D + e, HD);
        if (p.initial_state == nullptr || segment.sequence < 0) return {};
        return load_state(p.initial_state, owner + e, HD);
    };
    State grad[kChannels] = {};
    float way[kChannels] = {};
    LSM_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        int const e = tid + i * kThreads;
        if (e >= D) continue;
        if (segment.poison) {
            grad[i] = {nan_value(), nan_value(), nan_value(), nan_value()};
        } else if (p.grad_final_state != nullptr) {
            grad[i] = load_state(p.grad_final_state, owner + e, HD);
        }
        State const last = state_after(segment.t1 - 1, e);
        way[i] = grad[i].m - grad[i].c * last.c - grad[i].n * last.n;
    }
    __syncthreads();
    for (i64 t = segment.t1 - 1; t >= segment.t0; --t) {
        i64 const token = segment.batch * p.T + t;
        LSM_UNROLL
        for (int i = 0; i < kChannels; ++i) {
            int const e = tid + i * kThreads;
            if (e >= D) continue;
            i64 const at = (token * 4 * p.H + head) * D + e;
            float raw[4];
            LSM_UNROLL
            for (int g = 0; g < 4; ++g)
                raw[g] = load_global(static_cast<float const*>(p.raw) + at + g * HD);
            State const before = state_after(t - 1, e);
            Cell const cell(raw, before);
            float const dh = grad[i].h + load_global(static_cast<float const*>(p.grad_y) +
                                                     (token * p.H + head) * D + e);
            float const ratio = cell.after.c / cell.after.n;
            float const dratio = dh * cell.open / cell.after.n;
            float const dc = grad[i].c + dratio, dn = grad[i].n - dratio * ratio;
            float const through = cell.by_input ? 0.f : way[i];
            float const dlog = cell.keep * (dc * before.c + dn * before.n) + through;
            float const draw[4] = {cell.write * (dc * cell.z + dn) + (way[i] - through),
                                   dlog * logistic(-raw[1]),
                                   dc * cell.write * (1.f - cell.z * cell.z),
                                   dh * ratio * cell.open * (1.f - cell.open)};
            LSM_UNROLL
            for (int g = 0; g < 4; ++g) {
                store_global(static_cast<float*>(p.draw) + at + g * HD, draw[g]);
                multiplier.vector[g * D + e] = draw[g];
            }
            grad[i].c = dc * cell.keep, grad[i].n = dn * cell.keep, way[i] = through;
        }
        __syncthreads();
        multiplier.run();
        __syncthreads();
        LSM_UNROLL
        for (int i = 0; i < kChannels; ++i) {
            int const e = tid + i * kThreads;
            if (e < D) grad[i].h = multiplier.sum(e);
        }
    }
    if (p.grad_initial_state == nullptr || segment.sequence < 0) return;
    LSM_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        int const e = tid + i * kThreads;
        if (e >= D) continue;
        State const first = state_after(segment.t0 - 1, e);
        grad[i].m = way[i] + grad[i].c * first.c + grad[i].n * first.n;
        store_state(p.grad_initial_state, owner + e, HD, grad[i]);
    }
}

template <class Kernel>
void run(Kernel kernel, SlstmParams const& p, int rows, int columns, void* workspace,
         void* stream) {
    Segments const segments = plan_segments(p, p.T, workspace);
    Product const product = plan(rows, columns);
    if (segments.count == 0) return;
    build_segments(p, segments, stream);
    launch(kernel, dim3(static_cast<unsigned>(segments.count * p.H)), dim3(kThreads),
           product.floats() * sizeof(float), stream, p, segments, product);
}

}  // namespace slstm

int64_t slstm_workspace(SlstmParams const& p) {
    return segments_bytes(p, p.T);
}

void slstm_fwd(SlstmParams const& p, void* workspace, void* stream) {
    int const D = static_cast<int>(p.D);
    switch (p.dtype) {
        case Dtype::bf16:
            return slstm::run(slstm::forward_kernel<bf16>, p, D, 4 * D, workspace, stream);
        case Dtype::f16:
            return slstm::run(slstm::forward_kernel<half>, p, D, 4 * D, workspace, stream);
        default:
            return slstm::run(slstm::forward_kernel<float>, p, D, 4 * D, workspace, stream);
    }
}

void slstm_bwd(SlstmParams const& p, void* workspace, void* stream) {
    int const D = static_cast<int>(p.D);
    slstm::run(slstm::backward_kernel, p, 4 * D, D, workspace, stream);
}

}  // namespace lsm
