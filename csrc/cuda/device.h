// The current device.
#pragma once

#include <cuda_runtime.h>

namespace pbs::cuda {

inline cudaError_t count_sms(int* num_sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace pbs::cuda
