#include "device.h"

#include <cuda_runtime.h>

namespace pbs::cuda {
namespace {

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The compute capability of the current device.
cudaError_t get_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : error;
}

}  // namespace

const char* current_device(int* device) { return text_of(cudaGetDevice(device)); }

const char* set_device(int device) { return text_of(cudaSetDevice(device)); }

const char* compute_capability(int device, int* capability) {
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  *capability = 10 * major + minor;
  return text_of(error);
}

const char* count_sms(int* num_sms) {
  return text_of(get_attribute(cudaDevAttrMultiProcessorCount, num_sms));
}

int sms_of_workspace() {
  int num_sms = 0;
  return count_sms(&num_sms) == nullptr ? num_sms : 1;
}

const char* shared_bytes_per_sm(int64_t* num_bytes) {
  int found = 0;
  const cudaError_t error = get_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &found);
  *num_bytes = found;
  return text_of(error);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int toolkit_version() { return CUDART_VERSION; }

}  // namespace pbs::cuda
