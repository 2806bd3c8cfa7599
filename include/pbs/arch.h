// Which stages have CUDA kernels, and which GPUs those run on.
#pragma once

#include <string>
#include <string_view>

namespace pbs {

// Operators with a CUDA kernel.
constexpr std::string_view kCudaStages[] = {"score_keys",    "sort_segments", "permute_kv",
                                            "select_blocks", "attend",        "attention"};

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
