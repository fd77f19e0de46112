#include "kernels/recurrence/passes.cuh"

namespace lsm::recurrence {

template void run_forward<float, float>(ChunkParams const&, Plan const&, void*);
template void run_backward<float, float>(ChunkParams const&, Plan const&, void*);

}  // namespace lsm::recurrence
