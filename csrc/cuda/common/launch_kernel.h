// Launches a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pbs::cuda {

// With `starts_early`, the kernel may start before the previous one in the stream has ended. It
// then waits for that end itself.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), const Args& args, int64_t num_ctas, int num_threads,
                          int64_t shared_bytes, cudaStream_t stream, bool starts_early = false) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(num_ctas);
  config.blockDim = static_cast<unsigned>(num_threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = starts_early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace pbs::cuda
