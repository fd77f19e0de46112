#include "kernels/recurrence/passes.cuh"

namespace lsm::recurrence {

template void run_either_side_forward<half>(ChunkParams const&, Plan const&, void*);
template void run_either_side_backward<half>(ChunkParams const&, Plan const&, void*);

}  // namespace lsm::recurrence
