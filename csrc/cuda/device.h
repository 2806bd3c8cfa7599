// Queries to the CUDA runtime that need no CUDA headers. A function returns an error as text, and
// null if there is none.
#pragma once

#include <cstdint>

namespace pbs::cuda {

const char* current_device(int* device);
const char* set_device(int device);
// The compute capability, as 10 * major + minor.
const char* compute_capability(int device, int* capability);
// Multiprocessors of the current device.
const char* count_sms(int* num_sms);
// The same for sizes of workspaces. Returns 1 if the query fails; the launch then reports the
// error.
int sms_of_workspace();
// Shared memory of a multiprocessor of the current device, in bytes.
const char* shared_bytes_per_sm(int64_t* num_bytes);
// The newest CUDA version that the driver runs, and the version that compiled this library. 12080
// stands for 12.8, and 0 means that there is no driver.
int driver_version();
int toolkit_version();

}  // namespace pbs::cuda
