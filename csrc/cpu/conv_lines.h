// The short convolution of tokens that lie side by side (see conv_tier.h).
#pragma once

#include "conv_tile.h"

namespace lsm::cpu {
namespace LSM_CPU_TIER {
namespace {

// Tokens side by side: a segment of one channel after the other.
template <class Number, class Elem, int kTaps>
class Lines : public Tile<Number, Elem, kTaps> {
    using Base = Tile<Number, Elem, kTaps>;

  public:
    using Base::W;
    using typename Base::Element;
    using typename Base::T;

    Lines(ConvParams const& p, int64_t first, Arena<T>& arena) : Base(p, first, arena) {
        arena.take_each(conv_segment_tokens(p) + 2 * past() + W, x_, grad_);
    }

    // A line's ends, or all of it, are read while the line before is walked: what was just stored is slow to load in other
    // pieces.
    void forward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0;
        T *inputs = x_, *next_inputs = grad_;
        read_inputs(s, 0, tokens, inputs);
        for (int64_t c = 0; c < channels_; ++c, std::swap(inputs, next_inputs)) {
            if (c + 1 < channels_) read_inputs(s, c + 1, tokens, next_inputs);
            Filter const filter(*this, c);
            T const bias = bias_[c];
            Element const* const x = line(p_.x, s, c);
            Element* const y = line(p_.y, s, c);
            Element const* const next_x =
                line(p_.x, s, c + 1);  // the walk along it is memory's time
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                __builtin_prefetch(next_x + i);
                T const* at = inputs + i;
                if constexpr (kInPlace && std::is_same_v<decltype(lanes), All>)
                    at = i >= kLanes<T> ? x + i - this->past() : at;
                Vector<T> sum[] = {filter.apply(at, 1, bias)};
                this->activate(sum);
                write<T>(y + i, sum[0], lanes);
            });
        }
        this->write_state(s);
    }

    void backward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0, made = min_of(tokens + past(), s.end - s.t0);
        for (int64_t c = 0; c < channels_; ++c) {
            read_line(s, c, made, x_);
            Filter const filter(*this, c);
            T const bias = bias_[c];
            Element const* const dy = line(p_.grad_y, s, c);
            Element const* const next = line(p_.x, s, c + 1);
            each_vector<T>(made, [&](int64_t i, auto lanes) {
                __builtin_prefetch(next + i);
                Vector<T> value, slope;
                this->activate(filter.apply(x_ + i, 1, bias), value, slope);
                store(grad_ + i, read<T>(dy + i, lanes) * slope);
            });
            for (int64_t i = made; i < tokens + past(); ++i) grad_[i] = T(0);
            if (p_.dweight != nullptr) add_to_sums(c, tokens);
            Element* const dx = line(p_.dx, s, c);
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> sum = filter.apply(grad_ + i + past(), -1, T(0));
                for (int k = 0; k < W && this->in_final_state(s, s.t0 + i + W - 1); ++k) {
                    int64_t const token = s.t0 + i + k;
                    if (token < s.t1 && this->in_final_state(s, token))
                        sum[k] += this->final_grad(s, c, token);
                }
                write<T>(dx + i, sum, lanes);
            });
            if (p_.grad_initial_state != nullptr && s.t0 == s.begin)
                this->write_initial_grad(s, c, [&](int64_t i) { return grad_[i]; });
        }
    }

  private:
    using Base::bias_, Base::channels_, Base::p_, Base::past, Base::pitch_, Base::sums_, Base::taps,
        Base::weight_;

    // Whether the forward finds a line's inputs where they are, but for those of its first vector and of what is left
    // for its last.
    static constexpr bool kInPlace =
        std::is_same_v<T, Element> && kTaps > 0 && kTaps - 1 <= Base::W;

    // A channel's taps in all lanes.
    struct Filter {
        Filter(Lines const& lines, int64_t c) : lines_(lines), c_(c) {
            for (int j = 0; j < kTaps; ++j)
                weight_[j] = Vector<T>{} + lines.weight_[j * lines.pitch_ + c];
        }

        // first, and over taps j weight j times x[j * step]: in the order of Rows, to the same bits.
        LSM_INLINE Vector<T> apply(T const* x, int64_t step, T first) const {
            Vector<T> sum = Vector<T>{} + first;
            if constexpr (kTaps > 0) {
#pragma GCC unroll 4
                for (int j = 0; j < kTaps; ++j) sum += weight_[j] * load(x + j * step);
            } else {
                for (int64_t j = 0; j < lines_.taps(); ++j)
                    sum += lines_.weight_[j * lines_.pitch_ + c_] * load(x + j * step);
            }
            return sum;
        }

        Lines const& lines_;
        int64_t c_;
        Vector<T> weight_[kTaps > 0 ? kTaps : 1];
    };

    Element* line(Strided const& x, ConvSegment const& s, int64_t c) const {
        return this->at(x, s, s.t0) + c * x.channel;
    }

    // The W - 1 inputs before a segment, and the first `tokens` from its first on.
    void read_line(ConvSegment const& s, int64_t c, int64_t tokens, T* to) const {
        Element const* const x = line(p_.x, s, c);
        for (int64_t i = 0; i < past(); ++i) {
            int64_t const token = s.t0 - past() + i;
            Element const input =
                token >= s.begin ? x[i - past()] : this->before(s, c, s.begin - token);
            to[i] = number(&input);
        }
        each_vector<T>(
            tokens, [&](int64_t i, auto lanes) { store(to + past() + i, read<T>(x + i, lanes)); });
    }

    // What the forward does not find in its place.
    void read_inputs(ConvSegment const& s, int64_t c, int64_t tokens, T* to) const {
        if (!kInPlace) return read_line(s, c, tokens, to);
        read_line(s, c, min_of(tokens, W), to);
        int64_t const last = tokens / W * W;
        if (last == 0 || last == tokens) return;
        Element const* const x = line(p_.x, s, c);
        for (int64_t i = last - past(); i < tokens; ++i) to[past() + i] = number(x + i);
    }

    // In vectors of tokens, and those at the end.
    void add_to_sums(int64_t c, int64_t tokens) {
        auto const add = [&](int64_t j, Vector<T> sum) {
            sums_[j * pitch_ + c] += sum_lanes<T>(sum);
        };
        constexpr int kTogether = kTaps > 0 ? kTaps : 1;
        for (int64_t j = 0; j < taps(); j += kTogether) {
            Vector<T> sum[kTogether] = {};
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> const g = zero_rest<T>(load(grad_ + i), lanes);
#pragma GCC unroll 4
                for (int k = 0; k < kTogether; ++k)
                    sum[k] += g * zero_rest<T>(load(x_ + i + j + k), lanes);
            });
            for (int k = 0; k < kTogether; ++k) add(j + k, sum[k]);
        }
        Vector<T> bias = {};
        each_vector<T>(
            tokens, [&](int64_t i, auto lanes) { bias += zero_rest<T>(load(grad_ + i), lanes); });
        add(taps(), bias);
    }

    // From W - 1 tokens before the segment on, and from its first token on; in the forward both inputs, of lines in turn.
    T *x_, *grad_;
};

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
