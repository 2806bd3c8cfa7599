// One launch function for each head dim and element type, each in a small .cu of its own.
#pragma once

#include <cuda_runtime.h>

namespace pbs::cuda {

struct AttendArgs;

template <class Element, int kHeadDim>
cudaError_t launch_attend(const AttendArgs& args, int num_ctas, cudaStream_t stream);

}  // namespace pbs::cuda
