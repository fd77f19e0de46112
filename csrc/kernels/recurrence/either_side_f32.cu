#include "kernels/recurrence/passes.cuh"

namespace lsm::recurrence {

template void run_either_side_forward<float>(ChunkParams const&, Plan const&, void*);
template void run_either_side_backward<float>(ChunkParams const&, Plan const&, void*);

}  // namespace lsm::recurrence
