// Which NVIDIA drivers run a build with CUDA kernels.
#pragma once

#include <string>

namespace pbs {

// The major version of a CUDA version number: 12080 is 12.8.
inline std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Returns an empty text if a driver for CUDA `driver` runs code that CUDA `toolkit` compiled. A
// driver runs its own major version and all older ones. 0 means that there is no driver.
inline std::string driver_error(int driver, int toolkit) {
  if (driver / 1000 >= toolkit / 1000) return "";
  const std::string found = driver == 0 ? "none" : "one for CUDA " + cuda_version_text(driver);
  const std::string major = std::to_string(toolkit / 1000);
  return "the NVIDIA driver must be one for CUDA " + major + ".0 or newer, got " + found +
         ": update the driver, or install a build of pbs_attn that an older nvcc compiled";
}

}  // namespace pbs
