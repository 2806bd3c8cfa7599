// The kernels that sampled.cu launches. Each head dim has its own small .cu file, so that they
// compile in parallel.
#pragma once

#include <cuda_runtime.h>

namespace pbs::cuda {
struct SampledArgs;
}

namespace pbs::cuda::sm80 {

template <class Element, int kHeadDim>
cudaError_t run_sampled(const SampledArgs& args, cudaStream_t stream);

}  // namespace pbs::cuda::sm80
