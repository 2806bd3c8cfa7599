// Facts of the build as JSON. pbs_attn.build_info() reads them through ctypes.
#include <string>

#include "kernels.h"
#include "pbs/arch.h"
#include "pbs/dispatch.h"

#ifndef PBS_WITH_CUDA
#define PBS_CUDA_VERSION ""
#define PBS_CUTLASS_VERSION ""
#endif

extern "C" __attribute__((visibility("default"))) const char* pbs_build_info() {
  return "{\"version\": \"" PBS_VERSION "\", \"commit\": \"" PBS_COMMIT
         "\", \"torch_target\": \"2.10\""
         ", \"torch_built_with\": \"" PBS_TORCH_VERSION "\", \"compiler\": \"" __VERSION__
         "\", \"cuda_status\": \"" PBS_CUDA_STATUS "\", \"cuda_version\": \"" PBS_CUDA_VERSION
         "\", \"cutlass_version\": \"" PBS_CUTLASS_VERSION "\"}";
}

extern "C" __attribute__((visibility("default"))) const char* pbs_cpu_capability() {
  return pbs::cpu::kernels().name;
}

// The GPU families that a build with CUDA has kernels for, as JSON: their names and compute
// capabilities. A build without CUDA lists them too, to show which GPUs another build would run on.
extern "C" __attribute__((visibility("default"))) const char* pbs_gpu_families() {
  static const std::string families = [] {
    std::string list;
    for (const pbs::GpuFamily& family : pbs::kGpuFamilies) {
      list += std::string(list.empty() ? "" : ", ") + "{\"name\": \"" + family.name +
              "\", \"first\": " + std::to_string(family.first) + ", \"last\": " +
              (family.last == pbs::kNewest ? "null" : std::to_string(family.last)) + "}";
    }
    return "[" + list + "]";
  }();
  return families.c_str();
}

// Head dims with kernels, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* pbs_head_dims() {
  static const std::string sizes = [] {
    std::string list;
    for (const int size : pbs::kHeadDims) list += std::to_string(size) + ' ';
    return list;
  }();
  return sizes.c_str();
}

// Operators with CUDA kernels, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* pbs_cuda_stages() {
  static const std::string stages = [] {
    std::string names;
#ifdef PBS_WITH_CUDA
    for (const char* name : pbs::kCudaStages) names += std::string(name) + ' ';
#endif
    return names;
  }();
  return stages.c_str();
}
