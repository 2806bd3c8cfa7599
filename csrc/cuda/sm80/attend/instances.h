// The kernels of attend that attend.cu launches. Each head dim has its own small .cu file, so that
// they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include "args.h"
#include "common/attend/order.cuh"

namespace pbs::cuda::sm80 {

// Fills the workspace: sets the counter to 0 and writes the order.
cudaError_t launch_order(OrderArgs args, cudaStream_t stream);

template <class Element, int kHeadDim, int kKeys>
cudaError_t run_attend(const AttendArgs& args, int num_sms, cudaStream_t stream);

}  // namespace pbs::cuda::sm80
