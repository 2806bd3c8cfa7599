#include "stages.h"

#define PBS_STRINGIZE_(x) #x
#define PBS_STRINGIZE(x) PBS_STRINGIZE_(x)

namespace pbs::cpu::PBS_CPU_ARCH {

const Kernels& table() {
  static constexpr Kernels kTable = {
      PBS_STRINGIZE(PBS_CPU_ARCH),
      score_chunk,
      score_merge,
      score_average,
      score_scratch,
      permute_block,
      permute_scratch,
      block_mass,
      select_scratch,
      attend_block,
      attend_scratch,
  };
  return kTable;
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
