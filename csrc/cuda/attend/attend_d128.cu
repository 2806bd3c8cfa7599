#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "instances.h"
#include "kernel.cuh"

namespace pbs::cuda {

template <class Element, int kHeadDim>
cudaError_t launch_attend(const AttendArgs& args, int num_ctas, cudaStream_t stream) {
  return launch_attend_kernel<AttendTraits<Element, kHeadDim>>(args, num_ctas, stream);
}

template cudaError_t launch_attend<cutlass::bfloat16_t, 128>(const AttendArgs&, int, cudaStream_t);
template cudaError_t launch_attend<cutlass::half_t, 128>(const AttendArgs&, int, cudaStream_t);

}  // namespace pbs::cuda
