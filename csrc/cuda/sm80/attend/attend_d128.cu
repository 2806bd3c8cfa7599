#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "kernel.cuh"

namespace pbs::cuda::sm80 {

template cudaError_t run_attend<cutlass::bfloat16_t, 128, 64>(const AttendArgs&, int, cudaStream_t);
template cudaError_t run_attend<cutlass::half_t, 128, 64>(const AttendArgs&, int, cudaStream_t);
template cudaError_t run_attend<cutlass::bfloat16_t, 128, 32>(const AttendArgs&, int, cudaStream_t);
template cudaError_t run_attend<cutlass::half_t, 128, 32>(const AttendArgs&, int, cudaStream_t);

}  // namespace pbs::cuda::sm80
