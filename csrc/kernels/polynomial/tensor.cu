#include "kernels/polynomial/tensor.cuh"

namespace lsm::polynomial {

template <Pass pass>
void run_tensor(PassParams const& p, Segments const& segments, void* stream) {
    constexpr Pass kSame = pass == Pass::dq ? Pass::dk : pass;
    i64 const blocks = segments.count * p.HV * p.tiles;
    if (blocks == 0) return;
    launch(tensor<kSame>, dim3(static_cast<unsigned>(blocks)), dim3(Tensor<kSame>::kThreads),
           sizeof(TensorShared<kSame>), stream, p, segments);
}

template void run_tensor<Pass::state>(PassParams const&, Segments const&, void*);
template void run_tensor<Pass::o>(PassParams const&, Segments const&, void*);
template void run_tensor<Pass::dq>(PassParams const&, Segments const&, void*);
template void run_tensor<Pass::dv>(PassParams const&, Segments const&, void*);
template void run_tensor<Pass::dk>(PassParams const&, Segments const&, void*);

}  // namespace lsm::polynomial
