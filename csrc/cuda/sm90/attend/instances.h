// Launches the kernel of a head dim and an element type; each head dim has a small .cu of its own,
// so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

namespace pbs::cuda::sm90 {

struct AttendArgs;

template <class Element, int kHeadDim>
cudaError_t run_attend(const AttendArgs& args, int num_ctas, cudaStream_t stream);

}  // namespace pbs::cuda::sm90
