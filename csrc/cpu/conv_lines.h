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
        for (Element*& ends : ends_) ends = reinterpret_cast<Element*>(arena.take(2 * end_size()));
    }

    // A group of tokens reads its inputs where they are, but for the first group, which may begin with a state, and the
    // last. Those are copied while the line before is walked: what was just stored is slow to load in other pieces.
    void forward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0, last = tokens / kGroup * kGroup;
        Element *ends = ends_[0], *next_ends = ends_[1];
        read_ends(s, 0, ends);
        for (int64_t c = 0; c < channels_; ++c, std::swap(ends, next_ends)) {
            if (c + 1 < channels_) read_ends(s, c + 1, next_ends);
            Filter const filter(*this, c);
            Element const* const x = line(p_.x, s, c);
            Element* const y = line(p_.y, s, c);
            Element const* const next = line(p_.x, s, c + 1);  // the walk along it is memory's time
            int64_t i = 0;
            for (; i < min_of(last, head()); i += kGroup)
                forward_group(filter, ends + room() + i, y + i);
            for (; i < last; i += kGroup) {
                __builtin_prefetch(next + i);
                forward_group(filter, x + i, y + i);
            }
            if (last < tokens) {
                Element rest[kGroup];
                forward_group(filter, ends + room() + (last < head() ? last : end_size()), rest);
                std::memcpy(y + last, rest, size_t(tokens - last) * sizeof(Element));
            }
        }
        this->write_state(s);
    }

    void backward(ConvSegment const& s) {
        int64_t const tokens = s.t1 - s.t0, made = min_of(tokens + past(), s.end - s.t0);
        for (int64_t c = 0; c < channels_; ++c) {
            read_line(s, c, made, x_);
            Filter const filter(*this, c);
            Element const* const dy = line(p_.grad_y, s, c);
            Element const* const next = line(p_.x, s, c + 1);
            each_vector<T>(made, [&](int64_t i, auto lanes) {
                __builtin_prefetch(next + i);
                Vector<T> value, slope;
                this->activate(filter.apply(x_ + i, 1, filter.bias), value, slope);
                store(grad_ + i, read<T>(dy + i, lanes) * slope);
            });
            for (int64_t i = made; i < tokens + past(); ++i) grad_[i] = T(0);
            if (p_.dweight != nullptr) add_to_sums(c, tokens);
            Element* const dx = line(p_.dx, s, c);
            each_vector<T>(tokens, [&](int64_t i, auto lanes) {
                Vector<T> sum = filter.apply(grad_ + i + past(), -1, Vector<T>{});
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
    using Base::bias_, Base::channels_, Base::kPaired, Base::p_, Base::past, Base::pitch_,
        Base::sums_, Base::taps, Base::weight_;

    static constexpr int kGroup = kPaired ? 2 * W : W;  // tokens
    // What is read in front of a group; pairs begin at even tokens.
    int64_t room() const { return kPaired ? this->round_up(past(), 2) : past(); }
    // The first groups, which reach behind the segment's first token.
    int64_t head() const { return this->round_up(kTaps > 1 || past() < 1 ? 1 : past(), kGroup); }
    int64_t end_size() const { return room() + head(); }

    // A channel's taps in all lanes.
    class Filter {
      public:
        Filter(Lines const& lines, int64_t c)
            : bias(Vector<T>{} + lines.bias_[c]), lines_(lines), c_(c) {
            for (int j = 0; j < kTaps; ++j)
                weight_[j] = Vector<T>{} + lines.weight_[j * lines.pitch_ + c];
        }

        // sum, and over taps j weight j times x[j * step]: in the order of Rows, to the same bits.
        template <class In>
        LSM_INLINE Vector<T> apply(In const* x, int64_t step, Vector<T> sum) const {
            if constexpr (kTaps > 0) {
#pragma GCC unroll 4
                for (int j = 0; j < kTaps; ++j) sum += weight_[j] * read<T>(x + j * step, All{});
            } else {
                for (int64_t j = 0; j < lines_.taps(); ++j)
                    sum += lines_.weight_[j * lines_.pitch_ + c_] * read<T>(x + j * step, All{});
            }
            return sum;
        }

        // Of the elements 2 i + shift, tap j of those at x[2 i + shift - past + j].
        template <int kShift>
        LSM_INLINE Vector<T> apply_half(Element const* x) const {
            Vector<T> sum = bias;
#pragma GCC unroll 4
            for (int j = 0; j < kTaps; ++j) {
                int const from = kShift - (kTaps - 1) + j;
                sum += weight_[j] * (from % 2 == 0 ? read_half<Half::even>(x + from)
                                                   : read_half<Half::odd>(x + from - 1));
            }
            return sum;
        }

        Vector<T> bias;

      private:
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

    // Inputs of the first group and of the last, with what is in front of them.
    void read_ends(ConvSegment const& s, int64_t c, Element* to) const {
        int64_t const tokens = s.t1 - s.t0, last = tokens / kGroup * kGroup;
        read_inputs(s, c, 0, min_of(tokens, head()), to);
        if (head() <= last && last < tokens) read_inputs(s, c, last, tokens, to + end_size());
    }

    void read_inputs(ConvSegment const& s, int64_t c, int64_t first, int64_t last,
                     Element* to) const {
        int64_t const begin = s.begin - s.t0;
        for (first -= room(); first < begin; ++first)
            *to++ = begin - first <= past() ? this->before(s, c, begin - first) : Element{};
        std::memcpy(to, line(p_.x, s, c) + first, size_t(last - first) * sizeof(Element));
    }

    LSM_INLINE void forward_group(Filter const& filter, Element const* x, Element* y) const {
        if constexpr (kPaired) {
            Vector<T> sum[] = {filter.template apply_half<0>(x), filter.template apply_half<1>(x)};
            this->activate(sum);
            write_halves(y, sum[0], sum[1]);
        } else {
            Vector<T> sum[] = {filter.apply(x - past(), 1, filter.bias)};
            this->activate(sum);
            narrow(y, sum[0]);
        }
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

    T *x_,
        *grad_;  // backward: from W - 1 tokens before the segment on, and from its first token on
    Element* ends_[2];  // forward: [2][room + head] each, of lines in turn
};

}  // namespace
}  // namespace LSM_CPU_TIER
}  // namespace lsm::cpu
