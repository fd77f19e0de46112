// The sLSTM cell for one instruction set (see chunk_tier.h for what the including file has chosen): a product with the
// recurrent weights, then the gates, token after token.
#pragma once

#include "numbers.h"
#include "slstm_kernels.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// Rows padded to whole vectors.
template <class T>
struct SlstmScratch {
    SlstmScratch(int64_t D, void* memory)
        : width(panels(D, kLanes<T>) * kLanes<T>),
          state(static_cast<T*>(memory)),
          grad(state + 4 * width),
          product(grad + 5 * width) {}

    static int64_t bytes(int64_t D) {
        return 14 * panels(D, kLanes<T>) * kLanes<T> * int64_t(sizeof(T));
    }

    int64_t width;
    T* state;    // [4][width]: h, c, n, m
    T* grad;     // [5][width]: of h, c, n, m, and of the way m came about
    T* product;  // [4][D], and room to the end of a vector
};

template <class T>
LSM_INLINE Vector<T> load_row(T const* p, int64_t i, int64_t D) {
    return i + kLanes<T> <= D ? load(p + i) : widen_first<T>(p + i, D - i);
}

template <class T>
LSM_INLINE void store_row(T* p, int64_t i, int64_t D, Vector<T> x) {
    if (i + kLanes<T> <= D) {
        store(p + i, x);
    } else {
        narrow_first<T>(p + i, x, D - i);
    }
}

// out[columns] = v[rows] M[rows, columns], a block of columns in registers at a time.
template <class T>
void multiply(T const* M, T const* v, int64_t rows, int64_t columns, T* out) {
    constexpr int W = kLanes<T>, N = 8;
    int64_t c = 0;
    for (; c + N * W <= columns; c += N * W) {
        Vector<T> sum[N] = {};
        for (int64_t k = 0; k < rows; ++k) {
            T const* row = M + k * columns + c;
            for (int n = 0; n < N; ++n) sum[n] += v[k] * load(row + n * W);
        }
        for (int n = 0; n < N; ++n) store(out + c + n * W, sum[n]);
    }
    for (; c < columns; c += W) {
        Vector<T> sum = {};
        for (int64_t k = 0; k < rows; ++k) sum += v[k] * load_row(M + k * columns, c, columns);
        store_row(out, c, columns, sum);
    }
}

// log σ(x) = min(x, 0) − log(1 + e^{−|x|}).
template <class T>
LSM_INLINE Vector<T> log_sigmoid(Vector<T> x) {
    Vector<T> const zero = {};
    Vector<T> e = exp(x < zero ? x : -x);
    for (int i = 0; i < kLanes<T>; ++i) e[i] = std::log1p(e[i]);
    return (x < zero ? x : zero) - e;
}

// What one vector of channels makes of a token's pre-activations and of the state before it.
template <class T>
struct SlstmCell {
    using V = Vector<T>;

    SlstmCell(V i, V f, V z_raw, V o, V c, V n, V m) {
        V const infinity = V{} + T(INFINITY);
        V const carried = n == V{} ? -infinity : log_sigmoid<T>(f) + m;
        this->m = carried > i ? carried : i;
        write = exp(i - this->m), keep = exp(carried - this->m);
        z = hyperbolic_tangent(z_raw), open = T(1) / (T(1) + exp(-o));
        this->c = keep * c + write * z, this->n = keep * n + write;
        by_input = carried > i ? V{} : V{} + T(1);
    }
    V h() const { return open * c / n; }

    V write, keep, z, open, c, n, m;
    V by_input;  // 1 where m is i, else 0
};

template <class T>
class SlstmWalk {
  public:
    static constexpr int W = kLanes<T>;

    SlstmWalk(SlstmParams const& p, SlstmTask const& task, void* scratch)
        : p_(p), task_(task), s_(p.D, scratch) {}

    template <class Element>
    void forward() {
        int64_t const D = p_.D, HD = p_.H * D;
        T const* const R = static_cast<T const*>(p_.R) + task_.head * D * 4 * D;
        read_state(p_.initial_state, s_.state);
        for (int64_t t = task_.begin; t < task_.end; ++t) {
            int64_t const token = task_.batch * p_.T + t;
            Element const* const x =
                static_cast<Element const*>(p_.x) + token * 4 * HD + task_.head * D;
            Element* const y = static_cast<Element*>(p_.y) + token * HD + task_.head * D;
            multiply(R, s_.state, D, 4 * D, s_.product);
            for (int64_t e = 0; e < D; e += W) {
                auto const raw = [&](int gate) {
                    return row_of(x + gate * HD, e) + load_row(s_.product + gate * D, e, D);
                };
                SlstmCell<T> const cell(raw(0), raw(1), raw(2), raw(3), state(1, e), state(2, e),
                                        state(3, e));
                Vector<T> const h = cell.h();
                store(s_.state + e, h), store(s_.state + s_.width + e, cell.c);
                store(s_.state + 2 * s_.width + e, cell.n);
                store(s_.state + 3 * s_.width + e, cell.m);
                if (e + W <= D) {
                    narrow(y + e, h);
                } else {
                    narrow_first<T>(y + e, h, D - e);
                }
            }
            if (p_.cells != nullptr)
                write_rows(s_.state, static_cast<T*>(p_.cells) + token * 4 * HD + task_.head * D);
        }
        if (p_.final_state != nullptr) write_rows(s_.state, state_of(p_.final_state));
    }

    void backward() {
        int64_t const D = p_.D, HD = p_.H * D;
        T const* const R = static_cast<T const*>(p_.R_transposed) + task_.head * 4 * D * D;
        read_state(p_.grad_final_state, s_.grad);
        // A final c and n are multiples of e^{−m}, which makes them depend on how m came about.
        T* const way = s_.grad + 4 * s_.width;
        read_cells(task_.end - 1);
        for (int64_t e = 0; e < s_.width; e += W) {
            store(way + e, grad(3, e) - grad(1, e) * state(1, e) - grad(2, e) * state(2, e));
        }
        for (int64_t t = task_.end - 1; t >= task_.begin; --t) {
            int64_t const token = task_.batch * p_.T + t;
            T const* const raw = static_cast<T const*>(p_.raw) + token * 4 * HD + task_.head * D;
            T const* const dy = static_cast<T const*>(p_.grad_y) + token * HD + task_.head * D;
            T* const draw = static_cast<T*>(p_.draw) + token * 4 * HD + task_.head * D;
            read_cells(t - 1);
            for (int64_t e = 0; e < D; e += W) {
                Vector<T> const c = state(1, e), n = state(2, e);
                Vector<T> const f = load_row(raw + HD, e, D);
                SlstmCell<T> const cell(load_row(raw, e, D), f, load_row(raw + 2 * HD, e, D),
                                        load_row(raw + 3 * HD, e, D), c, n, state(3, e));
                Vector<T> const dh = grad(0, e) + load_row(dy, e, D), ratio = cell.c / cell.n;
                Vector<T> const dratio = dh * cell.open / cell.n;
                Vector<T> const dc = grad(1, e) + dratio, dn = grad(2, e) - dratio * ratio;
                Vector<T> const w = load(way + e);
                Vector<T> const di = cell.write * (dc * cell.z + dn) + cell.by_input * w;
                Vector<T> const through = (T(1) - cell.by_input) * w;
                Vector<T> const dlog = cell.keep * (dc * c + dn * n) + through;
                Vector<T> const shut = T(1) / (T(1) + exp(f));  // d log σ(f) / df
                Vector<T> const grads[4] = {di, dlog * shut,
                                            dc * cell.write * (T(1) - cell.z * cell.z),
                                            dh * ratio * cell.open * (T(1) - cell.open)};
                for (int g = 0; g < 4; ++g) {
                    store_row(draw + g * HD, e, D, grads[g]);
                    store_row(s_.product + g * D, e, D, grads[g]);
                }
                store(s_.grad + s_.width + e, dc * cell.keep);
                store(s_.grad + 2 * s_.width + e, dn * cell.keep);
                store(way + e, through);
            }
            multiply(R, s_.product, 4 * D, D, s_.grad);
        }
        if (p_.grad_initial_state == nullptr) return;
        for (int64_t e = 0; e < s_.width; e += W) {
            Vector<T> const dm =
                load(way + e) + grad(1, e) * state(1, e) + grad(2, e) * state(2, e);
            store(s_.grad + 3 * s_.width + e, dm);
        }
        write_rows(s_.grad, state_of(p_.grad_initial_state));
    }

  private:
    Vector<T> state(int row, int64_t e) const { return load(s_.state + row * s_.width + e); }
    Vector<T> grad(int row, int64_t e) const { return load(s_.grad + row * s_.width + e); }

    template <class Element>
    Vector<T> row_of(Element const* p, int64_t e) const {
        return e + W <= p_.D ? widen(p + e) : widen_first<T>(p + e, p_.D - e);
    }

    T* state_of(void const* states) const {
        return static_cast<T*>(const_cast<void*>(states)) +
               (task_.index * 4 * p_.H + task_.head) * p_.D;
    }

    // Four rows of a [4, H, D] tensor.
    void read_rows(T const* from, T* to) const {
        for (int row = 0; row < 4; ++row) {
            for (int64_t e = 0; e < p_.D; e += W)
                store(to + row * s_.width + e, load_row(from + row * p_.H * p_.D, e, p_.D));
        }
    }
    void write_rows(T const* from, T* to) const {
        for (int row = 0; row < 4; ++row) {
            for (int64_t e = 0; e < p_.D; e += W)
                store_row(to + row * p_.H * p_.D, e, p_.D, load(from + row * s_.width + e));
        }
    }

    void read_state(void const* states, T* to) const {
        if (states != nullptr) return read_rows(state_of(states), to);
        for (int64_t e = 0; e < 4 * s_.width; e += W) store(to + e, Vector<T>{});
    }

    // The state after a token, or the initial one.
    void read_cells(int64_t token) {
        if (token < task_.begin) return read_state(p_.initial_state, s_.state);
        int64_t const at = ((task_.batch * p_.T + token) * 4 * p_.H + task_.head) * p_.D;
        read_rows(static_cast<T const*>(p_.states) + at, s_.state);
    }

    SlstmParams const& p_;
    SlstmTask const& task_;
    SlstmScratch<T> s_;
};

int64_t slstm_scratch_bytes(SlstmParams const& p) {
    return with_accumulator(p.dtype,
                            [&](auto zero) { return SlstmScratch<decltype(zero)>::bytes(p.D); });
}

void slstm_forward(SlstmParams const& p, SlstmTask const& task, void* scratch) {
    with_types(p.dtype, [&](auto zero, auto element) {
        SlstmWalk<decltype(zero)>(p, task, scratch).template forward<decltype(element)>();
    });
}

void slstm_backward(SlstmParams const& p, SlstmTask const& task, void* scratch) {
    with_accumulator(p.state_dtype,
                     [&](auto zero) { SlstmWalk<decltype(zero)>(p, task, scratch).backward(); });
}

}  // namespace

constinit SlstmKernels const slstm_kernels{slstm_scratch_bytes, slstm_forward, slstm_backward};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
