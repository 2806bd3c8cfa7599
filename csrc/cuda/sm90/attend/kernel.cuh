// The sm_90a attend kernel and its launch.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/arch/reg_reconfig.h>

#include "common/launch_kernel.h"
#include "compute.cuh"
#include "instances.h"
#include "load.cuh"
#include "schedule.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendArgs args) {
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(
      (reinterpret_cast<uintptr_t>(raw) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes);

  // Barriers.
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kQStages; ++stage) {
      shared.q_full[stage].init(1);
      shared.q_empty[stage].init(Traits::kConsumerWarps);
    }
    for (int stage = 0; stage < Traits::kKStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.k_empty[stage].init(Traits::kConsumerWarps);
    }
    for (int stage = 0; stage < Traits::kVStages; ++stage) {
      shared.v_full[stage].init(1);
      shared.v_empty[stage].init(Traits::kConsumerWarps);
    }
    for (int stage = 0; stage < Traits::kWorkStages; ++stage) {
      shared.work_full[stage].init(1);
      shared.work_empty[stage].init(32 * (Traits::kConsumerWarps + 2));
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  // Roles.
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    switch (threadIdx.x / 32) {
      case 0:
        Scheduler<Traits>(args, shared).run();
        break;
      case 1:
        KeyValueLoader<Traits, true>(args, shared).run();
        break;
      case 2:
        KeyValueLoader<Traits, false>(args, shared).run();
        break;
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared).run();
  }
}

template <class Element, int kHeadDim>
cudaError_t run_attend(const AttendArgs& args, int num_ctas, cudaStream_t stream) {
  using Traits = AttendTraits<Element, kHeadDim>;
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage) + kSwizzleBytes;
  // Starts before the kernel that orders the query blocks has ended. The scheduler waits for its
  // end.
  return launch_kernel(attend_kernel<Traits>, args, num_ctas, Traits::kThreads, kSharedBytes,
                       stream, true);
}

}  // namespace pbs::cuda::sm90
