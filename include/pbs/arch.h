// The GPU families that have kernels, and which GPUs each of them runs on. One entry a folder of
// csrc/cuda; launch.cpp has the functions of each.
#pragma once

#include <cstddef>
#include <iterator>
#include <sstream>
#include <string>

namespace pbs {

struct GpuFamily {
  const char* name;  // of its folder
  int first;         // compute capabilities, 10 * major + minor
  int last;
};

constexpr GpuFamily kGpuFamilies[] = {
    // sm_90a code is specific to its architecture: it runs on compute capability 9.0 alone, neither
    // on older GPUs nor on newer ones.
    {"sm90", 90, 90},
};

// The operators that every family has.
constexpr const char* kCudaStages[] = {"score_keys",    "sort_segments", "permute_kv",
                                       "select_blocks", "attend",        "attention"};

// The family of a GPU of this compute capability, by its place in kGpuFamilies; -1 if there is
// none.
constexpr int find_family(int capability) {
  for (size_t i = 0; i < std::size(kGpuFamilies); ++i) {
    if (capability >= kGpuFamilies[i].first && capability <= kGpuFamilies[i].last) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

inline std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// "9.0", or "8.0 to 8.9, 9.0".
inline std::string capabilities_text() {
  std::ostringstream text;
  for (const GpuFamily& family : kGpuFamilies) {
    text << (&family == kGpuFamilies ? "" : ", ") << capability_text(family.first);
    if (family.last != family.first) text << " to " << capability_text(family.last);
  }
  return text.str();
}

// Empty when a family runs on a GPU of this compute capability.
inline std::string capability_error(int capability) {
  if (find_family(capability) >= 0) return "";
  return "q must be on a GPU of compute capability " + capabilities_text() +
         ", which this build of pbs_attn has kernels for, got " + capability_text(capability);
}

}  // namespace pbs
