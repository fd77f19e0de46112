// The kernels of the tensor-core path that are in device files of their own, compiled in parallel.
#pragma once

#include "kernels/delta/chunks.cuh"
#include "kernels/dispatch.h"

namespace lsm::delta {

inline Form form_of(DeltaParams const& p) {
    return p.transition == Transition::dplr ? Form::sources
           : p.decay == Decay::key          ? Form::channels
                                            : Form::whole;
}

// Calls f(integral_constant of the form).
template <class F>
void dispatch_form(DeltaParams const& p, F const& f) {
    Form const form = form_of(p);
    if (form == Form::whole) return f(std::integral_constant<Form, Form::whole>{});
    if (form == Form::channels) return f(std::integral_constant<Form, Form::channels>{});
    f(std::integral_constant<Form, Form::sources>{});
}

// Calls f(integral_constant of the columns that tiles of K channels have).
template <Form form, class F>
void dispatch_width(int64_t K, F const& f) {
    if constexpr (form == Form::whole) {
        dispatch(Buckets<64, 128, 256>{}, K, f);
    } else {
        dispatch(Buckets<64, 128>{}, K, f);
    }
}
inline int64_t widest(Form form) {
    return form == Form::whole ? 256 : 128;
}

// states: for a backward, instead of o.
void run_recur(DeltaWork const& work, bool states, int64_t blocks, void* stream);
void run_reverse(DeltaWork const& work, int64_t blocks, void* stream);
void run_join(DeltaWork const& work, bool reverse, int64_t chains, void* stream);
void run_gradients(DeltaWork const& work, int64_t blocks, void* stream);

}  // namespace lsm::delta
