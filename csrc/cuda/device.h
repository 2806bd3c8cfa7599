// Questions to the CUDA runtime, in words that need no CUDA headers. An error comes back as a text,
// no error as null.
#pragma once

#include <cstdint>

namespace pbs::cuda {

const char* current_device(int* device);
const char* set_device(int device);
// 10 * major + minor.
const char* compute_capability(int device, int* capability);
// Multiprocessors of the current device.
const char* count_sms(int* num_sms);
// The same for sizes of workspaces: 1 where it cannot be told. The launch then says why.
int sms_of_workspace();
// Shared memory of a multiprocessor of the current device.
const char* shared_bytes_per_sm(int64_t* num_bytes);
// The newest CUDA that the driver runs, and the CUDA that compiled this library: 12080 is 12.8, and
// 0 says that there is no driver.
int driver_version();
int toolkit_version();

}  // namespace pbs::cuda
