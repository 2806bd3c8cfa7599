#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "run.cuh"

namespace pbs::cuda::sm80 {

template cudaError_t run_sampled<cutlass::bfloat16_t, 64>(const SampledArgs&, cudaStream_t);
template cudaError_t run_sampled<cutlass::half_t, 64>(const SampledArgs&, cudaStream_t);

}  // namespace pbs::cuda::sm80
