#include "kernels/recurrence/passes.cuh"

namespace lsm::recurrence {

template void run_either_side_forward<bf16>(ChunkParams const&, Plan const&, void*);
template void run_either_side_backward<bf16>(ChunkParams const&, Plan const&, void*);

}  // namespace lsm::recurrence
