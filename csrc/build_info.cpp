// What this library was built with, as JSON; read through ctypes by pbs_attn.build_info().
#include <string>
#include <string_view>

#include "kernels.h"
#include "pbs/arch.h"

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

// Names by a space.
extern "C" __attribute__((visibility("default"))) const char* pbs_cuda_stages() {
  static const std::string stages = [] {
    std::string names;
#ifdef PBS_WITH_CUDA
    for (const std::string_view name : pbs::kCudaStages) names += std::string(name) + ' ';
#endif
    return names;
  }();
  return stages.c_str();
}
