// The short convolution for one instruction set (see chunk_tier.h for what the including file has chosen).
//
// A tile of channels walks its sequence in blocks of tokens, held as panels: one vector of channels of every
// token, with the W - 1 inputs before the block in front. Whether channels or tokens lie side by side in memory
// is known only to the reader and writer of blocks, which transpose squares of tokens and channels if need be.
#pragma once

#include "rows.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

constexpr int64_t kBlock = 32;     // tokens
constexpr int kConvColumns = 4;    // vectors of channels in a tile
constexpr int64_t kMaxTaps = 128;  // of a panel on the stack; checked by the operator
constexpr int64_t kStepTile = 32;  // channels

// Squares of kLanes<T> tokens and channels of a [B, T, D] tensor to and from panels.
template <class T, class Element>
struct Squares {
    static constexpr int W = kLanes<T>;

    static void read(T* panel, Element const* from, Strided const& x, int64_t tokens,
                     int64_t channels) {
        if (x.channel_last()) {
            for (int64_t t = 0; t < tokens; ++t, panel += W, from += x.time) {
                store(panel, channels == W ? widen(from) : widen_first<T>(from, channels));
            }
            return;
        }
        for (int64_t t = 0; t < tokens; t += W, panel += W * W, from += W) {
            int64_t const count = min_of(W, tokens - t);
            Vector<T> square[W];
            for (int c = 0; c < W; ++c) {
                Element const* row = from + c * x.channel;
                square[c] = c >= channels ? Vector<T>{}
                            : count == W  ? widen(row)
                                          : widen_first<T>(row, count);
            }
            transpose<T>(square);
            for (int64_t i = 0; i < count; ++i) store(panel + i * W, square[i]);
        }
    }

    static void write(T const* panel, Element* to, Strided const& x, int64_t tokens,
                      int64_t channels) {
        if (x.channel_last()) {
            for (int64_t t = 0; t < tokens; ++t, panel += W, to += x.time) {
                if (channels == W) {
                    narrow(to, load(panel));
                } else {
                    narrow_first<T>(to, load(panel), channels);
                }
            }
            return;
        }
        for (int64_t t = 0; t < tokens; t += W, panel += W * W, to += W) {
            int64_t const count = min_of(W, tokens - t);
            Vector<T> square[W];
            for (int64_t i = 0; i < W; ++i) {
                square[i] = i < count ? load(panel + i * W) : Vector<T>{};
            }
            transpose<T>(square);
            for (int c = 0; c < W && c < channels; ++c) {
                Element* row = to + c * x.channel;
                if (count == W) {
                    narrow(row, square[c]);
                } else {
                    narrow_first<T>(row, square[c], count);
                }
            }
        }
    }
};

template <class T>
LSM_INLINE Vector<T> logistic(Vector<T> x) {
    return T(1) / (T(1) + exp(-x));
}

// One element in the accumulation type.
LSM_INLINE float number(float const* p) {
    return *p;
}
LSM_INLINE double number(double const* p) {
    return *p;
}
LSM_INLINE float number(Bf16 const* p) {
    return __builtin_bit_cast(float, uint32_t(p->bits) << 16);
}
LSM_INLINE float number(F16 const* p) {
    return widen_first<float>(p, 1)[0];
}

// Rows [D, columns] of one tile, columns apart: [columns][kLanes] as vectors.
template <class T>
void read_columns(T* to, void const* rows, Dtype dtype, int64_t columns, int64_t channels,
                  int64_t lanes) {
    with_element<T>(dtype, [&](auto element) {
        auto const* from = static_cast<decltype(element) const*>(rows);
        for (int64_t c = 0; c < lanes; ++c) {
            for (int64_t j = 0; j < columns; ++j)
                to[j * lanes + c] = c < channels ? T(number(from + c * columns + j)) : T(0);
        }
    });
}

inline void* element_at(void const* p, Dtype dtype, int64_t i) {
    return static_cast<char*>(const_cast<void*>(p)) + i * bytes_of(dtype);
}

// f(integral_constant<int, W>) for the usual taps, else 0: told at run time.
template <class F>
void with_taps(int64_t W, F const& f) {
    switch (W) {
        case 2:
            return f(std::integral_constant<int, 2>{});
        case 3:
            return f(std::integral_constant<int, 3>{});
        case 4:
            return f(std::integral_constant<int, 4>{});
        default:
            return f(std::integral_constant<int, 0>{});
    }
}

// One vector of channels of one sequence after another.
template <class T, class Element, int kTaps>
class ConvColumn {
  public:
    static constexpr int W = kLanes<T>;

    ConvColumn(ConvParams const& p, int64_t first)
        : p_(p), first_(first), channels_(p.D <= first ? 0 : min_of(W, p.D - first)) {
        if (channels_ == 0) return;
        alignas(64) T column[kMaxTaps * W];
        read_columns(column, element_at(p.weight, p.weight_dtype, first * p.W), p.weight_dtype, p.W,
                     channels_, W);
        for (int64_t j = 0; j < taps(); ++j) weight_[j] = load(column + j * W);
        if (p.bias != nullptr) {
            read_columns(column, element_at(p.bias, p.weight_dtype, first), p.weight_dtype, 1,
                         channels_, W);
            bias_ = load(column);
        }
    }

    // A block of the forward; blocks follow each other from the sequence's first to its last.
    void forward(ConvSequence const& s, int64_t t, int64_t tokens) {
        alignas(64) T y[kBlock * W];
        int64_t const past = taps() - 1;
        if (t == s.begin) read_state(s, x_);
        read(p_.x, s.batch, t, tokens, x_ + past * W);
        for (int64_t i = 0; i < tokens; ++i) {
            Vector<T> const pre = convolve(x_ + i * W);
            store(y + i * W, p_.silu ? pre * logistic<T>(pre) : pre);
        }
        Squares<T, Element>::write(y, at<Element>(p_.y, s.batch, t), p_.y, tokens, channels_);
        for (int64_t i = 0; i < past; ++i) store(x_ + i * W, load(x_ + (i + tokens) * W));
    }

    void write_state(ConvSequence const& s) const {
        if (p_.final_state == nullptr) return;
        for (int64_t c = 0; c < channels_; ++c) {
            Element* const to = state_of(p_.final_state, s.index, c);
            Element const* const x = at<Element>(p_.x, s.batch, 0) + c * p_.x.channel;
            for (int64_t i = 0; i < p_.S; ++i) {
                int64_t const token = s.end - p_.S + i, before = p_.S + token - s.begin;
                if (token >= s.begin) {
                    to[i] = x[token * p_.x.time];
                } else if (p_.initial_state != nullptr) {
                    to[i] = state_of(p_.initial_state, s.index, c)[before];
                } else {
                    to[i] = Element{};
                }
            }
        }
    }

    // A block of the backward, from the sequence's last to its first. `grad_` holds gradients before the
    // activation, and behind them those of the W - 1 tokens that follow.
    void backward(ConvSequence const& s, int64_t t, int64_t tokens) {
        alignas(64) T dx[kBlock * W];
        int64_t const past = taps() - 1, inside = min_of(past, t - s.begin);
        for (int64_t i = past - 1; i >= 0; --i)
            store(grad_ + (i + tokens) * W, load(grad_ + i * W));
        if (inside < past) read_state(s, x_, inside);
        read(p_.x, s.batch, t - inside, inside + tokens, x_ + (past - inside) * W);
        read(p_.grad_y, s.batch, t, tokens, grad_);
        if (p_.silu) {
            for (int64_t i = 0; i < tokens; ++i) {
                Vector<T> const pre = convolve(x_ + i * W), open = logistic<T>(pre);
                store(grad_ + i * W, load(grad_ + i * W) * (open * (T(1) + pre * (T(1) - open))));
            }
        }
        add_weight_grad(x_, grad_, tokens);
        for (int64_t i = 0; i < tokens; ++i) store(dx + i * W, spread(grad_ + i * W));
        if (p_.grad_final_state != nullptr) add_final_grad(s, t, tokens, dx);
        Squares<T, Element>::write(dx, at<Element>(p_.dx, s.batch, t), p_.dx, tokens, channels_);
    }

    void begin_backward() {
        for (int64_t i = 0; i < taps() - 1; ++i) store(grad_ + i * W, Vector<T>{});
    }

    // `grad_` begins with the gradients of the sequence's first tokens, and is zero behind its last.
    void write_initial_grad(ConvSequence const& s) const {
        if (p_.grad_initial_state == nullptr) return;
        int64_t const past = taps() - 1, length = s.end - s.begin;
        for (int64_t i = 0; i < p_.S; ++i) {
            int64_t const age = p_.S - i;  // 1: right before the first token
            alignas(64) T lane[W];
            Vector<T> sum = {};
            for (int64_t j = age; j <= past; ++j)
                sum += weight_[past - j] * load(grad_ + (j - age) * W);
            store(lane, sum);
            for (int64_t c = 0; c < channels_; ++c) {
                if (p_.grad_final_state != nullptr && i - length >= 0)
                    lane[c] += number(state_of(p_.grad_final_state, s.index, c) + i - length);
                narrow_first<T>(state_of(p_.grad_initial_state, s.index, c) + i,
                                Vector<T>{} + lane[c], 1);
            }
        }
    }

    void write_weight_grad() const {
        if (p_.dweight == nullptr) return;
        with_element<T>(p_.weight_dtype, [&](auto element) {
            using E = decltype(element);
            E* const dweight = static_cast<E*>(p_.dweight);
            for (int64_t j = 0; j < taps(); ++j) {
                E lane[W];
                narrow(lane, dweight_[j]);
                for (int64_t c = 0; c < channels_; ++c) dweight[(first_ + c) * p_.W + j] = lane[c];
            }
            if (p_.dbias != nullptr)
                narrow_first<T>(static_cast<E*>(p_.dbias) + first_, dbias_, channels_);
        });
    }

  private:
    LSM_INLINE int64_t taps() const { return kTaps > 0 ? kTaps : p_.W; }

    template <class E>
    E* at(Strided const& x, int64_t batch, int64_t token) const {
        return static_cast<E*>(x.data) + batch * x.batch + token * x.time + first_ * x.channel;
    }

    void read(Strided const& x, int64_t batch, int64_t token, int64_t tokens, T* panel) const {
        Squares<T, Element>::read(panel, at<Element>(x, batch, token), x, tokens, channels_);
    }

    LSM_INLINE Vector<T> convolve(T const* x) const {
        Vector<T> sum = bias_;
        for (int64_t j = 0; j < taps(); ++j) sum += weight_[j] * load(x + j * W);
        return sum;
    }

    LSM_INLINE Vector<T> spread(T const* grad) const {
        Vector<T> sum = {};
        for (int64_t j = 0; j < taps(); ++j) sum += weight_[taps() - 1 - j] * load(grad + j * W);
        return sum;
    }

    // A block's sum is added as one: long sequences then lose no more digits than short ones.
    void add_weight_grad(T const* x, T const* grad, int64_t tokens) {
        if (p_.dweight == nullptr) return;
        if constexpr (kTaps > 0) {
            Vector<T> sum[kTaps] = {}, bias = {};
            for (int64_t i = 0; i < tokens; ++i) {
                Vector<T> const g = load(grad + i * W);
                bias += g;
                for (int j = 0; j < kTaps; ++j) sum[j] += g * load(x + (i + j) * W);
            }
            for (int j = 0; j < kTaps; ++j) dweight_[j] += sum[j];
            dbias_ += bias;
        } else {
            for (int64_t j = 0; j < taps(); ++j) {
                Vector<T> sum = {};
                for (int64_t i = 0; i < tokens; ++i)
                    sum += load(grad + i * W) * load(x + (i + j) * W);
                dweight_[j] += sum;
            }
            Vector<T> bias = {};
            for (int64_t i = 0; i < tokens; ++i) bias += load(grad + i * W);
            dbias_ += bias;
        }
    }

    Element* state_of(void const* states, int64_t sequence, int64_t channel) const {
        return static_cast<Element*>(const_cast<void*>(states)) +
               (sequence * p_.D + first_ + channel) * p_.S;
    }

    // The W - 1 inputs before token `begin + offset` that lie before `begin`, into their rows of a panel.
    void read_state(ConvSequence const& s, T* panel, int64_t offset = 0) const {
        int64_t const past = taps() - 1;
        for (int64_t i = 0; i < past - offset; ++i) {
            T lane[W] = {};
            int64_t const column = p_.S - past + offset + i;
            for (int64_t c = 0; p_.initial_state != nullptr && c < channels_; ++c)
                lane[c] = number(state_of(p_.initial_state, s.index, c) + column);
            store(panel + i * W, load(lane));
        }
    }

    void add_final_grad(ConvSequence const& s, int64_t t, int64_t tokens, T* dx) const {
        int64_t const kept = s.end - p_.S;  // the first token that is in the state
        for (int64_t i = kept > t ? kept - t : 0; i < tokens; ++i) {
            for (int64_t c = 0; c < channels_; ++c)
                dx[i * W + c] += number(state_of(p_.grad_final_state, s.index, c) + t + i - kept);
        }
    }

    ConvParams const& p_;
    int64_t first_, channels_;
    Vector<T> weight_[kTaps > 0 ? kTaps : kMaxTaps], bias_ = {};
    Vector<T> dweight_[kTaps > 0 ? kTaps : kMaxTaps] = {}, dbias_ = {};
    alignas(64) T x_[(kMaxTaps + kBlock) * W], grad_[(kMaxTaps + kBlock) * W];
};

// The columns of a tile, a block of tokens at a time: what lies side by side is read together.
template <class Column>
class ConvTile {
  public:
    ConvTile(ConvParams const& p, int64_t first)
        : ConvTile(p, first, std::make_integer_sequence<int, kConvColumns>{}) {
        int64_t const left = (p.D - first + Column::W - 1) / Column::W;
        live_ = int(min_of(left, kConvColumns));
    }

    void forward(ConvSequence const& s) {
        for (int64_t t = s.begin; t < s.end; t += kBlock)
            each([&](Column& column) { column.forward(s, t, min_of(kBlock, s.end - t)); });
        each([&](Column& column) { column.write_state(s); });
    }

    void backward(ConvSequence const& s) {
        each([](Column& column) { column.begin_backward(); });
        int64_t const blocks = (s.end - s.begin + kBlock - 1) / kBlock;
        for (int64_t b = blocks - 1; b >= 0; --b) {
            int64_t const t = s.begin + b * kBlock;
            each([&](Column& column) { column.backward(s, t, min_of(kBlock, s.end - t)); });
        }
        each([&](Column& column) { column.write_initial_grad(s); });
    }

    void write_weight_grad() {
        each([](Column& column) { column.write_weight_grad(); });
    }

  private:
    template <int... kColumn>
    ConvTile(ConvParams const& p, int64_t first, std::integer_sequence<int, kColumn...>)
        : columns_{Column(p, first + kColumn * Column::W)...} {}

    template <class F>
    LSM_INLINE void each(F const& f) {
        for (int i = 0; i < live_; ++i) f(columns_[i]);
    }

    int live_;
    Column columns_[kConvColumns];
};

// run(ConvTile{p, first}) of the dtype and the taps.
template <class Run>
void with_tile(ConvParams const& p, int64_t first, Run const& run) {
    auto const typed = [&](auto zero) {
        using T = decltype(zero);
        with_element<T>(p.dtype, [&](auto element) {
            using Element = decltype(element);
            with_taps(p.W, [&](auto taps) {
                run(ConvTile<ConvColumn<T, Element, decltype(taps)::value>>(p, first));
            });
        });
    };
    if (p.dtype == Dtype::f64) {
        typed(double{});
    } else {
        typed(float{});
    }
}

int64_t tile_channels(ConvParams const& p) {
    return kConvColumns * (p.dtype == Dtype::f64 ? kLanes<double> : kLanes<float>);
}

void conv_forward(ConvParams const& p, ConvSequence const& sequence, int64_t first) {
    with_tile(p, first, [&](auto&& tile) { tile.forward(sequence); });
}

void conv_backward(ConvParams const& p, ConvSequence const* sequences, int64_t count,
                   int64_t first) {
    with_tile(p, first, [&](auto&& tile) {
        for (int64_t i = 0; i < count; ++i) tile.backward(sequences[i]);
        tile.write_weight_grad();
    });
}

// One row of a batch of steps, a tile of channels at a time; the last W inputs as rows [W][kStepTile].
template <class T, class Element>
void step_row(ConvStepParams const& p, int64_t batch) {
    constexpr int64_t C = kStepTile;
    int64_t const row = p.rows != nullptr ? p.rows[batch] : batch, past = p.W - 1;
    int64_t const seen = p.seen != nullptr ? p.seen[batch] : p.S;
    // Where an input lies: positions count from the state's first column, or from the ring's first input.
    auto const column = [&](int64_t position) {
        return p.seen != nullptr ? (position % p.S + p.S) % p.S : position;
    };
    alignas(64) T inputs[kMaxTaps * C] = {}, weight[kMaxTaps * C], bias[C] = {}, sum[C];
    for (int64_t first = 0; first < p.D; first += C) {
        int64_t const channels = min_of(C, p.D - first);
        Element const* const x =
            static_cast<Element const*>(p.x.data) + batch * p.x.batch + first * p.x.channel;
        Element* const y =
            static_cast<Element*>(p.y.data) + batch * p.y.batch + first * p.y.channel;
        if (row < 0) {
            for (int64_t t = 0; t < p.T; ++t)
                for (int64_t c = 0; c < channels; ++c)
                    y[t * p.y.time + c * p.y.channel] = Element{};
            continue;
        }
        Element* const state =
            static_cast<Element*>(p.state) + row * p.state_row + first * p.state_channel;
        read_columns(weight, element_at(p.weight, p.weight_dtype, first * p.W), p.weight_dtype, p.W,
                     channels, C);
        if (p.bias != nullptr)
            read_columns(bias, element_at(p.bias, p.weight_dtype, first), p.weight_dtype, 1,
                         channels, C);
        for (int64_t i = 0; i < past; ++i) {
            Element const* const from = state + column(seen - past + i) * p.state_time;
            for (int64_t c = 0; c < channels; ++c)
                inputs[i * C + c] = number(from + c * p.state_channel);
        }
        for (int64_t t = 0; t < p.T; ++t) {
            for (int64_t c = 0; c < channels; ++c)
                inputs[past * C + c] = number(x + t * p.x.time + c * p.x.channel);
            for (int64_t c = 0; c < C; c += kLanes<T>) {
                Vector<T> pre = load(bias + c);
                for (int64_t j = 0; j < p.W; ++j) {
                    Vector<T> const input = load(inputs + j * C + c);
                    if (j > 0) store(inputs + (j - 1) * C + c, input);
                    pre += load(weight + j * C + c) * input;
                }
                store(sum + c, p.silu ? pre * logistic<T>(pre) : pre);
            }
            Element out[C];
            for (int64_t c = 0; c < C; c += kLanes<T>) narrow(out + c, load(sum + c));
            for (int64_t c = 0; c < channels; ++c) y[t * p.y.time + c * p.y.channel] = out[c];
        }
        for (int64_t c = 0; c < channels; ++c) {
            Element* const to = state + c * p.state_channel;
            Element const* const from = x + c * p.x.channel;
            if (p.seen != nullptr) {
                for (int64_t t = 0; t < p.T; ++t)
                    to[column(seen + t) * p.state_time] = from[t * p.x.time];
            } else {
                for (int64_t s = 0; s < p.S; ++s) {
                    int64_t const after = s + p.T;
                    to[s * p.state_time] =
                        after < p.S ? to[after * p.state_time] : from[(after - p.S) * p.x.time];
                }
            }
        }
    }
}

void conv_step(ConvStepParams const& p, int64_t batch) {
    if (p.dtype == Dtype::f64) return step_row<double, double>(p, batch);
    with_element<float>(p.dtype,
                        [&](auto element) { step_row<float, decltype(element)>(p, batch); });
}

}  // namespace

constinit ConvKernels const conv_kernels{tile_channels, conv_forward, conv_backward, conv_step};

}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
