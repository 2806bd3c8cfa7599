// Which stages have CUDA kernels, and which GPUs those run on.
#pragma once

#include <string>
#include <string_view>

namespace pbs {

// Operators with a CUDA kernel, by a space.
constexpr const char* kCudaStages = "permute_kv attend";

constexpr bool has_cuda_kernel(std::string_view stage) {
  std::string_view stages = kCudaStages;
  while (!stages.empty()) {
    const size_t end = stages.find(' ');
    if (stages.substr(0, end) == stage) return true;
    stages = end == stages.npos ? std::string_view() : stages.substr(end + 1);
  }
  return false;
}

// sm_90a code is specific to its architecture: it runs on compute capability 9.0 alone, neither
// on older GPUs nor on newer ones.
constexpr int kBuiltCapability = 90;

// Empty when the kernels run on a GPU of this compute capability (10 * major + minor).
inline std::string capability_error(int capability) {
  if (capability == kBuiltCapability) return "";
  return "q must be on a GPU of compute capability 9.0 (Hopper), which this build of pbs_attn has "
         "kernels for, got " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace pbs
