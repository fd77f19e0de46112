#include "kernels/delta/exact/passes.cuh"

namespace lsm::delta::exact {

template void run_forward<bf16>(DeltaParams const&, Plan const&, void*);
template void run_backward<bf16>(DeltaParams const&, Plan const&, void*);

}  // namespace lsm::delta::exact
