// What comes before the delta rules, for one instruction set (see chunk_tier.h for what the including file has chosen).
#pragma once

#include "delta_inputs_kernels.h"
#include "numbers.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// f(c, count) for the vectors of a row of D columns.
template <class T, class F>
LSM_INLINE void row_vectors(int64_t D, F const& f) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= D; c += W) f(c, int64_t(W));
    if (c < D) f(c, D - c);
}

template <class T, class In>
LSM_INLINE Vector<T> at(In const* row, int64_t c, int64_t count) {
    return read<Real<T>>(row + c, count).re;
}
template <class T, class Out>
LSM_INLINE void put(Out* row, int64_t c, int64_t count, Vector<T> x) {
    write(row + c, Real<T>{x}, count);
}

// f(row of x, of y, of grad_y, of dx) for the heads of the task's tokens, y of another type where Out says so.
template <class In, class Out, class F>
LSM_INLINE void rows_of(DeltaInputsTask const& task, F const& f) {
    DeltaInput const& of = *task.of;
    for (int64_t token = task.begin; token < task.end; ++token) {
        int64_t const b = token / of.T, t = token % of.T;
        for (int64_t h = 0; h < of.H; ++h) {
            auto const row = [&](Rows const& r, auto element) {
                using Element = decltype(element);
                return static_cast<Element*>(r.data) + b * r.batch + t * r.time + h * r.head;
            };
            f(h, row(of.x, In{}), row(of.y, Out{}), row(of.grad_y, Out{}), row(of.dx, In{}));
        }
    }
}

// |x|^2; of fp32 in fp64.
template <class T, class In>
LSM_INLINE double squares(In const* row, int64_t D) {
    if constexpr (std::is_same_v<In, float>) {
        typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
        Vector<double> sum{};
        row_vectors<T>(D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Half halves[2];
            Vector<float> const x = at<float>(row, c, count);
            std::memcpy(halves, &x, sizeof(x));
            for (Half const& half : halves) {
                Vector<double> const wide = __builtin_convertvector(half, Vector<double>);
                sum += wide * wide;
            }
        });
        return sum_lanes<double>(sum);
    } else {
        Vector<T> sum{};
        row_vectors<T>(D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Vector<T> const x = at<T>(row, c, count);
            sum += x * x;
        });
        return double(sum_lanes<T>(sum));
    }
}

// A quotient x / length as x high + x low, which rounds once.
template <class T>
struct Inverse {
    explicit Inverse(double squares_and_eps) {
        double const inverse = 1 / __builtin_sqrt(squares_and_eps);
        high = T(inverse), low = T(inverse - double(high));
    }
    T high, low;
};

template <class T, class In>
void unit_forward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    int64_t const D = task.of->D;
    rows_of<In, In>(task, [&](int64_t, In const* x, In* y, In const*, In*) {
        Inverse<T> const inverse(squares<T>(x, D) + p.eps);
        row_vectors<T>(D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Vector<T> const v = at<T>(x, c, count);
            put<T>(y, c, count, v * inverse.high + v * inverse.low);
        });
    });
}

template <class T, class In>
void unit_backward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    int64_t const D = task.of->D;
    rows_of<In, In>(task, [&](int64_t, In const* x, In const*, In const* grad, In* dx) {
        T const inverse = Inverse<T>(squares<T>(x, D) + p.eps).high;
        Vector<T> sum{};
        row_vectors<T>(D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            sum += at<T>(x, c, count) * at<T>(grad, c, count);
        });
        T const along = sum_lanes<T>(sum) * inverse * inverse;
        row_vectors<T>(D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            put<T>(dx, c, count, inverse * (at<T>(grad, c, count) - at<T>(x, c, count) * along));
        });
    });
}

template <class T, class In>
void strength_forward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    rows_of<In, T>(task, [&](int64_t, In const* x, T* y, T const*, In*) {
        row_vectors<T>(task.of->D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            put<T>(y, c, count, T(p.strength) * sigmoid(at<T>(x, c, count)));
        });
    });
}

template <class T, class In>
void strength_backward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    rows_of<In, T>(task, [&](int64_t, In const* x, T const*, T const* grad, In* dx) {
        row_vectors<T>(task.of->D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Vector<T> const v = at<T>(x, c, count);
            put<T>(dx, c, count, T(p.strength) * at<T>(grad, c, count) * sigmoid(v) * sigmoid(-v));
        });
    });
}

// What a head's decays are made with.
template <class T>
struct Decays {
    DeltaInputsParams const& p;
    T const *rates, *biases;
    int64_t D;

    Decays(DeltaInputsParams const& p, DeltaInputsTask const& task)
        : p(p),
          rates(static_cast<T const*>(task.rates)),
          biases(static_cast<T const*>(p.dt_bias)),
          D(task.of->D) {}

    LSM_INLINE Vector<T> rate(int64_t h, int64_t c, int64_t count) const {
        if (rates == nullptr) return splat<T>(1);
        return p.by_channel ? splat<T>(rates[h]) : at<T>(rates, c, count);
    }
    LSM_INLINE Vector<T> logit(Vector<T> x, int64_t h, int64_t c, int64_t count) const {
        return biases == nullptr ? x : x + at<T>(biases + h * D, c, count);
    }
};

template <class T, class In>
void decay_forward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    Decays<T> const decays(p, task);
    rows_of<In, T>(task, [&](int64_t h, In const* x, T* y, T const*, In*) {
        row_vectors<T>(decays.D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Vector<T> const z = decays.logit(at<T>(x, c, count), h, c, count);
            Vector<T> const rate = decays.rate(h, c, count);
            put<T>(y, c, count,
                   p.bounded ? T(p.lower_bound) * sigmoid(rate * z) : -rate * softplus(z));
        });
    });
}

template <class T, class In>
void decay_backward(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    Decays<T> const decays(p, task);
    T *const bias_sums = static_cast<T*>(task.sums), *const rate_sums = bias_sums + p.biases();
    for (int64_t i = 0; i < p.biases() + p.rates(); ++i) bias_sums[i] = 0;
    rows_of<In, T>(task, [&](int64_t h, In const* x, T const*, T const* grad, In* dx) {
        T* const own = bias_sums + h * decays.D;
        Vector<T> head_sum{};
        row_vectors<T>(decays.D, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
            Vector<T> const z = decays.logit(at<T>(x, c, count), h, c, count);
            Vector<T> const rate = decays.rate(h, c, count), up = at<T>(grad, c, count);
            Vector<T> dz, d_rate;  // d_rate: of log rate
            if (p.bounded) {
                Vector<T> const y = rate * z;
                Vector<T> const slope = up * T(p.lower_bound) * sigmoid(y) * sigmoid(-y);
                dz = slope * rate, d_rate = slope * y;
            } else {
                dz = -up * rate * sigmoid(z), d_rate = -up * rate * softplus(z);
            }
            put<T>(dx, c, count, dz);
            put<T>(own, c, count, at<T>(own, c, count) + dz);
            if (p.by_channel) {
                head_sum += d_rate;  // 0 in lanes beyond the row, where up is
            } else {
                put<T>(rate_sums, c, count, at<T>(rate_sums, c, count) + d_rate);
            }
        });
        if (p.by_channel) rate_sums[h] += sum_lanes<T>(head_sum);
    });
}

template <bool kBackward>
void run_delta_inputs(DeltaInputsParams const& p, DeltaInputsTask const& task) {
    with_types(task.of->dtype, [&](auto zero, auto element) {
        using T = decltype(zero);
        using In = decltype(element);
        switch (task.kind) {
            case DeltaInputsTask::unit:
                return (kBackward ? unit_backward<T, In> : unit_forward<T, In>)(p, task);
            case DeltaInputsTask::strength:
                return (kBackward ? strength_backward<T, In> : strength_forward<T, In>)(p, task);
            default:
                return (kBackward ? decay_backward<T, In> : decay_forward<T, In>)(p, task);
        }
    });
}

}  // namespace

constinit DeltaInputsKernels const delta_inputs_kernels{run_delta_inputs<false>,
                                                        run_delta_inputs<true>};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
