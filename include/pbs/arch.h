// The GPU families that have kernels, and which GPUs each of them runs on. Each family has a folder
// in csrc/cuda. launch.cpp has its functions.
#pragma once

#include <cstddef>
#include <iterator>
#include <sstream>
#include <string>

namespace pbs {

struct GpuFamily {
  const char* name;  // the name of its folder
  int first;         // compute capabilities, 10 * major + minor
  int last;
};

// The last capability of a family that newer GPUs also run.
constexpr int kNewest = 9999;

// A GPU takes the first family that runs on it.
constexpr GpuFamily kGpuFamilies[] = {
    // sm_90a code is specific to its architecture: it runs on compute capability 9.0 only, neither
    // on older nor on newer GPUs.
    {"sm90", 90, 90},
    // mma.sync and cp.async, which every GPU since Ampere has. GPUs that are newer than the build
    // use its PTX.
    {"sm80", 80, kNewest},
};

constexpr int oldest_capability() {
  int oldest = kNewest;
  for (const GpuFamily& family : kGpuFamilies) {
    if (family.first < oldest) oldest = family.first;
  }
  return oldest;
}

// Names the family to use instead of the first one, such as "sm80" on compute capability 9.0.
constexpr const char* kFamilyVariable = "PBS_GPU_FAMILY";

// The operators that every family implements.
constexpr const char* kCudaStages[] = {"score_keys",    "sort_segments", "permute_kv",
                                       "select_blocks", "attend",        "attention"};

// The index in kGpuFamilies of the family of a GPU of this compute capability, or -1 if there is
// none. If `wanted` is not empty, only the family of that name counts.
inline int find_family(int capability, const std::string& wanted) {
  for (size_t i = 0; i < std::size(kGpuFamilies); ++i) {
    const GpuFamily& family = kGpuFamilies[i];
    if (!wanted.empty() && wanted != family.name) continue;
    if (capability >= family.first && capability <= family.last) return static_cast<int>(i);
  }
  return -1;
}

inline std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Returns an empty text if a family runs on a GPU of this compute capability, and if it is the
// wanted one or `wanted` is empty.
inline std::string capability_error(int capability, const std::string& wanted) {
  if (find_family(capability, wanted) >= 0) return "";
  if (find_family(capability, "") < 0) {
    return "q must be on a GPU of compute capability " + capability_text(oldest_capability()) +
           " or newer, which this build of pbs_attn has kernels for, got " +
           capability_text(capability);
  }
  std::ostringstream names;
  for (const GpuFamily& family : kGpuFamilies) {
    if (find_family(capability, family.name) < 0) continue;
    names << (names.tellp() > 0 ? " or " : "") << family.name;
  }
  return "PBS_GPU_FAMILY must be empty or " + names.str() + " on a GPU of compute capability " +
         capability_text(capability) + ", got " + wanted;
}

}  // namespace pbs
