#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace pbs::cpu {

namespace baseline {
const Kernels& table();
}
#if defined(PBS_CPU_X86)
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
#endif

namespace {

const Kernels& widest() {
  // PBS_CPU_CAPABILITY=baseline|avx2 selects a lower instruction set, for tests and comparisons.
  const char* limit = std::getenv("PBS_CPU_CAPABILITY");
  const auto allowed = [limit](const char* name) {
    if (limit == nullptr || std::strcmp(limit, name) == 0) return true;
    return std::strcmp(limit, "baseline") != 0 && std::strcmp(limit, "avx2") != 0;
  };
#if defined(PBS_CPU_X86)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512::table();
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::table();
  }
#endif
  (void)allowed;
  return baseline::table();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

}  // namespace pbs::cpu
