// Named barriers by their hardware numbers, 0 to 15. CUTLASS adds an offset to those of its users.
#pragma once

#include <cutlass/arch/barrier.h>

namespace pbs::cuda::sm90 {

__device__ inline void sync_barrier(int barrier, int num_threads) {
  cutlass::arch::NamedBarrier::sync(num_threads,
                                    static_cast<cutlass::arch::ReservedNamedBarriers>(barrier));
}
__device__ inline void arrive_barrier(int barrier, int num_threads) {
  cutlass::arch::NamedBarrier::arrive(num_threads,
                                      static_cast<cutlass::arch::ReservedNamedBarriers>(barrier));
}

}  // namespace pbs::cuda::sm90
